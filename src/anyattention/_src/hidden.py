"""Keys that no query of their batch entry may see: padding, or the unwritten part of a cache.

Whatever stands there must not show, NaN included, and 0 * NaN is NaN. So kernels and tiles get zeros there.
"""

from functools import reduce
from operator import and_
from typing import Any

from anyattention._src.blocks import Block
from anyattention._src.call import Call
from anyattention._src.interfaces import Tiles
from anyattention._src.rules import LocalMask, Lowering, as_mask, conjunction, is_band, visible

Array = Any
HUGE = 1e30  # so many values of such a size have a sum that float32 holds


def shown_keys(call: Call) -> Array | None:
    """Which keys some query may see, bool, ``[batch..., 1, 1, kv_length or 1]``; None for all.

    Of a shard that is not known, which has some of the keys: the whole has other queries. A partial, and some queries
    of all the keys, are of these queries alone.
    """
    shard, whole = call.first is not None, call.options.whole
    alone = call.options.partial or (whole is not None and whole[-1] == call.lengths[1])
    if call.operands.mask is None or (shard and not alone) or 0 in call.lengths:
        return None
    parts, xp = conjunction(call.operands.mask), call.backend.xp
    lowered = [(part, *_lowered(call, part)) for part in parts if shard or not _is_whole(part, call)]
    if sum(_rows(to) > 1 for _, _, to in lowered) + len(parts) - len(lowered) > 1:
        lowered = [(None, *_lowered(call, call.operands.mask))]  # together they may hide what each shows to some query
    found = [
        _of_band(part, to) if is_band(part) and not shard else _of_rows(expression, to, call.backend.tiles)
        for part, expression, to in lowered
    ]
    if not found:
        return None
    keys = reduce(and_, found)
    return xp.any(keys, axis=-3, keepdims=True) if keys.ndim > 2 and keys.shape[-3] != 1 else keys


def unspoiled(xp: Any, block: Block) -> Block:
    """The block with zeros for NaN, and for what is huge, in keys and values that no query sees.

    What such values add to the mean of all, which fully masked rows get, stands beside.
    """
    if block.shown is None:
        return block
    (key, value), shown = block.columns, block.shown
    keeps, kept = ((xp.abs(x) < HUGE) | shown for x in (key, value))
    spoiled = xp.sum(xp.where(kept, 0.0, value) / value.shape[-2], axis=-2, keepdims=True)
    columns = xp.where(keeps, key, 0.0), xp.where(kept, value, 0.0)
    return block._replace(columns=columns, shown=None, spoiled=spoiled)


def _lowered(call: Call, mask: Any) -> tuple[Any, Lowering]:
    to = call.lowering()
    return as_mask(mask).lower(to), to


def _rows(to: Lowering) -> int:
    return max(x.shape[-2] if x.ndim > 1 else 1 for x in to.operands)


def _ends(band: Any, lengths: tuple[int, int]) -> tuple[int, int]:
    """Where the keys start and stop that are in the windows of some query; windows overlap."""
    first, last = band.ranges(0, *lengths)[0]
    return first, first if isinstance(band, LocalMask) and band.left + band.right < 0 else last


def _is_whole(part: Any, call: Call) -> bool:
    """Whether it is a band that shows every key to some query; of symbols that is not asked."""
    known = is_band(part) and not any(map(call.backend.symbolic, call.lengths))
    return known and _ends(part, call.lengths) == (0, call.lengths[1])


def _of_band(band: Any, to: Lowering) -> Array:
    first, last = _ends(band, to.lengths)
    column = to.operands[to.position(-1)]
    return (column >= first) & (column < last)


def _of_rows(expression: Any, to: Lowering, tiles: Tiles) -> Array:
    """Which keys the mask shows to some query."""
    rows = _rows(to)
    if rows == 1:
        return visible(to.arrays, expression, to.operands)
    return tiles.any_row(lambda operands: visible(to.arrays, expression, operands), to.operands, rows)
