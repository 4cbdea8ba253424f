"""Masks by rule: what they are made of, how they are joined, and which expressions they become."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from anyattention._src.blocks import Sizes
from anyattention._src.rules.by_rule import PAIRS, AnyArray, ByRule, shown
from anyattention._src.rules.lowering import Expression, Lowering, visible

Array = Any


@dataclass(frozen=True, eq=False, repr=False)
class Mask(ByRule):
    """A mask by rule, which is passed as ``mask=`` and joined by ``&``, ``|`` and ``~`` with others and with arrays.

    Subclasses say what queries know, what keys know, and what is compared.
    """

    kind, _joint, _of = "mask", "mask & other", "integers"

    def lower(self, to: Lowering) -> Expression:
        """The mask as an expression over operands, which are added to `to`."""
        raise NotImplementedError

    def ranges(self, start: int, stop: int, kv_length: int) -> tuple[Sizes, Sizes]:
        """Bounds, known without a look at any array, of the keys that the queries from start to stop may see.

        Then those of some keys that all these queries see for certain.
        """
        return (0, kv_length), (0, 0)

    def __and__(self, other: "Mask | AnyArray") -> "Mask":
        """None, as in Flax's `combine_masks`, is no mask."""
        return self if other is None else _Join("&", self, as_mask(other))

    def __or__(self, other: "Mask | AnyArray") -> "Mask":
        if other is None:
            raise TypeError(f"{self} | None: where None stands for no mask, every key is visible; pass mask=None")
        return _Join("|", self, as_mask(other))

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> "Mask":
        return _Not(self)

    def to_array(self, q_length: int, kv_length: int) -> Array:
        """The mask expanded: bool, ``[batch..., 1, q_length, kv_length]``, or the last two where there is no batch.

        Of the library of its ids or lengths; NumPy's without any.

        Examples:
            >>> CausalMask().to_array(2, 3).tolist()
            [[True, False, False], [True, True, False]]
        """
        backend, mask, like = self._home(self)
        lengths = q_length, kv_length
        to = Lowering(backend.arrays, None, lengths, like)
        full = backend.arrays.run(like, visible, backend.arrays, mask.lower(to), to.operands)
        sizes = (length if size == 1 else size for size, length in zip(full.shape[-2:], lengths, strict=True))
        return backend.arrays.xp.broadcast_to(full, (*full.shape[:-2], *sizes))


@dataclass(frozen=True, eq=False, repr=False)
class CausalMask(Mask):
    """Key j is visible to query i where ``j <= i + offset``.

    Args:
        offset: for queries that follow a cache, the number of keys before the first of them: an integer, or an array
            of integers, ``[batch...]``, which JAX may trace.

    Raises:
        TypeError: an offset that is no integer and no array of integers.
        ShapeError: in a call, an offset that does not fit the batch axes of the query.

    Examples:
        >>> CausalMask(1).to_array(2, 4).tolist()
        [[True, True, False, False], [True, True, True, False]]
    """

    offset: int | Array = 0
    _offsets = ("offset",)
    _axes: ClassVar = {"offset": ("batch",)}

    def lower(self, to: Lowering) -> Expression:
        return "<=", to.position(-1), to.position(-2, 0, self)

    def ranges(self, start: int, stop: int, kv_length: int) -> tuple[Sizes, Sizes]:
        if not isinstance(self.offset, int):
            return super().ranges(start, stop, kv_length)
        seen, sure = (min(max(row + self.offset, 0), kv_length) for row in (stop, start + 1))
        return (0, seen), (0, sure)


@dataclass(frozen=True, eq=False, repr=False)
class LocalMask(Mask):
    """Key j is visible to query i where ``i + offset - left <= j <= i + offset + right``.

    Args:
        left: an integer: how many keys before its own position a query sees.
        right: an integer: how many keys behind it.
        offset: the position of the first query among the keys, as `CausalMask` takes it.

    Raises:
        TypeError: bounds that are no integers, or an offset that is no integer and no array of integers.
        ShapeError: in a call, an offset that does not fit the batch axes of the query.

    Examples:
        >>> LocalMask(1, 0).to_array(3, 3).tolist()
        [[True, False, False], [True, True, False], [False, True, True]]
    """

    left: int
    right: int
    offset: int | Array = 0
    _integers = ("left", "right")
    _offsets = ("offset",)
    _axes: ClassVar = {"offset": ("batch",)}

    def lower(self, to: Lowering) -> Expression:
        column = to.position(-1)
        first, last = to.position(-2, -self.left, self), to.position(-2, self.right, self)
        return "&", ("<=", first, column), ("<=", column, last)

    def ranges(self, start: int, stop: int, kv_length: int) -> tuple[Sizes, Sizes]:
        if not isinstance(self.offset, int):
            return super().ranges(start, stop, kv_length)
        left, right = self.left - self.offset, self.right + self.offset
        seen, sure = (min(max(row + right, 0), kv_length) for row in (stop, start + 1))
        return (min(max(start - left, 0), seen), seen), (max(stop - 1 - left, 0), sure)


def is_band(mask: Any) -> bool:
    """Whether a mask shows each query the keys of a window, whose ends are known when the mask is made."""
    return isinstance(mask, CausalMask | LocalMask) and isinstance(mask.offset, int)


@dataclass(frozen=True, eq=False, repr=False)
class SegmentMask(Mask):
    """Key j is visible to query i where their ids are equal, as of sequences that are packed into one.

    Args:
        query_ids: integers ``[batch..., q_length]``.
        kv_ids: integers ``[batch..., kv_length]``.

    Raises:
        TypeError: in a call, ids that are no integers.
        ShapeError: in a call, ids of another length, or that do not fit the batch axes of the query.

    Examples:
        >>> import numpy as np
        >>> ids = np.array([0, 0, 1])
        >>> SegmentMask(ids, ids).to_array(3, 3)[0].tolist()
        [[True, True, False], [True, True, False], [False, False, True]]
    """

    query_ids: Array
    kv_ids: Array
    _arrays = ("query_ids", "kv_ids")
    _axes: ClassVar = {"query_ids": ("batch", "rows"), "kv_ids": ("batch", "columns")}

    def lower(self, to: Lowering) -> Expression:
        kinds = {hasattr(x, "dtype") and to.arrays.dtype_name(x).startswith("u") for x in (self.query_ids, self.kv_ids)}
        unlike = len(kinds) > 1
        return "==", to.given(self, "query_ids", -2, unlike), to.given(self, "kv_ids", -1, unlike)

    def within_32_bits(self, is_wide: Callable[[Any], bool]) -> Mask:
        """Ids are equal where all their parts are, of 22, 22 and 20 bits."""
        ids = self.query_ids, self.kv_ids
        if not any(map(is_wide, ids)):
            return self
        low, middle, high = zip(*(_parts(x, is_wide(x)) for x in ids), strict=True)
        return SegmentMask(*low) & SegmentMask(*middle) & SegmentMask(*high)


def _parts(x: Any, wide: bool) -> tuple[Any, ...]:
    """Integers as three of 32 bits, whose signs are the last one's."""
    bits, x = 2**22 - 1, x if x.dtype.itemsize >= 4 else x.astype("int32")
    parts = x & bits, (x >> 22) & bits, x >> 44 if wide else (x < 0) * -1
    return tuple(part.astype("int32") for part in parts)


@dataclass(frozen=True, eq=False, repr=False)
class LengthMask(Mask):
    """Key j is visible where ``j < kv_length`` of its batch entry, and to query i where ``i < query_length``.

    Args:
        kv_lengths: integers ``[batch...]``.
        query_lengths: integers ``[batch...]``; None for queries of full length.

    Raises:
        TypeError: in a call, lengths that are no integers.
        ShapeError: in a call, lengths that do not fit the batch axes of the query.

    Examples:
        >>> import numpy as np
        >>> LengthMask(np.array([2, 1])).to_array(1, 3).tolist()
        [[[[True, True, False]]], [[[True, False, False]]]]
    """

    kv_lengths: Array
    query_lengths: Array | None = None
    _arrays = ("kv_lengths",)
    _axes: ClassVar = {"kv_lengths": ("batch",), "query_lengths": ("batch",)}

    def lower(self, to: Lowering) -> Expression:
        keys = "<", to.position(-1), to.given(self, "kv_lengths")
        if self.query_lengths is None:
            return keys
        return "&", keys, ("<", to.position(-2), to.given(self, "query_lengths"))

    def within_32_bits(self, is_wide: Callable[[Any], bool]) -> Mask:
        """No array is longer than 32 bits can tell."""
        lengths: Any = self.kv_lengths, self.query_lengths
        return LengthMask(*(x.clip(max=2**31 - 1).astype("int32") if is_wide(x) else x for x in lengths))


@dataclass(frozen=True, eq=False, repr=False)
class _Dense(Mask):
    """A dense mask beside others: any dtype, broadcastable like `mask`."""

    array: Array
    _axes: ClassVar = {"array": PAIRS}

    def __repr__(self) -> str:
        return shown(self.array)

    def lower(self, to: Lowering) -> Expression:
        return "array", to.add(self.array)


@dataclass(frozen=True, eq=False, repr=False)
class _Not(Mask):
    mask: Mask

    def __repr__(self) -> str:
        return f"~({self.mask})" if isinstance(self.mask, _Join) else f"~{self.mask}"

    def lower(self, to: Lowering) -> Expression:
        return "~", self.mask.lower(to)


@dataclass(frozen=True, eq=False, repr=False)
class _Join(Mask):
    how: str
    one: Mask
    two: Mask

    def __repr__(self) -> str:
        parts = (self.one, self.two)
        return f" {self.how} ".join(
            f"({part})" if isinstance(part, _Join) and part.how != self.how else repr(part) for part in parts
        )

    def lower(self, to: Lowering) -> Expression:
        return self.how, self.one.lower(to), self.two.lower(to)

    def ranges(self, start: int, stop: int, kv_length: int) -> tuple[Sizes, Sizes]:
        (one, sure), (two, surely) = (mask.ranges(start, stop, kv_length) for mask in (self.one, self.two))
        if self.how == "|":
            return (min(one[0], two[0]), max(one[1], two[1])), max(sure, surely, key=lambda ends: ends[1] - ends[0])
        last = min(one[1], two[1])
        return (min(max(one[0], two[0]), last), last), (max(sure[0], surely[0]), min(sure[1], surely[1]))


def as_mask(x: Any) -> Any:
    """A dense mask as one by rule, so that they mix; None stays."""
    if x is None or isinstance(x, Mask):
        return x
    if isinstance(x, type) or not (isinstance(x, bool) or hasattr(x, "shape") or hasattr(x, "__jax_array__")):
        made = f"{x.__name__}(...)" if isinstance(x, type) else "an array, as numpy.asarray makes it"
        got = f"the class {x.__name__}" if isinstance(x, type) else f"a {type(x).__name__}"
        raise TypeError(f"a mask by rule joins other masks and arrays, got {got}: pass {made}")
    return _Dense(x)


def conjunction(mask: Any) -> list[Any]:
    """The masks by rule and the arrays of which a mask is the logical and; nothing of None."""
    if mask is None:
        return []
    if isinstance(mask, _Join) and mask.how == "&":
        return conjunction(mask.one) + conjunction(mask.two)
    return [mask.array if isinstance(mask, _Dense) else mask]
