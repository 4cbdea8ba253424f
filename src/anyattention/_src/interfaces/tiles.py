"""The products, row statistics and loops of the tiled implementation."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from anyattention._src.blocks import Block, Group, Sizes, cut_columns, cut_group, cut_rows_of, everything, tree_map
from anyattention._src.interfaces.arrays import Arrays, Function, permute, place

Array = Any
Pair = tuple[Any, Any]
OfTiles = Callable[[tuple[Block, ...]], Pair]
Step = Callable[[Any, Block], Pair]


class TileSteps:
    """What is computed of one tile: products, row statistics, and steps that may overwrite their operands."""

    power_unit = 1.0
    """What exponents are multiplied by before `power`."""
    fuses = False
    """Whether steps by element become one with their neighbours, so that they take no pass over memory."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays, self.xp = arrays, arrays.xp

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

    def norms(self, x: Array) -> Array:
        """The Euclidean norms over the last axis, of which nothing is differentiated; not finite where `x` is not."""
        return self.xp.sqrt(self.xp.vecdot(x, x))

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

    def cap(self, x: Array, cap: float, again: bool) -> tuple[Array, Array | None]:
        """``cap * tanh(x)``, and ``tanh(x)``, or None unless it is needed `again`; may overwrite `x`."""
        tanh = self.xp.tanh(x)
        return tanh * cap, tanh

    def uncap(self, x: Array, tanh: Array) -> Array:
        """``x * (1 - tanh ** 2)``, the gradient of a cap; may overwrite `tanh`."""
        return x * (1.0 - tanh * tanh)

    def plus(self, x: Array, y: Array) -> Array:
        """``x + y``; may overwrite `x`, of logits."""
        return x + y

    def along_diagonals(self, values: Array, rows: int, columns: int) -> Array:
        """``[..., rows, columns]`` with ``values[..., 0, column - row + rows - 1]``, of ``rows + columns - 1`` values.

        It may be a view, in which numbers share their memory.
        """
        if rows == 1:
            return values
        lead, size, reshape = values.shape[:-2], rows + columns - 1, self.xp.reshape
        flat = reshape(self.xp.broadcast_to(values, (*lead, rows, size)), (*lead, rows * size))
        # In rows of a size less by one, each row moves on by one.
        return reshape(flat[..., rows - 1 : rows * size - 1], (*lead, rows, size - 1))[..., :columns]

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        """`x` where visible, else the value; may overwrite `x`."""
        return self.xp.where(visible, x, value)


class Tiles(TileSteps):
    """The steps and loops of the tiled implementation."""

    most_groups = 2**31
    """Into how many groups of rows a mask by rule may divide the queries; none where lengths may be symbols."""
    kernel: Any = None
    """What computes a block of which every row sees every column, if a kernel for that gives the row statistics.

    ``fits(block)``, ``forward(tiling, block)`` and ``backward(tiling, block, output, base, total, doutput)``.
    """
    chunks = False
    """Whether arrays are in chunks, so that a block is computed by its shards; each looks after its hidden padding."""

    def sizes(self, block: Block, ruled: bool) -> Sizes:
        """How many queries and keys to take at a time; `ruled` says that rows see different keys by the mask's rule."""
        return 256, 1024

    def groups(self, mask: Any, block: Block, size: int) -> tuple[Group, ...]:
        """Groups of rows that see different columns by a mask's rule, `most_groups` at most, of whole tiles of rows.

        Their `sure` columns are at multiples of 64.
        """
        (rows, columns), groups = block.lengths, []
        for part in everything(block).split(max(size, -(-rows // (self.most_groups * size)) * size)):
            seen, (first, last) = mask.ranges(*part.rows, columns)
            groups.append(Group(part.rows, seen, (-(-first // 64) * 64, last // 64 * 64)))
        return tuple(groups)

    def remarks(self, tiling: Any, block: Block) -> list[str]:
        """What `explain` says of a block, a line each, where there are `chunks`."""
        return []

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

    def with_shown(self, block: Block, shown: Callable[[], Array]) -> Block:
        """The block with ``shown()``, which of its keys some row sees, where a key or value is not finite."""
        finite = [self.xp.isfinite(self.xp.sum(self.norms(x))) for x in block.columns]
        if self.arrays.inspects(block.columns[0]) and all(self.arrays.surely(x, True) for x in finite):
            return block
        return block._replace(shown=shown())

    def guarded(self, function: Function, tiling: Any, block: Block, shown: Callable[[], Array]) -> Any:
        """``function(tiling, block)`` of the block that `with_shown` makes."""
        return function(tiling, self.with_shown(block, shown))

    def span(self, visible: Array) -> Sizes:
        """The columns from the first to the last with something visible; asked for where `Arrays.inspects`."""
        some = self.xp.any(self.xp.reshape(visible, (-1, visible.shape[-1])), axis=0)
        columns = self.xp.nonzero(some)[0]
        return (int(columns[0]), int(columns[-1]) + 1) if columns.shape[0] else (0, 0)

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

    def differentiable(self, forward: Function, backward: Function, tiling: Any, block: Block) -> Any:
        """The output of the block first, with its gradient where the library differentiates.

        Of a partial its base, a constant, and its total, with its gradient, follow.
        """
        return forward(tiling, block)


def join_rows(xp: Any, trees: Sequence[Any]) -> Any:
    """Trees of arrays as one, joined along rows."""
    return tree_map(lambda *x: x[0] if len(x) == 1 else xp.concat(x, axis=-2), *trees)
