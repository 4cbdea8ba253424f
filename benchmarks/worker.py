"""One contestant in a process of its own, and its figures."""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from anyattention_conformance import truth
from benchmarks import models
from benchmarks.cases import Case

SECONDS = 1.0  # to measure a case for, at a time
LENGTHS = 0.75  # of the keys are visible in a padded batch, on average


class Contestant(NamedTuple):
    """What a process serves."""

    framework: str
    what: str

    @property
    def about(self) -> dict[str, str]:
        """What it is."""
        return self._asdict()

    def run(self, case: Case) -> dict[str, Any]:
        """The figures of one case."""
        return measure(case, self.framework, self.what)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clock() -> float:
    """Seconds; on one core those of this process, which others on the machine hardly change."""
    return time.process_time() if cores() == 1 else time.perf_counter()


def inputs(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """Query, key and value in float32, and how many keys each batch entry has."""
    random = np.random.default_rng(0)
    shape = (case.batch, case.keys, case.kv_heads or case.heads, case.depth)
    query = random.standard_normal((case.batch, case.q_length, case.heads, case.depth), dtype=np.float32)
    key, value = (random.standard_normal(shape, dtype=np.float32) for _ in range(2))
    lengths = np.linspace(2 * LENGTHS - 1, 1, case.batch) * case.keys
    return [query, key, value], lengths.astype(np.int32)


def dense(case: Case, lengths: np.ndarray) -> np.ndarray | None:
    """The mask as people write it."""
    if case.kind == "causal":
        return np.tri(case.q_length, case.keys, dtype=bool)
    if case.kind == "padding":
        return (np.arange(case.keys) < lengths[:, None])[:, None, None]
    return None


def right(case: Case, arrays: list[np.ndarray], mask: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """The output of some queries of the last batch entry in float64, or its sum of squares' gradient by them."""
    if case.of_model:
        return models.right(case, arrays, rows)
    query, key, value = (x[-1] for x in arrays)
    arguments = {"query": query[rows], "key": key, "value": value}
    if mask is not None:
        arguments["mask"] = np.broadcast_to(mask, (case.batch, 1, case.q_length, case.keys))[-1, :, rows].swapaxes(0, 1)
    output = truth(arguments, case.dtype)[0].output
    return truth(arguments, case.dtype, 2 * output)[0].gradients["query"] if case.gradient else output


def numpy_call(case: Case, what: str, arrays: list[Any], lengths: np.ndarray) -> Callable[[], Any] | None:
    import ml_dtypes

    from anyattention import dot_product_attention, dot_product_attention_vjp

    arrays = [x.astype(ml_dtypes.bfloat16) if case.dtype == "bfloat16" else x for x in arrays]
    if what == "ours":
        options = our_options(case, lengths, np.asarray)
        if not case.gradient:
            return lambda: dot_product_attention(*arrays, **options)

        def gradient() -> Any:
            output, pullback = dot_product_attention_vjp(*arrays, **options)
            return pullback(2 * output)[0]

        return gradient
    if case.gradient or case.kind == "dropout" or case.dtype != "float32" or case.of_model:
        return None
    mask = dense(case, lengths)

    def einsum() -> Any:
        query, key, value = arrays
        weights = np.einsum("bqhd,bkhd->bhqk", query / np.float32(case.depth**0.5), key, optimize=True)
        if mask is not None:
            weights = np.where(mask, weights, np.finfo(np.float32).min)
        weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("bhqk,bkhd->bqhd", weights, value, optimize=True)

    return einsum


def jax_call(case: Case, what: str, arrays: list[Any], lengths: np.ndarray) -> Callable[[], Any] | None:
    import flax.linen
    import jax
    import jax.numpy as jnp

    from anyattention import dot_product_attention

    placed = [jnp.asarray(x, case.dtype) for x in arrays]
    options: dict[str, Any] = {}
    if what == "ours":
        function, options = dot_product_attention, our_options(case, lengths, jnp.asarray)
    elif case.of_model:
        return None
    else:
        function = flax.linen.dot_product_attention if what == "flax" else jax.nn.dot_product_attention
        if (mask := dense(case, lengths)) is not None:
            options = {"mask": jnp.asarray(mask)[None, None] if mask.ndim == 2 else jnp.asarray(mask)}
        if case.kind == "dropout":
            if what == "jax.nn":
                return None
            options = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.1}

    def call(*arrays: Any) -> Any:
        return function(*arrays, **options)

    if case.gradient:
        compiled = jax.jit(jax.grad(lambda *x: (call(*x) ** 2).sum(), (0, 1, 2)))
        return lambda: jax.block_until_ready(compiled(*placed))[0]
    compiled = jax.jit(call)
    return lambda: jax.block_until_ready(compiled(*placed))


def torch_call(case: Case, what: str, arrays: list[Any], lengths: np.ndarray) -> Callable[[], Any] | None:
    import torch

    from anyattention import dot_product_attention

    placed = [torch.tensor(x).to(getattr(torch, case.dtype)).requires_grad_(case.gradient) for x in arrays]
    if what == "ours":
        options = our_options(case, lengths, torch.asarray)

        def call() -> Any:
            return dot_product_attention(*placed, **options)
    elif (what == "eager") != case.of_model:
        return None
    elif what == "eager":
        call = models.eager(case, placed)
    else:
        views = [x.transpose(1, 2) for x in placed]
        mask = dense(case, lengths)
        options = {"is_causal": True} if case.kind == "causal" else {}
        if case.kind == "padding":
            options = {"attn_mask": torch.tensor(mask)}
        if case.kind == "dropout":
            options = {"dropout_p": 0.1}

        def call() -> Any:
            return torch.nn.functional.scaled_dot_product_attention(*views, **options).transpose(1, 2)

    if case.gradient:
        return lambda: torch.autograd.grad((call() ** 2).sum(), placed)[0]
    return call


def our_options(case: Case, lengths: np.ndarray, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    from anyattention import masks, random

    if case.of_model:
        return models.our_options(case, put)
    if case.kind == "causal":
        return {"is_causal": True}
    if case.kind == "padding":
        return {"mask": masks.LengthMask(lengths)}
    if case.kind == "dropout":
        return {"dropout_rng": random.key(0), "dropout_rate": 0.1}
    return {}


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach().float() if hasattr(x, "detach") else x).astype(np.float64)


def measure(case: Case, framework: str, what: str) -> dict[str, Any]:
    """The figures of one case: seconds of the fastest call, the error, the growth of the peak of memory."""
    arrays, lengths = inputs(case)
    maker = {"numpy": numpy_call, "jax": jax_call, "torch": torch_call}[framework]
    call = maker(case, what, arrays, lengths)
    if call is None:
        return {}
    small = replace(case, batch=1, q_length=min(case.q_length, 8), kv_length=8)
    warm = maker(small, what, *inputs(small))
    if warm is not None:
        warm()  # loads code
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = to_numpy(call())
    figures: dict[str, Any] = {"peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}
    if case.kind != "dropout":
        # Of the first queries of a causal model the gradient is all but zero: what cancels in it is rounding.
        first = case.q_length // 8 if case.of_model and case.gradient else 0
        rows = np.linspace(first, case.q_length - 1, min(case.q_length, 8)).astype(int)
        expected = right(case, arrays, dense(case, lengths), rows)
        figures["error"] = float(np.max(np.abs(result[-1, rows] - expected)))
        eps = 2.0**-7 if case.dtype == "bfloat16" else 2.0**-23
        if not figures["error"] <= 32 * eps * np.abs(expected).max():
            return figures | {"wrong": True}
    times: list[float] = []
    while not times or (sum(times) < SECONDS and len(times) < 200):
        start = clock()
        call()
        times.append(clock() - start)
    return figures | {"seconds": min(times)}
