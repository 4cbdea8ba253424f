"""Masks by rule: what they are made of, how they are joined, and which expressions they become."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

from anyattention._src.blocks import Sizes
from anyattention._src.lowering import Expression, Lowering, visible

Array = Any


class AnyArray(Protocol):
    """An array of any library, as type checkers see it."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


class Convertible(Protocol):  # what JAX takes for an array, such as a parameter of Flax
    def __jax_array__(self) -> Any: ...


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """A mask by rule, which is passed as ``mask=`` and joined by ``&``, ``|`` and ``~`` with others and with arrays.

    Subclasses say what queries know, what keys know, and what is compared.
    """

    #: Set by the registry, which stands above: what finds the library of arrays, what makes them this library's, and
    #: what hears of each class of masks when one is made.
    _home: ClassVar[Callable[..., Any]]
    _made: ClassVar[Callable[[type], None]]
    #: The fields that are integers, and those that are arrays of integers.
    _integers: ClassVar[tuple[str, ...]] = ()
    _arrays: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        Mask._made(type(self))
        for name in self._integers:
            if not isinstance(x := getattr(self, name), int):
                kind = type(x).__name__
                raise TypeError(f"{name} must be a Python integer, known when the mask is made, got {kind}")
        for name in self._arrays:
            if (x := getattr(self, name)) is None or isinstance(x, str | type | Mask):
                raise TypeError(f"{name} of {type(self).__name__} must be an array of integers, got {x!r}")

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
    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to us

    def __invert__(self) -> "Mask":
        return _Not(self)

    def __repr__(self) -> str:
        values = [getattr(self, field.name) for field in fields(self)]
        while len(values) > 1 and values[-1] is None:
            values.pop()
        return f"{type(self).__name__}({', '.join(map(_shown, values))})"

    def _identity(self) -> tuple[Any, ...]:
        """What is equal in equal masks: numbers by value, arrays by identity."""
        values = (getattr(self, field.name) for field in fields(self))
        return type(self), *(x if x is None or isinstance(x, int | float | str | Mask) else id(x) for x in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self} is no array: write `mask & other` to join it with another mask, or expand it with "
            "to_array(q_length, kv_length)"
        )

    __array__ = __bool__ = __len__ = __iter__ = _refuse
    ndim = property(_refuse)  # asked for by Flax's combine_masks, as in its decode path

    def arrays(self) -> list[Array]:
        """The arrays that the mask was made from."""
        found: list[Array] = []

        def take(x: Array) -> Array:
            found.append(x)
            return x

        self.with_arrays(take)
        return found

    def with_arrays(self, function: Callable[[Array], Array], dense: Callable[[Array], Array] | None = None) -> "Mask":
        """The mask with the function applied to each of its arrays; to lengths and ids given as lists too.

        `dense`, where given, is for dense masks instead.
        """
        if self._integers:  # and nothing else: all that is below takes 5 us
            return self
        changed = {}
        for name in [field.name for field in fields(self)]:  # not `vars`, which PyTorch 2.11 cannot compile
            x = getattr(self, name)
            if isinstance(x, Mask):
                y: Any = x.with_arrays(function, dense)
            elif isinstance(self, _Array):
                y = (dense or function)(x)
            else:
                y = x if x is None or isinstance(x, int | str) else function(x)
            if y is not x:
                changed[name] = y
        return replace(self, **changed) if changed else self

    def within_32_bits(self, is_wide: Callable[[Any], bool]) -> "Mask":
        """The same without integers beyond 32 bits, of which `is_wide` tells the arrays that have some."""
        parts = {name: x.within_32_bits(is_wide) for name, x in vars(self).items() if isinstance(x, Mask)}
        return replace(self, **parts) if parts else self

    def to_array(self, q_length: int, kv_length: int) -> Array:
        """The mask expanded: bool, ``[batch..., 1, q_length, kv_length]``, or the last two where there is no batch.

        Of the library of its ids or lengths; NumPy's without any.

        Examples:
            >>> CausalMask().to_array(2, 3).tolist()
            [[True, False, False], [True, True, False]]
        """
        backend, mask, like = Mask._home(self)
        lengths = q_length, kv_length
        to = Lowering(backend.arrays, None, lengths, like)
        full = backend.arrays.run(like, visible, backend.arrays, mask.lower(to), to.operands)
        sizes = (length if size == 1 else size for size, length in zip(full.shape[-2:], lengths, strict=True))
        return backend.arrays.xp.broadcast_to(full, (*full.shape[:-2], *sizes))


@dataclass(frozen=True, eq=False, repr=False)
class CausalMask(Mask):
    """Key j is visible to query i where ``j <= i + offset``.

    Args:
        offset: a Python integer; for a query that follows a cache, the number of keys before it.

    Raises:
        TypeError: an offset that is no Python integer.

    Examples:
        >>> CausalMask(1).to_array(2, 4).tolist()
        [[True, True, False, False], [True, True, True, False]]
    """

    offset: int = 0
    _integers = ("offset",)

    def lower(self, to: Lowering) -> Expression:
        return "<=", to.position(-1), to.position(-2, self.offset)

    def ranges(self, start: int, stop: int, kv_length: int) -> tuple[Sizes, Sizes]:
        seen, sure = (min(max(row + self.offset, 0), kv_length) for row in (stop, start + 1))
        return (0, seen), (0, sure)


@dataclass(frozen=True, eq=False, repr=False)
class LocalMask(Mask):
    """Key j is visible to query i where ``i - left <= j <= i + right``.

    Args:
        left: a Python integer: how many keys before its own position a query sees.
        right: a Python integer: how many keys behind it.

    Raises:
        TypeError: bounds that are no Python integers.

    Examples:
        >>> LocalMask(1, 0).to_array(3, 3).tolist()
        [[True, False, False], [True, True, False], [False, True, True]]
    """

    left: int
    right: int
    _integers = ("left", "right")

    def lower(self, to: Lowering) -> Expression:
        column = to.position(-1)
        return "&", ("<=", to.position(-2, -self.left), column), ("<=", column, to.position(-2, self.right))

    def ranges(self, start: int, stop: int, kv_length: int) -> tuple[Sizes, Sizes]:
        seen, sure = (min(max(row + self.right, 0), kv_length) for row in (stop, start + 1))
        return (min(max(start - self.left, 0), seen), seen), (max(stop - 1 - self.left, 0), sure)


@dataclass(frozen=True, eq=False, repr=False)
class SegmentMask(Mask):
    """Key j is visible to query i where their ids are equal, as of sequences that are packed into one.

    Args:
        query_ids: integers ``[batch..., q_length]``.
        kv_ids: integers ``[batch..., kv_length]``.

    Examples:
        >>> import numpy as np
        >>> ids = np.array([0, 0, 1])
        >>> SegmentMask(ids, ids).to_array(3, 3)[0].tolist()
        [[True, True, False], [True, True, False], [False, False, True]]
    """

    query_ids: Array
    kv_ids: Array
    _arrays = ("query_ids", "kv_ids")

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

    Examples:
        >>> import numpy as np
        >>> LengthMask(np.array([2, 1])).to_array(1, 3).tolist()
        [[[[True, True, False]]], [[[True, False, False]]]]
    """

    kv_lengths: Array
    query_lengths: Array | None = None
    _arrays = ("kv_lengths",)

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
class _Array(Mask):
    """A dense mask beside others: any dtype, broadcastable like `mask`."""

    array: Array

    def __repr__(self) -> str:
        return _shown(self.array)

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


def _shown(x: Any) -> str:
    return f"array{tuple(x.shape)}" if hasattr(x, "shape") else repr(x)


def as_mask(x: Any) -> Any:
    """A dense mask as one by rule, so that they mix; None stays."""
    if x is None or isinstance(x, Mask):
        return x
    if isinstance(x, type) or not (isinstance(x, bool) or hasattr(x, "shape") or hasattr(x, "__jax_array__")):
        made = f"{x.__name__}(...)" if isinstance(x, type) else "an array, as numpy.asarray makes it"
        got = f"the class {x.__name__}" if isinstance(x, type) else f"a {type(x).__name__}"
        raise TypeError(f"a mask by rule joins other masks and arrays, got {got}: pass {made}")
    return _Array(x)


def conjunction(mask: Any) -> list[Any]:
    """The masks by rule and the arrays of which a mask is the logical and; nothing of None."""
    if mask is None:
        return []
    if isinstance(mask, _Join) and mask.how == "&":
        return conjunction(mask.one) + conjunction(mask.two)
    return [mask.array if isinstance(mask, _Array) else mask]
