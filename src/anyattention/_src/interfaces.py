"""What attention needs of an array library: three small interfaces, in terms of the array API standard alone.

`Arrays` makes, casts and places arrays, `Steps` are those of the exact implementation, and `Tiles` are the products,
row statistics and loops of the tiled one. Their defaults serve every conforming library. A library that needs something
else has a folder in ``anyattention_backends``, with a file for each interface that it changes.
"""

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat

from anyattention._src import dtypes, threefry
from anyattention._src.blocks import Block, Group, Sizes, cut_columns, cut_group, cut_rows_of, tree_map

Array = Any
Function = Callable[..., Any]
Pair = tuple[Any, Any]
OfTiles = Callable[[tuple[Block, ...]], Pair]
Step = Callable[[Any, Block], Pair]

# The products of attention, each with the axes (counted from the end) that make it a matrix product:
# left [..., rows, summed], right [..., summed, columns], then the axes of that product in the order of the result;
# None where they stand in order already. `g` counts the query heads that share a key head; keys and values have one.
Axes = tuple[int, ...] | None
QUERY_KEY, WEIGHTS_VALUE = "...qhd,...khd->...hqk", "...hqk,...khd->...qhd"
GROUPED_QUERY_KEY, GROUPED_WEIGHTS_VALUE = "...qhgd,...khgd->...hgqk", "...hgqk,...khgd->...qhgd"
PRODUCTS: dict[str, tuple[Axes, Axes, Axes]] = {
    QUERY_KEY: ((-2, -3, -1), (-2, -1, -3), None),
    WEIGHTS_VALUE: (None, (-2, -3, -1), (-2, -3, -1)),
    GROUPED_QUERY_KEY: ((-3, -2, -4, -1), (-3, -2, -1, -4), None),
    GROUPED_WEIGHTS_VALUE: (None, (-3, -2, -4, -1), (-2, -4, -3, -1)),
}


def unknown(size: Any) -> bool:
    """Whether a size is known at run time only: ndonnx says None, Dask NaN."""
    return size is None or size != size


def _order(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The permutation that moves the last axes so, and leaves those before them."""
    return (*range(rank - len(axes)), *(rank + axis for axis in axes))


_ORDERS = {(x, rank): _order(x, rank) for axes in PRODUCTS.values() for x in axes if x for rank in range(len(x), 8)}


class Arrays:
    """The arrays of a library: how they are made, cast, promoted and placed. Dtypes go by name."""

    guests: tuple[type, ...] = ()
    """Types of another library that come as guests."""
    narrow = False
    """Whether the library itself keeps scalars and integers to 32 bits, unless told otherwise."""
    checks_devices = False
    """Whether a call is to look for arrays on several devices, of which the library's own error names no argument."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.name = xp.__name__.removeprefix("array_api_compat.").partition(".")[0]

    def platform(self, x: Array) -> str:
        """Where calls with this array run: "cpu", "cuda", ..."""
        return "cpu"

    def run(self, like: Array, function: Function, /, *args: Any) -> Any:
        """Call an implementation, for arrays such as `like`, under whatever settings this library needs around it.

        NumPy, which may stand beneath it, is not to warn of infinities, which are results here.
        """
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return function(*args)
        with numpy.errstate(all="ignore"):
            return function(*args)

    def outline(self, function: Function, arguments: dict[str, Any]) -> Any:
        """``function(**arguments)``, of which some may be shapes that stand for arrays, where the library has such."""
        return function(**arguments)

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """An array of this library, on the device of `like`, from a scalar, a NumPy array or a nested list.

        A Python float takes the dtype of `like`. An array is in 32 bits where the device has no more.
        """
        if like is not None and type(guest) is float:
            return self.xp.asarray(dtypes.round_to(guest, self.dtype_name(like)), dtype=like.dtype, **self.beside(like))
        beside, name = self.beside(like), dtypes.name_of(getattr(guest, "dtype", ""))
        about = getattr(self.xp, "__array_namespace_info__", None) if beside and name in dtypes.NARROW else None
        if about is not None and name not in about().dtypes(**beside):
            guest = self.run(like, guest.astype, dtypes.NARROW[name])
        return self.xp.asarray(guest, **beside)

    def beside(self, like: Array | None) -> dict[str, Any]:
        """The `device` argument that makes a new array stand beside `like`."""
        return threefry.device_of(like)

    def check_array(self, x: Array, like: Array | None = None) -> Any:
        """An array of this library, or something that stands for one, made plain, where it can meet `like`.

        A mask by rule for something that stands for that. Raise TypeError or ValueError for what cannot be understood.
        """
        return x if like is None or x.shape else place(self, x, like)  # a scalar goes where it is needed

    def own(self, x: Array) -> Array:
        """A copy, which nobody else can change; the array itself where arrays never change."""
        return self.xp.asarray(x, copy=True)

    def adopt_key(self, words: Any) -> Array:
        """A dropout key of this library from two words as `key_data` gives them."""
        return self.adopt(words, None)

    def key_data(self, key: Any) -> Any:
        """A dropout key of this library as something that NumPy reads: two uint32 words."""
        return key

    def dtype_name(self, x: Array) -> str:
        """The name of the array's dtype, "float32" for example."""
        return dtypes.name_of(x.dtype)

    def cast(self, x: Array, name: str) -> Array:
        """The array in the dtype of this name."""
        dtype = getattr(self.xp, name, None)
        if dtype is None:
            raise TypeError(f"{self.name} has no dtype {name}")
        return x if x.dtype == dtype else self.run(x, self.xp.astype, x, dtype)

    def promote(self, arrays: Sequence[Array], dtype: Any = None) -> tuple[list[Array], str]:
        """The arrays in Flax's compute dtype, and its name: by JAX's lattice, or as `dtype` says."""
        kinds = [x.dtype for x in arrays]
        if dtype is None and kinds.count(kinds[0]) == len(kinds):
            name = self.dtype_name(arrays[0])
            if dtypes.is_inexact(name):
                return list(arrays), name
        name = dtypes.compute_dtype(tuple(self.dtype_name(x) for x in arrays), dtype)
        return [self.cast(x, name) for x in arrays], name

    def join(self, x: Array, y: Any) -> tuple[Array, Any]:
        """Both in their common dtype by JAX's lattice. A Python scalar takes the array's dtype, rounded first."""
        if getattr(y, "dtype", None) == x.dtype:
            return x, y
        left, right = self.dtype_name(x), dtypes.PYTHON_SCALARS.get(type(y)) or self.dtype_name(y)
        if left == right:
            return x, y
        name = dtypes.promote(left, right)
        if isinstance(y, bool | int | float):
            return self.cast(x, name), dtypes.round_to(float(y), name)
        return self.cast(x, name), y if isinstance(y, complex) else self.cast(y, name)

    def truth(self, mask: Array) -> Array:
        """Where the mask is truthy: any nonzero, NaN too."""
        return mask if self.dtype_name(mask) == "bool" else mask != 0

    def matmul(self, x: Array, y: Array) -> Array:
        """Matrix product over the last two axes, in one dtype."""
        return self.xp.matmul(x, y)

    def permute_dims(self, x: Array, axes: tuple[int, ...]) -> Array:
        """All axes in this order."""
        return self.xp.permute_dims(x, axes)

    def traced(self, x: Array) -> bool:
        """Whether the array is part of a program that is compiled as a whole."""
        return False

    def inspects(self, x: Array) -> bool:
        """Whether the values of masks can be looked at, as `surely` needs them."""
        return False

    def surely(self, x: Any, value: bool) -> bool:
        """Whether the array is known to hold this value throughout; False where that cannot be known, and of None."""
        return False


def place(arrays: Arrays, x: Array, like: Array) -> Array:
    """The array beside another, on whose device it may not be yet."""
    device = arrays.beside(like).get("device")
    return x if device is None or x.device == device else array_api_compat.to_device(x, device)


def permute(arrays: Arrays, x: Array, axes: Axes) -> Array:
    """The last axes in this order, those before them as they are."""
    if axes is None:
        return x
    return arrays.permute_dims(x, _ORDERS.get((axes, x.ndim)) or _order(axes, x.ndim))


class Steps:
    """The steps of the exact implementation."""

    full_precision = ("default", "high", "highest", "float32", "tensorfloat32", "bfloat16", "bfloat16_3x", "fastest")
    """`precision` values that change nothing here, since products are computed in full precision anyway."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays, self.xp = arrays, arrays.xp

    def scale(self, query: Array, depth: int, dtype: str) -> Array:
        """``query / sqrt(depth)``, the root rounded to the compute dtype."""
        if unknown(depth):
            raise ValueError(f"attention needs a known depth, got the query's shape {tuple(query.shape)}")
        return self.divide_by_scalar(query, depth**0.5, dtype)

    def divide(self, x: Array, y: Array) -> Array:
        """``x / y``; in float16 ``x`` times the rounded reciprocal, which is how XLA divides there."""
        return x * (1.0 / y) if self.arrays.dtype_name(y) == "float16" else x / y

    def divide_by_scalar(self, x: Array, value: Any, dtype: str) -> Array:
        """The same, with a scalar that is first rounded to the dtype of `x`."""
        value = float(value)
        if dtype not in ("float32", "float64"):  # those round a scalar so themselves
            value = dtypes.round_to(value, dtype)
        if dtype == "float16" and value:
            return x * dtypes.round_to(1.0 / value, dtype)
        return x / value

    def contract(self, equation: str, x: Array, y: Array, precision: Any = None, dot_general: Any = None) -> Array:
        """The einsum of a product in `PRODUCTS`, as a matrix product: the standard has no einsum."""
        arrays = self.arrays
        if precision is not None or dot_general is not None:
            self.check_precision(precision, dot_general, x)
        if x.dtype != y.dtype:
            x, y = arrays.join(x, y)
        left, right, result = PRODUCTS[equation]
        x, y = x if left is None else permute(arrays, x, left), permute(arrays, y, right)
        if y.shape[-2] == 1 and x.shape[-1] != 1:
            x = self.xp.sum(x, axis=-1, keepdims=True)  # as einsum: one value serves all the weights
        product = arrays.matmul(x, y)
        return product if result is None else permute(arrays, product, result)

    def check_precision(self, precision: Any, dot_general: Any, x: Array) -> None:
        """Raise where these cannot be honoured for a product with `x`; the classic levels ask for full precision."""
        name = self.arrays.name
        if dot_general:
            raise ValueError(
                f"einsum_dot_general is called as jax.lax.dot_general is, which {name} cannot do: pass "
                "qk_attn_weights_einsum and attn_weights_value_einsum instead"
            )
        for level in precision if isinstance(precision, tuple | list) else (precision,):
            if level is not None and str(getattr(level, "name", level)).lower() not in self.full_precision:
                raise ValueError(
                    f"precision={precision!r} cannot be honoured by {name}, which computes products in the "
                    f"compute dtype; pass None or one of {', '.join(self.full_precision)}"
                )

    def where(self, mask: Array, x: Array, fill: float) -> Array:
        """`x` where the mask is truthy (any nonzero, NaN too), `fill` elsewhere."""
        return self.xp.where(self.arrays.truth(mask), x, fill)

    def lowest(self, dtype: str) -> Any:
        """The finite minimum of a dtype."""
        return dtypes.lowest(dtype)

    def softmax(self, logits: Array) -> Array:
        """Softmax over the last axis, each step rounded to the logits' dtype."""
        xp = self.xp
        if 0 in logits.shape:
            return logits  # the standard has no maximum of nothing
        weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        return self.divide(weights, xp.sum(weights, axis=-1, keepdims=True))

    def keep(self, key: Any, keep_prob: Any, shape: tuple[int, ...], like: Array) -> Array:
        """The dropout mask of this key: True with probability `keep_prob`."""
        if any(map(unknown, shape)):
            raise ValueError(f"dropout needs known lengths, got the weights' shape {shape}: pass deterministic=True")
        return threefry.keep(self.xp, place(self.arrays, key, like), keep_prob, shape)


class Tiles:
    """The products, row statistics and loops of the tiled implementation."""

    power_unit = 1.0
    """What exponents are multiplied by before `power`."""
    most_groups = 2**31
    """Into how many groups of rows a mask by rule may divide the queries; none where lengths may be symbols."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays, self.xp = arrays, arrays.xp

    def sizes(self, block: Block, ruled: bool) -> Sizes:
        """How many queries and keys to take at a time; `ruled` says that rows see different keys by the mask's rule."""
        return 256, 1024

    def transpose(self, x: Array) -> Array:
        """The last two axes swapped."""
        return permute(self.arrays, x, (-1, -2))

    def product(self, x: Array, y: Array, precision: Any = None, scratch: str = "") -> Array:
        """Matrix product over the last two axes, in one dtype.

        Where `scratch` has a name, the next product of that name on this thread may overwrite the result.
        """
        return self.arrays.matmul(x, y)

    def logits(self, query: Array, key: Array, precision: Any, precise: bool) -> Array:
        """The product of each query with each key, to be overwritten by the next; `precise` asks for better sums."""
        return self.product(query, self.transpose(key), precision, scratch="logits")

    def row_max(self, x: Array) -> Array:
        """The largest of each row, ``[..., rows, 1]``."""
        return self.xp.max(x, axis=-1, keepdims=True)

    def row_sum(self, x: Array) -> Array:
        """The sum of each row, ``[..., rows, 1]``."""
        return self.xp.sum(x, axis=-1, keepdims=True)

    def column_sum(self, x: Array) -> Array:
        """The sum of each column, ``[..., 1, columns]``."""
        return self.xp.sum(x, axis=-2, keepdims=True)

    def exp_minus(self, x: Array, shift: Array | None) -> Array:
        """``exp(x - shift)``; may overwrite `x`."""
        return self.xp.exp(x if shift is None else x - shift)

    def power(self, x: Array) -> Array:
        """``exp(x / power_unit)``; may overwrite `x`."""
        return self.xp.exp(x)

    def times_minus(self, x: Array, y: Array, shift: Array) -> Array:
        """``x * (y - shift)``; may overwrite `y`."""
        return x * (y - shift)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        """`x` where visible, else the value; may overwrite `x`."""
        return self.xp.where(visible, x, value)

    def key_words(self, key: Any, like: Array) -> Array:
        """A dropout key of this library as raw words, beside `like`."""
        return place(self.arrays, key, like)

    def no_tiles(self, call: Any, by_rule: bool = False) -> str:
        """Why a call, or its dropout bits, cannot be cut into tiles; `by_rule`, why not unless it is asked for."""
        return ""

    def any_row(self, function: Function, operands: Sequence[Array], rows: int) -> Array:
        """Whether any row of ``function(operands)`` is true, ``[..., 1, columns]``; some at a time, to save memory."""
        size, found = 1024 if self.most_groups else rows, None  # without groups, lengths may be symbols
        for start in [0] if size is rows else range(0, rows, size):
            some = [cut_rows_of(x, start, min(start + size, rows)) for x in operands]
            part = self.xp.any(function(some), axis=-2, keepdims=True)
            found = part if found is None else found | part
        return found

    def span(self, visible: Array) -> Sizes:
        """The columns from the first to the last with something visible, where `Arrays.inspects`."""
        return 0, visible.shape[-1]

    def map_rows(
        self, function: OfTiles, block: Block, groups: Sequence[Group], sizes: Sizes, like: Pair, draw: Any = None
    ) -> Pair:
        """Call the function with tiles of rows of each group, each with the columns that it sees, in parts.

        Join its first results along rows, add up the second; `like` are arrays with the lead axes that these have.
        `draw` makes keep bits of counts, for loops in which several tiles share them.
        """
        rows, total = [], None
        for part in (part for group in groups for part in group.split(sizes[0])):
            row, sums = function(cut_group(block, part))
            rows.append(row)
            total = sums if total is None else tree_map(operator.add, total, sums)
        return join_rows(self.xp, rows), total

    def scan_columns(self, step: Step, state: Any, block: Block, sizes: Sizes) -> Pair:
        """Carry a state through every tile of columns; join what else the step returns along rows."""
        (length, size), results = (block.lengths[1], sizes[1]), []
        for i in range(0, length, size):
            state, result = step(state, cut_columns(block, i, min(i + size, length)))
            results.append(result)
        return state, join_rows(self.xp, results)

    def compiled(self, function: Function, tiling: Any, *arrays: Any) -> Any:
        """``function(tiling, *arrays)``; `tiling` is hashable."""
        return function(tiling, *arrays)

    def differentiable(self, forward: Function, backward: Function, tiling: Any, block: Block) -> Array:
        """The output of the block, with its gradient where the library differentiates."""
        return forward(tiling, block)[0]


def join_rows(xp: Any, trees: Sequence[Any]) -> Any:
    """Trees of arrays as one, joined along rows."""
    return tree_map(lambda *x: x[0] if len(x) == 1 else xp.concat(x, axis=-2), *trees)


class Backend:
    """One array library, as attention sees it."""

    def __init__(
        self, xp: Any, arrays: type[Arrays] = Arrays, steps: type[Steps] = Steps, tiles: type[Tiles] = Tiles
    ) -> None:
        self.xp = xp
        self.arrays = arrays(xp)
        self.steps, self.tiles = steps(self.arrays), tiles(self.arrays)
        self.name = self.arrays.name
        self.engines: tuple[Any, ...] = ()
        """Kernels of vendors, the best first: see `anyattention.extend.Fused`."""
        self.symbolic: Callable[[Any], bool] = lambda size: not isinstance(size, int)
        """Whether a size is a symbol, on which no choice may depend."""
