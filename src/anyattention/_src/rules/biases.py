"""Biases by rule: what they are made of, how they are joined, and which terms they become."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from anyattention._src import dtypes
from anyattention._src.errors import ShapeError
from anyattention._src.interfaces import Arrays
from anyattention._src.rules.by_rule import PAIRS, AnyArray, ByRule, shown
from anyattention._src.rules.functions import check_function
from anyattention._src.rules.lowering import Lowering
from anyattention._src.rules.masks import Mask
from anyattention._src.rules.terms import Term, numbers_of, sum_of_terms, thresholds

Array = Any


@dataclass(frozen=True, eq=False, repr=False)
class Bias(ByRule):
    """A bias by rule, which is passed as ``bias=`` and joined by ``+`` with others and with arrays."""

    kind: ClassVar[str] = "bias"
    _joint: ClassVar[str] = "bias + other"

    def terms(self, to: Lowering) -> tuple[Term, ...]:
        """What is added to the logits, over operands and parameters that are added to `to`."""
        raise NotImplementedError

    def dense(self) -> list[Array]:
        """The arrays among what is added."""
        return []

    def __add__(self, other: "Bias | AnyArray | None") -> "Bias":
        """None, and the zero that `sum` starts with, are no bias."""
        if other is None or (isinstance(other, int) and other == 0):
            return self
        return _Sum((*_parts(self), *_parts(other)))

    __radd__ = __add__

    def dtype(self, arrays: Arrays, dtype: str) -> str:
        """The dtype of logits of this dtype with the bias: that of its numbers if they are wider."""
        names = [arrays.dtype_name(x) for x in self.arrays()]
        return reduce(dtypes.promote, [name for name in names if dtypes.is_inexact(name)], dtype)

    def to_array(self, q_length: int, kv_length: int) -> Array:
        """The bias expanded, ``[batch..., num_heads or 1, q_length, kv_length]``, float32 or wider.

        Of the library of its arrays; NumPy's without any.

        Examples:
            >>> import numpy as np
            >>> Alibi(np.array([0.5, 2.0])).to_array(2, 3).tolist()
            [[[0.0, 0.5, 1.0], [-0.5, 0.0, 0.5]], [[0.0, 2.0, 4.0], [-2.0, 0.0, 2.0]]]
        """
        backend, bias, like = self._home(self)
        arrays, lengths = backend.arrays, (q_length, kv_length)
        to = Lowering(arrays, None, lengths, like)
        terms = bias.terms(to)
        dtype = bias.dtype(arrays, "float32")
        full = arrays.run(like, sum_of_terms, backend, terms, to.operands, to.parameters, dtype)
        return backend.xp.broadcast_to(full, (*full.shape[:-2], *lengths))


@dataclass(frozen=True, eq=False, repr=False)
class Alibi(Bias):
    """Linear in the distance: ``slope * (j - i - offset)`` for key j and query i, with a slope for each head.

    Source: Press et al., Train short, test long: attention with linear biases enables input length extrapolation
    (2021), where keys are never ahead of their query.

    Args:
        slopes: numbers ``[num_heads]``.
        symmetric: ``-slope * abs(j - i - offset)``, for queries that see keys ahead of them.
        offset: the position of the first query among the keys, as `masks.CausalMask` takes it.

    Raises:
        TypeError: slopes that are no array of real numbers, or an offset that is no integer and no array of integers.
        ShapeError: in a call, slopes that are not one for each head, or an offset that does not fit the batch.

    Examples:
        >>> import numpy as np
        >>> Alibi(np.array([0.5]), symmetric=True).to_array(2, 3).tolist()
        [[[0.0, -0.5, -1.0], [-0.5, 0.0, -0.5]]]
    """

    slopes: Array
    symmetric: bool = False
    offset: int | Array = 0
    _arrays, _offsets = ("slopes",), ("offset",)
    _axes: ClassVar = {"slopes": ("heads",), "offset": ("batch",)}

    def terms(self, to: Lowering) -> tuple[Term, ...]:
        slopes = to.parameter(self, "slopes", "[num_heads]")
        rows, columns = to.position(-2, 0, self), to.position(-1)
        reach = to.reach
        if reach is not None:
            reach = (reach[0] - self.offset, reach[1] - self.offset) if isinstance(self.offset, int) else None
        return (("alibi", rows, columns, slopes, self.symmetric, reach),)


@dataclass(frozen=True, eq=False, repr=False)
class Relative(Bias):
    """A number for each head and bucket of the distance ``j - i - offset`` of key j from query i, as in T5.

    Half of the buckets, of each direction if `bidirectional`, hold one distance each; the others hold ranges that grow
    in proportion to the distance, up to `max_distance`, and the last all beyond. If not `bidirectional`, keys ahead of
    their query share the bucket of distance zero.

    Source: Raffel et al., Exploring the limits of transfer learning with a unified text-to-text transformer (2020).

    Args:
        table: numbers ``[num_buckets, num_heads]``.
        bidirectional: whether keys ahead have buckets of their own, the second half.
        max_distance: the distance from which on all share the last bucket.
        offset: the position of the first query among the keys, as `masks.CausalMask` takes it.

    Raises:
        TypeError: a table that is no array of real numbers, or an offset that is no integer and no array of integers.
        ValueError: a `max_distance` within the distances that have buckets of their own.
        ShapeError: in a call, a table without a column for each head or with too few rows, or an offset that does not
            fit the batch.

    Examples:
        >>> import numpy as np
        >>> Relative(np.arange(4.0)[:, None], bidirectional=False, max_distance=8).to_array(1, 3).tolist()
        [[[0.0, 0.0, 0.0]]]
        >>> Relative(np.arange(4.0)[:, None], bidirectional=False, max_distance=8, offset=9).to_array(1, 9).tolist()
        [[[3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 1.0]]]
    """

    table: Array
    bidirectional: bool = True
    max_distance: int = 128
    offset: int | Array = 0
    _arrays, _integers, _offsets = ("table",), ("max_distance",), ("offset",)
    _axes: ClassVar = {"table": ("buckets", "heads"), "offset": ("batch",)}

    def terms(self, to: Lowering) -> tuple[Term, ...]:
        table = to.parameter(self, "table", "[num_buckets, num_heads]")
        count, rows, columns = self.table.shape[0], to.position(-2, 0, self), to.position(-1)
        one_way = count // 2 if self.bidirectional else count
        if one_way < 2 or one_way * (2 if self.bidirectional else 1) != count:
            need = "an even number of at least 4" if self.bidirectional else "at least 2"
            raise ShapeError(f"table of {self} has shape {tuple(self.table.shape)}, but needs {need} buckets")
        if self.max_distance <= one_way // 2:
            own = f"{one_way // 2}, the number of distances that have a bucket of their own"
            raise ValueError(f"max_distance of {self} must be more than {own}")
        return (("relative", rows, columns, table, self.bidirectional, thresholds(one_way, self.max_distance)),)


@dataclass(frozen=True, eq=False, repr=False)
class Rule(Bias):
    """What a function makes of positions, and of arrays that queries and keys have.

    The function is called as that of `masks.Rule` is, with arrays in float32 or wider.

    Args:
        function: ``function(i, j, *query_arrays, *key_arrays)``, which returns numbers that can be broadcast to
            ``[batch..., num_heads, rows, columns]``.
        query_arrays: a tuple of arrays ``[batch..., q_length]``.
        key_arrays: a tuple of arrays ``[batch..., kv_length]``.

    Raises:
        TypeError: no function, or no tuples of arrays; in a call, a function that returns no array of real numbers.
        ShapeError: in a call, arrays of another length or batch, or a result of another shape.

    Examples:
        >>> Rule(lambda i, j: 0.5 * (j - i)).to_array(2, 3).tolist()
        [[0.0, 0.5, 1.0], [-0.5, 0.0, 0.5]]
    """

    function: Callable[..., Array]
    query_arrays: tuple[Array, ...] = ()
    key_arrays: tuple[Array, ...] = ()
    _axes: ClassVar = {"query_arrays": ("batch", "rows"), "key_arrays": ("batch", "columns")}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_function(self)

    def terms(self, to: Lowering) -> tuple[Term, ...]:
        rows, columns = to.position(-2), to.position(-1)
        numbers = *to.along(self, "query_arrays", -2), *to.along(self, "key_arrays", -1)
        heads = self._heads(to, (rows, columns, *numbers))
        return (("rule", self.function, rows, columns, numbers, heads, to.head_axes),)

    def _heads(self, to: Lowering, numbers: tuple[int, ...]) -> int | None:
        """An operand that tells the heads of a tile, if the function makes something else for each."""
        first, whole = to.head, to.heads if to.whole_heads is None else to.whole_heads
        found = numbers_of(to.arrays, self.function, [to.operands[n][..., :1, :1] for n in numbers], whole)
        if found.ndim < 3 or found.shape[-3] == 1:
            return None
        count = found.shape[-3] if to.heads is None else to.heads
        heads = to.arrays.xp.arange(count, dtype=to.arrays.xp.int32, **to.arrays.beside(to.like)) + first
        return to.add(heads[:, None, None])


@dataclass(frozen=True, eq=False, repr=False)
class _Dense(Bias):
    """A dense bias beside others, broadcastable like `bias`."""

    array: Array
    _axes: ClassVar = {"array": PAIRS}

    def __repr__(self) -> str:
        return shown(self.array)

    def terms(self, to: Lowering) -> tuple[Term, ...]:
        return (("array", to.differentiated(self.array)),)

    def dense(self) -> list[Array]:
        return [self.array]


@dataclass(frozen=True, eq=False, repr=False)
class _Sum(Bias):
    """Several biases."""

    parts: tuple[Bias, ...]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    def terms(self, to: Lowering) -> tuple[Term, ...]:
        return tuple([term for part in self.parts for term in part.terms(to)])

    def dense(self) -> list[Array]:
        return [x for part in self.parts for x in part.dense()]


def _parts(x: Any) -> tuple[Bias, ...]:
    if isinstance(x, Bias):
        return x.parts if isinstance(x, _Sum) else (x,)
    if isinstance(x, Mask):
        raise TypeError(f"a bias by rule joins other biases and arrays, got the mask by rule {x}: pass it as mask=")
    if isinstance(x, type) or not (hasattr(x, "shape") or hasattr(x, "__jax_array__")):
        got = f"the class {x.__name__}" if isinstance(x, type) else f"a {type(x).__name__}"
        raise TypeError(f"a bias by rule joins other biases and arrays, got {got}: pass an array")
    return (_Dense(x),)


def as_bias(x: Any) -> Any:
    """A dense bias as one by rule; None stays."""
    return x if x is None or isinstance(x, Bias) else _Dense(x)
