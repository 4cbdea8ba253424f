import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import dask.array as da

from anyattention._src.rules import ByRule, conjunction, is_band
from anyattention.extend import Block, Group, Tiles
from anyattention_backends.dask.graph import Grid, backward, forward

Array = Any


class DaskTiles(Tiles):
    chunks = True

    def no_tiles(self, call: Any, by_rule: bool = False) -> str:
        """Raise ValueError where sizes are unknown: exact would need all logits, in chunks that do not fit."""
        for name in ("query", "key", "value", "bias", "mask", "sinks"):
            x = getattr(call.operands, name)
            for part in x.arrays() if isinstance(x, ByRule) else [x]:
                if any(size != size for axis in getattr(part, "chunks", ()) for size in axis):
                    raise ValueError(f"{name} has chunks of unknown size: call compute_chunk_sizes() first")
        return ""

    def groups(self, mask: Any, block: Block, size: int) -> tuple[Group, ...]:
        """One for each chunk of rows. Beside dropout they see everything unless each surely sees a key."""
        columns, found = block.lengths[1], []
        low = any("float" in self.arrays.dtype_name(x) for x in block.pairs.bias)  # a bias may hide what a mask shows
        bands = all(map(is_band, conjunction(mask)))  # then the number of keys of a row has no minimum in between
        for stop, rows in zip(accumulate(block.rows[0].chunks[-2]), block.rows[0].chunks[-2], strict=True):
            seen, sure = mask.ranges(stop - rows, stop, columns)
            if block.pairs.counts is not None and rows:
                ends = [mask.ranges(row, row + 1, columns)[1] for row in (stop - rows, stop - 1)]
                if low or not bands or any(first >= last for first, last in ends):
                    seen = (0, columns)
            found.append(Group((stop - rows, stop), seen, sure))
        return tuple(found)

    def remarks(self, tiling: Any, block: Block) -> list[str]:
        return [] if block.empty else [str(Grid(tiling, block))]

    def compiled(self, function: Callable[..., Any], tiling: Any, *arrays: Any) -> Any:
        block, *results = arrays
        if block.empty:
            return function(tiling, *arrays) if results else _zeros(tiling, block)
        return backward(tiling, block, *results) if results else forward(tiling, block)

    def differentiable(self, forward: Any, backward: Any, tiling: Any, block: Block) -> Any:
        return self.compiled(forward, tiling, block)


def _zeros(tiling: Any, block: Block) -> tuple[Array, Array, Array]:
    """The results where there is nothing to attend: of arrays without elements Dask finds no chunks."""
    shape = (*block.lead, block.lengths[0])
    sizes = block.columns[1].shape[-1], 1, 1
    output, base, total = (da.zeros((*shape, size), chunks=(*shape, size), dtype=tiling.dtype) for size in sizes)
    return output, base - math.inf if tiling.options.partial else base, total
