"""Segment ids of sequences that are laid end to end."""

import math
import operator
from typing import Any

from anyattention._src import arguments, registry
from anyattention._src.errors import ShapeError
from anyattention._src.interfaces import Backend
from anyattention._src.rules import SegmentMask

Array = Any


def packed(lengths: Any, kv_lengths: Any = None, total: int | tuple[int, int] | None = None) -> SegmentMask:
    """The mask of sequences laid end to end: a query sees the keys of its own sequence.

    ``packed(lengths) & CausalMask()`` makes each of them causal, since positions count on through all of them; with
    `kv_lengths` of their own that is so no longer.

    Args:
        lengths: of the sequences, in order, an array or list of integers, ``[n]`` or ``[batch..., n]``. Some may be 0.
        kv_lengths: of the keys of each sequence; None for those of its queries.
        total: how long queries and keys are, an integer, or one for each. What is beyond the last sequence is padding:
            its keys are seen by no query, and its queries see no key, so that they are fully masked rows. None for the
            sum of the lengths, the largest of a batch; in a trace, as under `jax.jit`, that is not known.

    Raises:
        TypeError: lengths that are no integers, or no total in a trace.
        ShapeError: lengths of no axis, or of another number of sequences than `kv_lengths`.
        ValueError: lengths below 0 or beyond the total in sum, where values can be looked at: not in a trace, nor, with
            a total, on an accelerator, whose calls would have to wait.

    Examples:
        >>> mask = packed([1, 2], total=4)
        >>> mask.query_ids.tolist(), mask.kv_ids.tolist()
        ([0, 1, 1, -1], [0, 1, 1, -2])
        >>> mask.to_array(4, 4)[0].tolist()[:2]
        [[True, False, False, False], [False, True, True, False]]
    """
    totals = total if isinstance(total, tuple) else (total, total)
    query_ids = _ids("lengths", lengths, totals[0], -1)
    if kv_lengths is None:
        return SegmentMask(query_ids, _ids("lengths", lengths, totals[1], -2))
    kv_ids = _ids("kv_lengths", kv_lengths, totals[1], -2)
    if (count := _count(lengths)) != _count(kv_lengths):
        raise ShapeError(f"lengths has {count} sequences, but kv_lengths has {_count(kv_lengths)}: pass one for each")
    return SegmentMask(query_ids, kv_ids)


def _count(lengths: Any) -> int:
    while not hasattr(lengths, "shape") and isinstance(lengths[0], list | tuple):
        lengths = lengths[0]
    return lengths.shape[-1] if hasattr(lengths, "shape") else len(lengths)


def _ids(name: str, lengths: Any, total: Any, padding: int) -> Array:
    """The number of the sequence at each position, int32, ``[batch..., total]``, or that of padding."""
    backend = registry.backend_for(**{name: lengths})
    x = arguments.array_of(backend, name, list(lengths) if isinstance(lengths, tuple) else lengths)
    arrays, xp = backend.arrays, backend.xp
    if not (kind := arrays.dtype_name(x)).startswith(("int", "uint")) and 0 not in x.shape:
        raise TypeError(f"{name} must be integers, got {kind}")
    if not x.ndim:
        raise ShapeError(f"{name} must be [n] or [batch..., n], got shape ()")
    total = _total(backend, name, x, total)
    *batch, n = x.shape
    size = math.prod(batch)
    rows = xp.arange(size, dtype=xp.int32, **arrays.beside(x))[:, None]

    def ids() -> Array:
        ends = xp.cumulative_sum(arrays.cast(xp.reshape(x, (size, n)), "int32"), axis=-1, dtype=xp.int32)
        # One search for all of the batch, each entry behind the one before.
        ends = xp.clip(ends, 0, total) + rows * (total + 1)
        places = xp.arange(total, dtype=xp.int32, **arrays.beside(x)) + rows * (total + 1)
        found = xp.searchsorted(xp.reshape(ends, (-1,)), xp.reshape(places, (-1,)), side="right")
        found = arrays.cast(xp.reshape(found, (size, total)), "int32") - rows * n
        return xp.reshape(xp.where(found == n, padding, found), (*batch, total))

    return arrays.run(x, ids)


def _total(backend: Backend, name: str, x: Array, total: Any) -> int:
    """How long the sequences are together, with padding; lengths are checked where their values are at hand."""
    if total is not None:
        try:
            if isinstance(total, bool):
                raise TypeError
            total = operator.index(total)
        except TypeError:
            raise TypeError(f"total must be an integer, or one for queries and one for keys, got {total!r}") from None
    sums = None
    if not registry.compiling() and (total is None or backend.arrays.platform(x) == "cpu"):
        try:
            sums = _sums(name, x.tolist())
        except (RuntimeError, NotImplementedError, AttributeError):  # of a trace, or a library without it
            pass
        except TypeError:
            if not backend.arrays.traced(x):
                raise
    if sums is None:
        if total is None:
            raise TypeError(f"total must be given where the values of {name} are not known, as in a trace")
        return total
    most = max(sums, default=0)
    if total is not None and most > total:
        raise ValueError(f"{name} are {most} in sum, but total is {total}: they must not be more")
    return most if total is None else total


def _sums(name: str, values: list[Any]) -> list[int]:
    if values and isinstance(values[0], list):
        return [found for part in values for found in _sums(name, part)]
    if any(x < 0 for x in values):
        raise ValueError(f"{name} must not be negative, got {min(values)}")
    return [sum(values)]
