"""What masks by rule become in a call: comparisons of what its queries know with what its keys know."""

import operator
from collections.abc import Sequence
from typing import Any

from anyattention._src.blocks import Sizes
from anyattention._src.errors import ShapeError
from anyattention._src.interfaces import Arrays, is_floating, unknown
from anyattention._src.positions import positions
from anyattention._src.rules.by_rule import shown

Array = Any
# A mask in terms of arrays by their numbers: ("array", i), ("<=", i, j), ("function", function, i, j, ...),
# ("&", expression, expression), ...
Expression = tuple[Any, ...]
Batch = tuple[Any, ...] | None  # axes; None where there is no query to have any
_COMPARE = {"<=": operator.le, "<": operator.lt, "==": operator.eq}
_SHORT = ("int8", "int16", "uint8", "uint16")
_FAR = 2**30 + 2**28  # beyond 2^29 by more than any length; both together are less than 2^31
_JOIN = {"&": operator.and_, "|": operator.or_}


def visible(arrays: Arrays, expression: Expression, operands: Sequence[Array]) -> Array:
    """Where the mask is truthy: bool, of the broadcast shape of the operands, which may be those of a tile."""
    name, *parts = expression
    if name == "array":
        return arrays.truth(operands[parts[0]])
    if name in _COMPARE:
        return _COMPARE[name](*(operands[i] for i in parts))
    if name == "function":
        return arrays.truth(called(arrays, parts[0], [operands[i] for i in parts[1:]]))
    if name == "~":
        return arrays.xp.logical_not(visible(arrays, parts[0], operands))
    return _JOIN[name](*(visible(arrays, part, operands) for part in parts))


def called(arrays: Arrays, function: Any, given: Sequence[Array], whole: Sequence[Any] | None = None) -> Array:
    """The result of a function of a rule, with as many axes as `whole`, to which it can be broadcast.

    That is the shape of all that the function is given, ``[..., rows, columns]``, unless it may have more.

    Raises:
        TypeError, ShapeError: a result that is no array, or of another shape.
    """
    whole = joint_shape(given) if whole is None else whole
    x = function(*given)
    if isinstance(x, bool | int | float) or type(x).__module__ == "numpy":
        numbers = (y for y in given if is_floating(arrays, y))  # of positions alone a float would have no dtype
        x = arrays.adopt(x, next(numbers, arrays.cast(given[0], "float32")))
    if not hasattr(x, "shape"):
        raise TypeError(f"the function {shown(function)} of a rule must return an array, got {x!r}")
    shape, rank = tuple(x.shape), len(whole)
    if len(shape) > rank and all(size == 1 for size in shape[: len(shape) - rank]):  # of one head, or one batch entry
        shape = shape[len(shape) - rank :]
        x = arrays.xp.reshape(x, shape)
    if not _fits(shape, whole):
        raise ShapeError(
            f"the function {shown(function)} of a rule returned shape {shape}, but needs one that can be broadcast to "
            f"[..., rows, columns], here {tuple(whole)}: pass arrays that it needs as query_arrays or key_arrays"
        )
    return x if len(shape) == rank else arrays.xp.reshape(x, (1,) * (rank - len(shape)) + shape)


def joint_shape(arrays: Sequence[Array], rank: int = 0) -> list[Any]:
    """The shape to which all of these can be broadcast, of `rank` axes at least; sizes may be unknown."""
    rank = max(rank, *(x.ndim for x in arrays))
    shapes = [(1,) * (rank - x.ndim) + tuple(x.shape) for x in arrays]
    return [next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes, strict=True)]


def _fits(shape: Sequence[Any], whole: Sequence[Any]) -> bool:
    """Whether a shape can be broadcast to another, as far as sizes are known."""
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(a in (1, b) or unknown(a) or unknown(b) for a, b in pairs)


def signed(arrays: Arrays, x: Array, lengths: bool, unlike: bool = False) -> Array:
    """Unsigned integers as signed ones, beside which not every library compares them.

    Of lengths, those that become negative are as long as can be. Of ids, where the others are `unlike`, signed or not,
    they become -1, and what was negative before -2: neither is equal to any.
    """
    name, where = arrays.dtype_name(x), arrays.xp.where
    if name not in ("uint16", "uint32", "uint64"):
        return where(x < 0, -2, x) if unlike and name.startswith("int") else x
    bits = 64 if name == "uint64" or (name == "uint32" and not lengths and not arrays.narrow) else 32
    x = arrays.cast(x, f"int{bits}")
    if name != f"uint{bits}" or not (lengths or unlike):
        return x
    return where(x < 0, 2 ** (bits - 1) - 1 if lengths else -1, x)


def short(arrays: Arrays, lengths: Array) -> Array:
    """Lengths in int32, as kernels take them; those beyond are as long as can be."""
    x = signed(arrays, lengths, lengths=True)
    x = arrays.xp.clip(x, -1, 2**31 - 1) if arrays.dtype_name(x) == "int64" else x
    return arrays.cast(x, "int32")


class Lowering:
    """The call that a rule is lowered for, and its operands, ``[batch..., 1, q_length or 1, kv_length or 1]``.

    Of biases also the parameters, which are numbers of heads, ``[num_heads, *, 1]``.

    `like` is the query; it and `key` are counted where lengths are known at run time only. `origin` is the position of
    the call's first query and key in the whole, of which the call may be a shard, after that of its batch axes and
    heads if it has some of these. `heads` is their number, None where that is not known, and `whole_heads` that of the
    whole; `head_axes` are two in a block of grouped heads.
    """

    def __init__(
        self,
        arrays: Arrays,
        batch: Batch,
        lengths: Sizes,
        like: Any,
        origin: Any = None,
        key: Any = None,
        heads: int | None = None,
        head_axes: int = 1,
        whole_heads: int | None = None,
    ) -> None:
        self.arrays, self.batch, self.lengths, self.like, self.key = arrays, batch, lengths, like, key
        self.origin, self.heads, self.head_axes = origin or (0, 0), heads, head_axes
        self.head, self.whole_heads = next(iter(self.origin[-3:-2]), 0), whole_heads
        #: Between which numbers ``j - i`` is for all keys j that some query i may see; None where that is not known.
        self.reach: tuple[int, int] | None = None
        self.operands: list[Array] = []
        self.parameters: list[Array] = []
        #: Of each array of the rule, in order, what it has become, ("operands" or "parameters", number); None of
        #: integers, which have no gradient.
        self.sources: list[tuple[str, int] | None] = []

    def add(self, x: Array) -> int:
        """The number of an operand in expressions."""
        self.operands.append(x)
        return len(self.operands) - 1

    def differentiated(self, x: Array) -> int:
        """The same of one of the rule's arrays."""
        self.sources.append(("operands", len(self.operands)) if is_floating(self.arrays, x) else None)
        return self.add(x)

    def parameter(self, rule: Any, name: str, axes: str) -> int:
        """The number of a parameter, from an array ``[num_heads]`` or ``[*, num_heads]``."""
        x, xp = getattr(rule, name), self.arrays.xp
        shape = tuple(x.shape)
        if not is_floating(self.arrays, x) and not self.arrays.dtype_name(x).startswith(("int", "uint")):
            raise TypeError(f"{name} of {rule} must be real numbers, got {self.arrays.dtype_name(x)}")
        if len(shape) != axes.count(",") + 1 or shape[-1] != (shape[-1] if self.heads is None else self.heads):
            need = f"{axes}, with num_heads {self.heads}" if self.heads is not None else axes
            raise ShapeError(f"{name} of {rule} has shape {shape}, but needs {need}")
        self.sources.append(("parameters", len(self.parameters)) if is_floating(self.arrays, x) else None)
        self.parameters.append(x[:, None, None] if len(shape) == 1 else xp.permute_dims(x, (1, 0))[..., None])
        return len(self.parameters) - 1

    def position(self, axis: int, offset: int = 0, band: Any = None) -> int:
        """Positions in the whole of queries (axis -2) or keys (-1), int32, plus an offset, and that of a `band`."""
        length, first, xp = self.lengths[axis], self.origin[axis], self.arrays.xp
        more = None if band is None or isinstance(band.offset, int) else self._numbers(band, "offset", offset=True)
        if more is not None:
            self.sources.append(None)
        elif band is not None:
            offset += band.offset
        if unknown(length):
            x = positions(self.arrays, self.like if axis == -2 else self.key, axis=-3)
            x = xp.expand_dims(x, axis=-1 if axis == -2 else -2)
            x = x + min(max(offset, -(2**30)), 2**30) if offset else x
            return self.add(x if more is None else x + more)
        if isinstance(first, int) and more is None:
            start = offset + first
            start = start if abs(start) < 2**30 else min(max(start, -(2**31)), 2**31 - length)  # sees all or nothing
        else:  # known at run time only, and added to the rest in int32
            start = min(max(offset, -_FAR), _FAR - length)
        x = xp.arange(start, start + length, dtype=xp.int32, **self.arrays.beside(self.like))
        x = x if isinstance(first, int) and more is None else x + first
        x = xp.reshape(x, (length, 1) if axis == -2 else (1, length))
        return self.add(x if more is None else x + more)

    def given(self, mask: Any, name: str, axis: int | None = None, unlike: bool = False) -> int:
        """Numbers that a mask has, ``[batch...]``, or ids ``[batch..., length]`` of queries (axis -2) or keys (-1)."""
        return self.add(self._numbers(mask, name, axis, unlike))

    def along(self, rule: Any, name: str, axis: int) -> tuple[int, ...]:
        """The arrays of a rule, ``[batch..., length]``, that queries (axis -2) or keys (-1) have, of any dtype."""
        found = []
        for n, x in enumerate(getattr(rule, name)):
            x = x if hasattr(x, "shape") else self.arrays.adopt(x, self.like)
            shape = self._shape(f"{name}[{n}] of {rule}", x, axis)
            found.append(self.differentiated(self.arrays.xp.reshape(x, shape)))
        return tuple(found)

    def _numbers(
        self, mask: Any, name: str, axis: int | None = None, unlike: bool = False, offset: bool = False
    ) -> Array:
        x = getattr(mask, name)
        x = x if hasattr(x, "shape") else self.arrays.adopt(x, self.like)  # an integer is one for all batch entries
        if not (kind := self.arrays.dtype_name(x)).startswith(("int", "uint")):
            raise TypeError(f"{name} of {mask} must be integers, got {kind}")
        shape = self._shape(f"{name} of {mask}", x, axis)
        x = signed(self.arrays, x, axis is None, unlike)
        if offset:  # to be added to positions; beyond 2^29 a query sees all or nothing
            x = self.arrays.cast(x if kind in _SHORT else self.arrays.xp.clip(x, -(2**29), 2**29), "int32")
        return self.arrays.xp.reshape(x, shape)

    def _shape(self, what: str, x: Array, axis: int | None) -> tuple[Any, ...]:
        """Of an array ``[batch...]``, or ``[batch..., length]`` along an axis, as an operand."""
        batch, sizes = tuple(x.shape), (1, 1)
        if axis is not None:
            length = self.lengths[axis]
            if not batch or not (batch[-1] == length or unknown(batch[-1]) or unknown(length)):
                which = "q_length" if axis == -2 else "kv_length"
                raise ShapeError(f"{what} has shape {batch}, but {which} is {length}")
            batch, sizes = batch[:-1], (length, 1) if axis == -2 else (1, length)
        if self.batch is not None and not _fits(batch, self.batch):
            where = f"the batch axes {self.batch} of query"
            raise ShapeError(f"{what} has shape {tuple(x.shape)}, which does not fit {where}")
        return (*batch, 1, *sizes)
