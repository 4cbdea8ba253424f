"""The memory of tiled: 64 MiB beside inputs and outputs serve 16384 queries and keys, however masked.

Each test runs calls in a fresh process of its own, this file as a script, and reads from Linux how far the resident
memory rose at most in each. One byte for every pair of query and key would be 256 MiB, and the logits 1 GiB.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask

LENGTH, DEPTH, SPARE = 16384, 64, 64
MASKS = ("causal", "local", "segments", "lengths", "joined")
LIBRARIES = ("numpy", "jax", "torch")
ARRAYS = {"forward": 4, "gradient": 8}  # query, key, value, output; their gradients
RESET = "/proc/self/clear_refs"

pytestmark = pytest.mark.skipif(not os.access(RESET, os.W_OK), reason=f"the peak is reset through {RESET}, of Linux")


# --- in the process that is measured ---


def status(name: str) -> float:
    """A figure of this process, in MiB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def rise(call: Callable[[], Any]) -> float:
    """By how many MiB the resident memory is larger during a call than before, at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what the call takes
    with open(RESET, "w") as file:
        file.write("5")
    before = status("VmRSS")
    result = call()
    peak = status("VmHWM")
    del result
    return peak - before


def options(name: str, length: int, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Arguments besides query, key and value."""
    ids = put(np.arange(length, dtype=np.int32) // 1000)
    lengths = (put(np.asarray([length * part // 8], dtype=np.int32)) for part in (7, 6))  # so some queries see nothing
    if name == "bias":
        return {"bias": put(np.linspace(-1, 1, length, dtype=np.float32))}
    if name == "dropout":
        return {"dropout_rng": aa.random.key(0), "dropout_rate": 0.1, "broadcast_dropout": True}
    if name == "none":
        return {}
    return {
        "mask": {
            "causal": lambda: CausalMask(),
            "local": lambda: LocalMask(1000, 100),
            "segments": lambda: SegmentMask(ids, ids),
            "lengths": lambda: LengthMask(*lengths),
            "joined": lambda: CausalMask() & LengthMask(next(lengths)) | ~SegmentMask(ids, ids),
        }[name]()
    }


def numpy_call(what: str, arrays: list[np.ndarray], name: str, implementation: str) -> Callable[[], Any]:
    given = options(name, len(arrays[0][0]), lambda x: x)
    if what == "forward":
        return lambda: aa.dot_product_attention(*arrays[:3], **given, implementation=implementation)

    def gradient() -> Any:
        output, pullback = aa.dot_product_attention_vjp(*arrays[:3], **given)
        return output, pullback(arrays[3])

    return gradient


def jax_call(what: str, arrays: list[np.ndarray], name: str, implementation: str) -> Callable[[], Any]:
    """Compiled already; bias and mask are arguments, since a constant might be computed with in advance."""
    import jax
    import jax.numpy as jnp

    given = options(name, len(arrays[0][0]), jnp.asarray)
    fixed = {x: given.pop(x) for x in list(given) if x not in ("bias", "mask")}
    query, key, value, cotangent = map(jnp.asarray, arrays)

    def forward(query: Any, key: Any, value: Any, given: Any) -> Any:
        return aa.dot_product_attention(query, key, value, **given, **fixed, implementation=implementation)

    def gradient(query: Any, key: Any, value: Any, given: Any, cotangent: Any) -> Any:
        output, pullback = jax.vjp(lambda *x: forward(*x, given), query, key, value)
        return output, pullback(cotangent)

    inputs = (query, key, value, given) if what == "forward" else (query, key, value, given, cotangent)
    compiled = jax.jit(forward if what == "forward" else gradient).lower(*inputs).compile()
    return lambda: jax.block_until_ready(compiled(*inputs))


def torch_call(what: str, arrays: list[np.ndarray], name: str, implementation: str) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(1)  # several wait in vain for one another where tests run side by side
    given = options(name, len(arrays[0][0]), torch.tensor)
    *inputs, cotangent = map(torch.tensor, arrays)

    def forward() -> Any:
        return aa.dot_product_attention(*inputs, **given, implementation=implementation)

    def gradient() -> Any:
        output = forward()
        return output, torch.autograd.grad(output, inputs, cotangent)

    if what == "forward":
        return forward
    for x in inputs:
        x.requires_grad_()
    return gradient


def main(library: str, *cases: str) -> None:
    """Measure each of the cases, "what name length implementation"."""
    make = {"numpy": numpy_call, "jax": jax_call, "torch": torch_call}[library]

    def prepare(what: str, name: str, length: str, implementation: str) -> Callable[[], Any]:
        random = np.random.default_rng(0)
        arrays = [random.standard_normal((1, int(length), 1, DEPTH), dtype=np.float32) for _ in range(4)]
        return make(what, arrays, name, implementation)

    what, name, _, implementation = cases[0].split()
    prepare(what, name, "64", implementation)()  # the first call of all loads code
    sys.stdout.write(json.dumps([rise(prepare(*case.split())) for case in cases]))


# --- in the process of the tests ---


def measure(library: str, *cases: str, **environment: str) -> dict[str, float]:
    """By how many MiB the memory rises in each of the cases."""
    command = [sys.executable, __file__, library, *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | environment)
    assert not done.returncode, done.stderr[-2000:]
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def beyond_promise(figures: dict[str, float]) -> dict[str, float]:
    """The cases that take more than inputs, outputs and what is spare, all in MiB."""
    found = {}
    for case, peak in figures.items():
        what, _, length, _ = case.split()
        if peak > ARRAYS[what] * int(length) * DEPTH * 4 / 2**20 + SPARE:
            found[case] = peak
    return found


libraries = pytest.mark.parametrize("library", LIBRARIES)


@pytest.mark.slow
@libraries
def test_forward(library):
    cases = [f"forward {name} {LENGTH} tiled" for name in ("none", "bias", *MASKS)]
    assert not beyond_promise(measure(library, *cases))


@pytest.mark.slow
@libraries
def test_dropout(library):
    assert not beyond_promise(measure(library, f"forward dropout {LENGTH} tiled"))


@pytest.mark.slow
@libraries
@pytest.mark.parametrize("name", ["none", "joined"])
def test_gradient(library, name):
    assert not beyond_promise(measure(library, f"gradient {name} {LENGTH} tiled"))


@pytest.mark.slow
@libraries
def test_twice_the_length_takes_twice_the_memory(library):
    cases = ("gradient none 4096 tiled", "gradient none 8192 tiled")
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # what is free goes back to Linux at once
    short, long = measure(library, *cases, **given_back).values()
    assert long <= 2 * short + 4


@pytest.mark.slow
@libraries
def test_exact_breaks_the_promise(library):
    """Already at a quarter of the length: so the figures tell what is taken."""
    assert beyond_promise(measure(library, "forward none 4096 exact"))


if __name__ == "__main__":
    main(*sys.argv[1:])
