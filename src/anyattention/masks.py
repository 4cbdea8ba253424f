"""Masks by rule, which are never expanded, and Flax's helpers that make and combine dense ones.

A mask is truthy where a query may see a key. `CausalMask`, `LocalMask`, `SegmentMask` and `LengthMask` go wherever
`dot_product_attention` takes an array as `mask`, join by ``&``, ``|`` and ``~``, and are no larger than their ids and
lengths: a tile compares what its rows know with what its columns know. Like Flax's, the helpers for dense masks
return float32 zeros and ones unless told otherwise.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from anyattention import dispatch, dtypes
from anyattention.backend import Backend
from anyattention.errors import ShapeError

Array = Any
# A mask in terms of arrays by their numbers: ("array", i), ("<=", i, j), ("&", expression, expression), ...
Expression = tuple[Any, ...]
_COMPARE = {"<=": operator.le, "<": operator.lt, "==": operator.eq}
_JOIN = {"&": operator.and_, "|": operator.or_}


def visible(backend: Backend, expression: Expression, arrays: tuple[Array, ...]) -> Array:
    """Where the mask is truthy: bool, of the broadcast shape of the arrays, which may be those of a tile."""
    name, *parts = expression
    if name == "array":
        return backend.truth(arrays[parts[0]])
    if name in _COMPARE:
        return _COMPARE[name](*(arrays[i] for i in parts))
    if name == "~":
        return backend.xp.logical_not(visible(backend, parts[0], arrays))
    return _JOIN[name](*(visible(backend, part, arrays) for part in parts))


class Lowering:
    """The call that a mask is lowered for, and its arrays, ``[batch..., 1, q_length or 1, kv_length or 1]``."""

    def __init__(self, backend: Backend, batch: tuple[Any, ...] | None, lengths: tuple[int, int], like: Any) -> None:
        self.backend, self.batch, self.lengths, self.like = backend, batch, lengths, like
        self.arrays: list[Array] = []

    def add(self, x: Array) -> int:
        """The number of an array in expressions."""
        self.arrays.append(x)
        return len(self.arrays) - 1

    def position(self, axis: int, offset: int = 0) -> int:
        """Positions of queries (axis -2) or keys (-1), int32, plus an offset."""
        length = self.lengths[axis]
        start = offset if abs(offset) < 2**30 else min(max(offset, -(2**31)), 2**31 - length)  # sees all or nothing
        xp = self.backend.xp
        x = xp.arange(start, start + length, dtype=xp.int32, **self.backend.beside(self.like))
        return self.add(xp.reshape(x, (length, 1) if axis == -2 else (1, length)))

    def ids(self, mask: "Mask", name: str, axis: int) -> int:
        """Ids ``[batch..., length]`` of queries (axis -2) or keys (-1)."""
        x = self.adopt(getattr(mask, name))
        if x.ndim < 1 or x.shape[-1] != self.lengths[axis]:
            which = "q_length" if axis == -2 else "kv_length"
            raise ShapeError(f"{name} of {mask} has shape {tuple(x.shape)}, but {which} is {self.lengths[axis]}")
        self.check(mask, name, x.shape[:-1], x)
        column = (1, x.shape[-1]) if axis == -1 else (x.shape[-1], 1)
        return self.add(self.backend.xp.reshape(x, (*x.shape[:-1], 1, *column)))

    def each(self, mask: "Mask", name: str) -> int:
        """One number for each batch entry, ``[batch...]``."""
        x = self.adopt(getattr(mask, name))
        self.check(mask, name, x.shape, x)
        return self.add(self.backend.xp.reshape(x, (*x.shape, 1, 1, 1)))

    def check(self, mask: "Mask", name: str, batch: tuple[Any, ...], x: Array) -> None:
        """Raise ShapeError where the array's batch axes do not fit those of the call."""
        if self.batch is None:
            return
        fits = len(batch) <= len(self.batch) and all(
            a == b or a == 1 for a, b in zip(reversed(batch), reversed(self.batch), strict=False)
        )
        if not fits:
            raise ShapeError(
                f"{name} of {mask} has shape {tuple(x.shape)}, which does not fit the batch axes {self.batch} of query"
            )

    def adopt(self, x: Any) -> Array:
        """An array in the library of the call."""
        return x if dispatch.backend_of(x) is self.backend else self.backend.adopt(x, self.like)


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """A mask by rule. Subclasses say what queries know, what keys know, and what is compared."""

    def __post_init__(self) -> None:
        dispatch.register(type(self))

    def lower(self, to: Lowering) -> Expression:
        """The mask as an expression over arrays, which are added to `to`."""
        raise NotImplementedError

    def key_range(self, start: int, stop: int, kv_length: int) -> tuple[int, int]:
        """Bounds, known without a look at any array, of the keys that the queries from start to stop may see."""
        return 0, kv_length

    def sure_range(self, start: int, stop: int, kv_length: int) -> tuple[int, int]:
        """The same of some keys that all these queries see for certain."""
        return 0, 0

    def __and__(self, other: Any) -> "Mask":
        return _Join("&", self, as_mask(other))

    def __or__(self, other: Any) -> "Mask":
        return _Join("|", self, as_mask(other))

    __rand__, __ror__ = __and__, __or__
    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to us

    def __invert__(self) -> "Mask":
        return _Not(self)

    def __repr__(self) -> str:
        values = (getattr(self, field.name) for field in fields(self))
        shown = (f"array{tuple(x.shape)}" if hasattr(x, "shape") else repr(x) for x in values)
        return f"{type(self).__name__.strip('_')}({', '.join(shown)})"

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} is no array: expand it with to_array(q_length, kv_length) first")

    __array__ = __bool__ = __len__ = __iter__ = _refuse
    ndim = property(_refuse)  # asked for by Flax's combine_masks, as in its decode path

    def arrays(self) -> list[Array]:
        """The arrays that the mask was made from."""
        found: list[Array] = []
        for field in fields(self):
            x = getattr(self, field.name)
            if isinstance(x, Mask):
                found += x.arrays()
            elif not isinstance(x, int | str) and hasattr(x, "shape"):
                found.append(x)
        return found

    def to_array(self, q_length: int, kv_length: int) -> Array:
        """The mask expanded: bool, ``[batch..., 1, q_length, kv_length]``, or the last two where there is no batch.

        Of the library of its ids or lengths; NumPy's without any.

        >>> CausalMask().to_array(2, 3).tolist()
        [[True, False, False], [True, True, False]]
        """
        arrays = self.arrays()
        backend = dispatch.backend_for(**{f"mask[{i}]": x for i, x in enumerate(arrays)})
        like = next((x for x in arrays if dispatch.backend_of(x) is backend), None)
        return self.on(backend, None, (q_length, kv_length), like)

    def on(self, backend: Backend, batch: tuple[Any, ...] | None, lengths: tuple[int, int], like: Any) -> Array:
        """The mask expanded for a call."""
        to = Lowering(backend, batch, lengths, like)
        expression = self.lower(to)
        full = visible(backend, expression, tuple(to.arrays))
        sizes = (length if size == 1 else size for size, length in zip(full.shape[-2:], lengths, strict=True))
        return backend.xp.broadcast_to(full, (*full.shape[:-2], *sizes))


@dataclass(frozen=True, eq=False, repr=False)
class CausalMask(Mask):
    """Key j is visible to query i where ``j <= i + offset``; offset is an integer."""

    offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("offset", self.offset)

    def lower(self, to: Lowering) -> Expression:
        return "<=", to.position(-1), to.position(-2, self.offset)

    def key_range(self, start: int, stop: int, kv_length: int) -> tuple[int, int]:
        return 0, min(max(stop + self.offset, 0), kv_length)

    def sure_range(self, start: int, stop: int, kv_length: int) -> tuple[int, int]:
        return 0, min(max(start + self.offset + 1, 0), kv_length)


@dataclass(frozen=True, eq=False, repr=False)
class LocalMask(Mask):
    """Key j is visible to query i where ``i - left <= j <= i + right``; both are integers."""

    left: int
    right: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("left", self.left)
        _check_integer("right", self.right)

    def lower(self, to: Lowering) -> Expression:
        column = to.position(-1)
        return "&", ("<=", to.position(-2, -self.left), column), ("<=", column, to.position(-2, self.right))

    def key_range(self, start: int, stop: int, kv_length: int) -> tuple[int, int]:
        last = min(max(stop + self.right, 0), kv_length)
        return min(max(start - self.left, 0), last), last

    def sure_range(self, start: int, stop: int, kv_length: int) -> tuple[int, int]:
        return max(stop - 1 - self.left, 0), min(max(start + self.right + 1, 0), kv_length)


@dataclass(frozen=True, eq=False, repr=False)
class SegmentMask(Mask):
    """Visible where the ids are equal: integers ``[batch..., q_length]`` and ``[batch..., kv_length]``."""

    query_ids: Array
    kv_ids: Array

    def lower(self, to: Lowering) -> Expression:
        return "==", to.ids(self, "query_ids", -2), to.ids(self, "kv_ids", -1)


@dataclass(frozen=True, eq=False, repr=False)
class LengthMask(Mask):
    """Key j is visible where ``j < kv_length`` of its batch entry, and to query i where ``i < query_length``.

    Lengths are integers ``[batch...]``; None for queries of full length.
    """

    kv_lengths: Array
    query_lengths: Array | None = None

    def lower(self, to: Lowering) -> Expression:
        keys = "<", to.position(-1), to.each(self, "kv_lengths")
        if self.query_lengths is None:
            return keys
        return "&", keys, ("<", to.position(-2), to.each(self, "query_lengths"))


@dataclass(frozen=True, eq=False, repr=False)
class _Array(Mask):
    """A dense mask beside others: any dtype, broadcastable like `mask`."""

    array: Array

    def lower(self, to: Lowering) -> Expression:
        return "array", to.add(to.adopt(self.array))


@dataclass(frozen=True, eq=False, repr=False)
class _Not(Mask):
    mask: Mask

    def lower(self, to: Lowering) -> Expression:
        return "~", self.mask.lower(to)


@dataclass(frozen=True, eq=False, repr=False)
class _Join(Mask):
    how: str
    one: Mask
    two: Mask

    def lower(self, to: Lowering) -> Expression:
        return self.how, self.one.lower(to), self.two.lower(to)

    def key_range(self, start: int, stop: int, kv_length: int) -> tuple[int, int]:
        (a, b), (c, d) = (mask.key_range(start, stop, kv_length) for mask in (self.one, self.two))
        if self.how == "|":
            return min(a, c), max(b, d)
        return min(max(a, c), min(b, d)), min(b, d)

    def sure_range(self, start: int, stop: int, kv_length: int) -> tuple[int, int]:
        (a, b), (c, d) = (mask.sure_range(start, stop, kv_length) for mask in (self.one, self.two))
        if self.how == "|":
            return (a, b) if b - a >= d - c else (c, d)
        return max(a, c), min(b, d)


def as_mask(x: Any) -> Any:
    """A dense mask as one by rule, so that they mix; None stays."""
    return x if x is None or isinstance(x, Mask) else _Array(x)


def conjunction(mask: Any) -> list[Any]:
    """The masks by rule and the arrays of which a mask is the logical and; nothing of None."""
    if mask is None:
        return []
    if isinstance(mask, _Join) and mask.how == "&":
        return conjunction(mask.one) + conjunction(mask.two)
    return [mask.array if isinstance(mask, _Array) else mask]


def _check_integer(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be a Python integer, known when the mask is made, got {type(value).__name__}")


def make_attention_mask(
    query_input: Array,
    key_input: Array,
    pairwise_fn: Callable[[Array, Array], Array] = operator.mul,
    extra_batch_dims: int = 0,
    dtype: Any = "float32",
) -> Array:
    """Mask from a value for each query and one for each key, ``[batch..., 1, q_length, kv_length]``.

    Args:
        query_input: ``[batch..., q_length]``, for example 1 at tokens and 0 at padding.
        key_input: ``[batch..., kv_length]``.
        pairwise_fn: called with ``[batch..., q_length, 1]`` and ``[batch..., 1, kv_length]``.
        extra_batch_dims: this many axes of size 1 in front.
        dtype: of the mask, cast last; name, scalar type or the library's dtype.

    >>> import numpy as np
    >>> make_attention_mask(np.array([1, 1, 0]), np.array([1, 0]), dtype=bool).tolist()
    [[[True, False], [True, False], [False, False]]]
    """
    backend = dispatch.backend_for(query_input=query_input, key_input=key_input)
    xp = backend.xp
    for name, x in (("query_input", query_input), ("key_input", key_input)):
        if x.ndim == 0:
            raise ShapeError(f"{name} needs a length axis, got shape ()")
    query_input, key_input = backend.join(query_input, key_input)
    mask = pairwise_fn(xp.expand_dims(query_input, axis=-1), xp.expand_dims(key_input, axis=-2))
    mask = xp.expand_dims(mask, axis=-3)
    for _ in range(extra_batch_dims):
        mask = xp.expand_dims(mask, axis=0)
    return backend.cast(mask, dtypes.name_of(dtype))


def make_causal_mask(x: Array, extra_batch_dims: int = 0, dtype: Any = "float32") -> Array:
    """Lower-triangular mask, ``[batch..., 1, length, length]``, for an array ``[batch..., length]``.

    Only the shape of `x` is read.

    >>> import numpy as np
    >>> make_causal_mask(np.zeros(3), dtype=int).tolist()
    [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    """
    backend = dispatch.backend_for(x=x)
    if x.ndim == 0:
        raise ShapeError("x needs a length axis, got shape ()")
    index, _ = backend.xp.broadcast_arrays(backend.positions(x), x)
    return make_attention_mask(index, index, operator.ge, extra_batch_dims, dtype)


def combine_masks(*masks: Array | None, dtype: Any = "float32") -> Array | None:
    """The logical and of masks of one rank, skipping None; None if there is no mask.

    One mask alone is cast and keeps its values, as in Flax.

    Raises:
        ShapeError: masks of different rank.
    """
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    ranks = tuple(mask.ndim for mask in present)
    if len(set(ranks)) > 1:
        raise ShapeError(f"masks must have same rank: {ranks}")
    backend = dispatch.backend_for(**{f"masks[{i}]": mask for i, mask in enumerate(present)})
    present = [mask if dispatch.backend_of(mask) is backend else backend.adopt(mask, None) for mask in present]
    result = present[0]
    for mask in present[1:]:
        result = backend.xp.logical_and(backend.truth(result), backend.truth(mask))
    return backend.cast(result, dtypes.name_of(dtype))
