"""What the kernels on JAX have in common: what none of them serves, their four axes, and Flax's meaning.

Kernels disagree about a query that sees no key; Flax gives it the mean of all values. Such queries are shown some key,
so that whatever the kernel computes of them is finite, and their output is replaced: then their gradients are Flax's
too. A query all of whose biases are far below zero, as where they stand for a mask, is beyond kernels: such calls are
tiled's, which a program decides when it runs.
"""

from collections.abc import Callable
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp

from anyattention import dtypes, masks
from anyattention.engine import LOW, SWITCH, Engine, fits, least_bias, pairs
from anyattention.request import Request
from anyattention.structure import Structure, structure
from anyattention_backends.jax_once import once

Array = Any
Arrays = tuple[Array, Array, Array, Array | None]  # query, key, value, bias
MOST = 2**30  # elements of an array that stands for a mask by rule
_SAMPLE = 64  # keys


class Kernel(Engine):
    """One kernel. Subclasses say where it is, what it lacks, and how it is called."""

    platform: str  # as JAX names it
    dtypes: tuple[str, ...]
    multiple = 1  # of the depths, which are filled up with zeros
    one_depth = False  # of queries, keys and values
    even = False  # whether its derivative wants even lengths; it then refuses a bias or an array of odd ones
    arrays = True  # as masks

    @cached_property
    def absent(self) -> str:
        """Why this machine cannot run the kernel; empty where it can."""
        return ""

    def limits(self, request: Request, mask: Structure) -> dict[str, bool]:
        """More reasons against the kernel, and whether they hold."""
        return {}

    def lacks(self, mask: Structure, lengths: tuple[int, int], biased: bool) -> dict[str, str]:
        """Which of "band", "lengths" and "segments" it does not have, and why; `lengths` of queries and keys."""
        return {}

    def call(self, query: Array, key: Array, value: Array, bias: Array | None, mask: Structure, scale: float) -> Array:
        """The kernel: ``[batch, length, heads, depth]`` in and out; all of one dtype, of no batch axes but one."""
        raise NotImplementedError

    def refusals(self, request: Request) -> list[str]:
        dtype, query, key, value, bias = request[:5]
        if (platform := self.backend.platform(query)) != self.platform:
            return [f"it runs on {self.platform}, not on {platform}"]
        if self.absent:
            return [self.absent]
        checks = {
            f"it has no {dtype}": dtype not in self.dtypes,
            "a softmax in float32 of 16-bit arrays returns float32": request.force_fp32 and "16" in dtype,
            "it has no dropout of Flax's bits": request.dropout is not None,
            "its precision is its own": request.precision is not None,
            "something is empty": 0 in (*query.shape, *key.shape, *value.shape),
            "bias or mask has axes that query and key lack": not fits(request),
        }
        if hasattr(bias, "shape"):
            wide = dtypes.promote(dtype, self.backend.dtype_name(bias))
            checks[f"the bias makes logits {wide}"] = wide != dtype
        mask, expanded = self.fitted(query, key, bias, request.mask)
        if self.arrays and expanded:
            size = _pairs(request)
            checks |= {f"{reason}, and an array has {size} elements": size > MOST for reason in expanded.values()}
        elif not self.arrays:
            checks |= dict.fromkeys(expanded.values(), True)
            checks["it has no arrays as masks"] = any(not isinstance(x, masks.Mask) for x in mask.rest)
        checks |= self.limits(request, mask)
        return [reason for reason, holds in checks.items() if holds]

    def remarks(self, request: Request) -> list[str]:
        _, expanded = self.fitted(request.query, request.key, request.bias, request.mask)
        found = [f"the mask is an array of {_pairs(request)} elements: {reason}" for reason in expanded.values()]
        return found if request.bias is None else [*found, LOW]

    def fitted(self, query: Array, key: Array, bias: Any, mask: Any) -> tuple[Structure, dict[str, str]]:
        """The structure, with all that the kernel lacks among the rest; and what that is and why."""
        found = structure(mask)
        reasons: dict[str, str] = {}
        if mask is None:
            return found, reasons
        lengths = query.shape[-3], key.shape[-3]
        if any(isinstance(x, masks.Mask) for x in found.rest):
            reasons["rest"] = "it is no band, lengths, segments and array, joined by &"
        if not found.band_shows(*lengths):
            reasons["band"] = "some queries see nothing, where their window begins or ends"
        elif found.left is not None and (found.kv_lengths is not None or found.kv_ids is not None):
            reasons["band"] = "a window beside lengths or segments may leave queries without a key"
        found = found.without(*reasons) if reasons else found
        if more := self.lacks(found, lengths, bias is not None):
            reasons |= more
            found = found.without(*more)
        if found.left is not None and found.rest and bias is not None:
            reasons["band"] = "a window beside a bias and an array may leave queries without a key"
            found = found.without("band")
        return found, reasons

    def attention(self, request: Request, fallback: Callable[[Request], Array]) -> Array:
        query, key, value, bias, mask = request[1:6]
        bias = None if bias is None else jnp.atleast_1d(jnp.asarray(bias, query.dtype))
        sound = None if bias is None else _reached(self.backend, request, jax.lax.stop_gradient(bias))
        if sound is not None and not isinstance(sound, jax.core.Tracer):
            if not sound:
                return fallback(request)
            sound = None
        static = request._replace(query=None, key=None, value=None, bias=None, mask=None)
        functions = partial(_mended, self), partial(_without, fallback, static)
        try:
            return once(*functions, self.name, mask, (query, key, value, bias), sound)
        except NotImplementedError:
            raise
        except Exception as error:
            error.add_note(f"This is the engine {self.name!r}. {SWITCH.format(self.name)}")
            raise

    def depth(self, *arrays: Array) -> int:
        """The depth that the kernel is given for the depths of these arrays."""
        return -(-max(x.shape[-1] for x in arrays) // self.multiple) * self.multiple

    def mended(self, mask: Any, arrays: Arrays, trained: bool) -> Array:
        """The kernel's answer with Flax's meaning, ``[batch..., q_length, heads, v_depth]``.

        Where it is `trained`, there is to be a derivative: a kernel that wants even lengths then gets one more row,
        beyond the lengths that it is told. The row's output is cut off, so that its cotangent is zero.
        """
        query, key, value, bias = arrays
        *batch, _, heads, depth = query.shape
        found, _ = self.fitted(query, key, bias, mask)
        seen, found = _shown(self.backend, found, mask, query, key)
        found = _one_batch(found, batch)
        widths = (self.depth(query, value),) * 2 if self.one_depth else (self.depth(query), self.depth(value))
        lengths = query.shape[-3], key.shape[-3]
        whole = (lengths[0] + lengths[0] % 2, lengths[1] + lengths[1] % 2) if self.even and trained else lengths
        sizes = (whole[0], widths[0]), (whole[1], widths[0]), (whole[1], widths[1])
        q, k, v = (
            _filled(jnp.reshape(x, (-1, *x.shape[-3:])), *size)
            for x, size in zip((query, key, value), sizes, strict=True)
        )
        if whole != lengths:
            rows, keys = (jnp.full(q.shape[0], length, jnp.int32) for length in lengths)
            keys = keys if found.kv_lengths is None else found.kv_lengths
            found = found._replace(query_lengths=rows, kv_lengths=keys)
        four = None if bias is None else pairs(jnp, bias, batch)
        with jax.named_scope(f"anyattention engine {self.name}"):  # shows in errors of the compiler
            output = self.call(q, k, v, four, found, depth**-0.5)[:, : lengths[0], :, : value.shape[-1]]
        output = jnp.reshape(output, (*query.shape[:-1], value.shape[-1]))
        if seen is not None:
            mean = jnp.mean(value.astype(jnp.promote_types(value.dtype, jnp.float32)), axis=-3, keepdims=True)
            mean = jnp.repeat(mean.astype(value.dtype), heads // key.shape[-2], axis=-2)
            output = jnp.where(_rows(seen), output, mean)
        return output


@partial(jax.jit, static_argnums=(0, 3))
def _mended(kernel: Kernel, mask: Any, arrays: Arrays, trained: bool = False) -> Array:
    return kernel.mended(mask, arrays, trained)


def _without(fallback: Callable[[Request], Array], request: Request, mask: Any, arrays: Arrays) -> Array:
    query, key, value, bias = arrays
    return fallback(request._replace(query=query, key=key, value=value, bias=bias, mask=mask))


def _reached(backend: Any, request: Request, bias: Array) -> Array:
    """Whether every query is shown a key whose bias is not too low; first by a few keys, which mostly tell."""
    mask, query, key = request.mask, request.query, request.key

    def visible() -> Array:
        return jnp.ones(1, bool) if mask is None else _visible(backend, mask, query, key)

    def reached(bias: Array, visible: Array) -> Array:
        largest = jnp.max(jnp.where(visible, bias, -jnp.inf), axis=-1)
        return _all(largest >= least_bias(request.dtype))

    def by_all() -> Array:
        dense = visible()
        unseen = ~jnp.any(dense, axis=-1, keepdims=True)
        return reached(bias, dense | (unseen & (jnp.arange(key.shape[-3]) == 0)))  # the one key that all are shown

    if (step := key.shape[-3] // _SAMPLE) < 2:
        return by_all()
    by_some = reached(*(x[..., ::step] for x in (bias, visible())))
    if not isinstance(by_some, jax.core.Tracer):
        return by_some if by_some else by_all()
    return jax.lax.cond(by_some, lambda: jnp.array(True), by_all)


def _all_mapped(size: int, mapped: list[bool], x: Array) -> tuple[Array, bool]:
    return _all(x), False


#: Whether all are true, of an axis of `jax.vmap` too, so that a branch stays one.
_all = jax.custom_batching.custom_vmap(lambda x: jnp.all(x))
_all.def_vmap(_all_mapped)


def _shown(backend: Any, found: Structure, mask: Any, query: Array, key: Array) -> tuple[Array | None, Structure]:
    """Which queries see a key, ``[batch..., heads or 1, q_length or 1]``, None for all; a mask that shows each one."""
    batch = query.shape[:-3]
    if not found.rest and found.kv_ids is None:
        if found.kv_lengths is None:
            return None, found
        kv_lengths = jnp.clip(jnp.asarray(found.kv_lengths, jnp.int32), 0, key.shape[-3])
        seen = (kv_lengths > 0)[..., None, None]
        if found.query_lengths is not None:
            rows = jnp.arange(query.shape[-3], dtype=jnp.int32)
            seen = seen & (rows < jnp.asarray(found.query_lengths)[..., None, None])
        return seen, found._replace(kv_lengths=jnp.maximum(kv_lengths, 1), query_lengths=None)
    seen = jnp.any(_visible(backend, mask, query, key), axis=-1)
    if found.kv_lengths is not None:
        kv_lengths = jnp.clip(jnp.asarray(found.kv_lengths, jnp.int32), 1, key.shape[-3])
        found = found._replace(kv_lengths=kv_lengths, query_lengths=None)
    if found.rest:
        found = found._replace(rest=(_visible(backend, found.joined, query, key) | ~seen[..., None],))
    if found.kv_ids is not None:  # every key 0 is in the band and within the lengths
        ids = jnp.broadcast_to(jnp.asarray(found.query_ids), (*batch, query.shape[-3]))
        alone = ~jnp.broadcast_to(jnp.any(seen, axis=-2), ids.shape)
        found = found._replace(query_ids=jnp.where(alone, jnp.asarray(found.kv_ids)[..., :1], ids))
    return seen, found


def _visible(backend: Any, mask: Any, query: Array, key: Array) -> Array:
    """Where a query sees a key, broadcastable to ``[batch..., heads, q_length, kv_length]``; XLA fuses it away."""
    if not isinstance(mask, masks.Mask):
        return backend.truth(jnp.atleast_1d(jnp.asarray(mask)))
    to = masks.Lowering(backend, tuple(query.shape[:-3]), (query.shape[-3], key.shape[-3]), query)
    return masks.visible(backend, mask.lower(to), tuple(to.arrays))


def _one_batch(found: Structure, batch: list[int]) -> Structure:
    """The same with one batch axis: of lengths and ids the call's own, of an array that or 1."""

    def flat(x: Any, axes: int) -> Array | None:
        if x is None:
            return None
        x = jnp.asarray(x)
        x = jnp.broadcast_to(x, (*batch, *x.shape[x.ndim - axes :]))
        return jnp.reshape(x, (-1, *x.shape[len(batch) :]))

    lengths = {name: flat(getattr(found, name), 0) for name in ("kv_lengths", "query_lengths")}
    ids = {name: flat(getattr(found, name), 1) for name in ("query_ids", "kv_ids")}
    return found._replace(**lengths, **ids, rest=tuple(pairs(jnp, x, batch) for x in found.rest))


def _rows(x: Array) -> Array:
    """``[..., heads, q_length]`` as ``[..., q_length, heads, 1]``; axes may be missing."""
    if x.ndim < 2:
        x = jnp.reshape(x, (1,) * (2 - x.ndim) + x.shape)
    return jnp.swapaxes(x, -1, -2)[..., None]


def _filled(x: Array, length: int, depth: int) -> Array:
    """The array of four axes with zeros up to a length and a depth."""
    more = length - x.shape[1], depth - x.shape[3]
    return jnp.pad(x, [(0, 0), (0, more[0]), (0, 0), (0, more[1])]) if any(more) else x


def plain(request: Request) -> bool:
    """Whether there is no bias and no mask but a causal one, a window to the left, and lengths."""
    found = structure(request.mask)
    return request.bias is None and not found.rest and found.kv_ids is None and found.right in (None, 0)


def _pairs(request: Request) -> int:
    return prod(request.query.shape[:-2]) * request.key.shape[-3]
