"""Attention a tile at a time: the same numbers within Flax's own error, in memory that grows with the lengths alone.

Forward, for some queries at a time: the `partials` of their tiles of keys are merged into one, then normalized.
Backward, from the row statistics that the forward pass leaves: tile by tile, with weights = exp(logits - base)
recomputed, doutput already divided by total, and delta the row sums of doutput * output,

    dvalue = weights^T . doutput      dlogits = weights * (doutput . value^T - delta), zero where masked
    dquery = dlogits . key            dkey = dlogits^T . query            dbias = dlogits

How tiles are cut, looped over and shared among threads is the backend's part: `map_rows` and `scan_columns`.

Source of the backward formulas: Dao et al., FlashAttention (2022). Base (the maximum) and total are kept apart,
because the base of a row that sees nothing is finfo.min, which would absorb the logarithm of the total.
"""

import math
from functools import partial
from typing import Any, NamedTuple

from anyattention._src import threefry
from anyattention._src.blocks import Block, Group, Sizes, cut_columns, everything, tree_map
from anyattention._src.call import Options
from anyattention._src.hidden import unspoiled
from anyattention._src.interfaces import Backend
from anyattention._src.rules import Expression, Mask, visible
from anyattention._src.tiles.partials import Partial, finish, finite, merge, of_hidden, of_sinks

Array = Any
Gradients = tuple[Array, Array, Array, Array | None, Array | None]
BOUND = 20.0  # exp(20) is 5e8: sums over any length, times values, stay in the range of float32


class Tiling(NamedTuple):
    """What is the same in every tile; hashable."""

    backend: Backend
    options: Options  # of the call
    dtype: str  # of logits and accumulators: at least float32
    expression: Expression | None  # the mask, over the arrays in `Pairs.mask`
    root: float  # of the depth, or one over the scale: divides queries
    fill: float  # the logit of a masked key: finfo.min of the compute dtype
    sizes: Sizes  # rows and columns of a tile
    bias_axes: tuple[bool, bool]  # whether the bias has rows, and columns, of its own
    groups: tuple[Group, ...]
    precise: bool  # sum logits in float64, which float32 needs where they are large
    # Shortcuts, which are right where every row sees a key: see `_sound`.
    skip: bool  # leave out what is hidden
    bounded: bool = False  # take exp of logits as they are

    @property
    def keep_prob(self) -> Any:
        """The probability that dropout keeps a weight."""
        return 1.0 if self.options.dropout is None else self.options.dropout.keep_prob

    @property
    def unit(self) -> float:
        """What queries are multiplied by beside the scale: a pass over the logits less, whose unit it is.

        One over a soft cap, within bounds that keep queries in the range of float32; else that of powers.
        """
        if (cap := self.options.logits_soft_cap) is not None:
            return 1.0 / min(max(cap, 1e-9), 1e9)
        return self.backend.tiles.power_unit if self.bounded else 1.0


def tiling(
    backend: Backend, options: Options, dtype: str, expression: Expression | None, block: Block, mask: Any = None
) -> Tiling:
    """How a block is cut; `mask` is by rule, and tells which rows see which columns where its positions are these."""
    rows, columns = block.lengths
    ruled = mask is not None and mask.ranges(0, 1, columns)[0] != mask.ranges(rows - 1, rows, columns)[0]
    sizes, bias = backend.tiles.sizes(block, ruled), block.pairs.bias
    root, fill = max(block.rows[0].shape[-1], 1) ** 0.5, float(backend.steps.lowest(options.dtype))
    if options.scale is not None:
        root = 1.0 / options.scale if options.scale else math.inf
    bias_axes = (False, False) if bias is None else tuple(size != 1 for size in bias.shape[-2:])
    groups = _groups(mask, block, sizes[0], backend.tiles.most_groups) if ruled else (everything(block),)
    skip, precise = expression is not None and backend.arrays.inspects(block.rows[0]), options.dtype == "float32"
    return Tiling(backend, options, dtype, expression, root, fill, sizes, bias_axes, groups, precise, skip)


def _groups(mask: Mask, block: Block, size: int, most: int) -> tuple[Group, ...]:
    """Groups of rows that see different columns, `most` at most, of whole tiles; `sure` at multiples of 64."""
    rows, columns = block.lengths
    groups = []
    for part in everything(block).split(max(size, -(-rows // (most * size)) * size)):
        seen, (first, last) = mask.ranges(*part.rows, columns)
        groups.append(Group(part.rows, seen, (-(-first // 64) * 64, last // 64 * 64)))
    return tuple(groups)


def forward(tiling: Tiling, block: Block) -> tuple[Array, Array, Array]:
    """Output, base and total of every query, ``[lead..., rows, *]``."""
    xp = tiling.backend.xp
    if block.empty:
        as_query = {"dtype": block.rows[0].dtype, **tiling.backend.arrays.beside(block.rows[0])}
        sizes = (block.columns[1].shape[-1], 1, 1)
        return tuple(xp.zeros((*block.lead, block.lengths[0], size), **as_query) for size in sizes)
    (query,), lead = block.rows, block.lead
    if tuple(query.shape[:-2]) != lead:  # where a bias or mask alone is mapped over an axis
        block = block._replace(rows=(xp.broadcast_to(query, (*lead, *query.shape[-2:])),))
    block, like = with_bounds(tiling, unspoiled(xp, block)), ((block.rows[0],) * 3, ())
    draw = partial(threefry.keep_at, xp, tiling.keep_prob)
    return tiling.backend.tiles.map_rows(partial(attend, tiling), block, tiling.groups, tiling.sizes, like, draw)[0]


def partial_of(tiling: Tiling, block: Block) -> Partial:
    """The partial of every query over the keys of a block, which may be some of many; hidden keys count in it."""
    tiling, like = tiling._replace(skip=False), ((block.rows[0],) * 3, ())
    map_rows = tiling.backend.tiles.map_rows
    rows, _ = map_rows(lambda parts: (tuple(absorbed(tiling, parts)), ()), block, tiling.groups, tiling.sizes, like)
    return Partial(*rows)


def attend(tiling: Tiling, parts: tuple[Block, ...]) -> tuple[tuple[Array, ...], tuple[()]]:
    """Output, base and total of some queries, over all their keys, which are in several blocks."""
    xp, spoiled, tiling = tiling.backend.xp, parts[0].spoiled, _inspected(tiling, parts[0])
    state = absorbed(tiling, parts)
    if (tiling.skip or tiling.bounded) and (state is None or not _sound(tiling, state)):
        state = absorbed(tiling._replace(skip=False, bounded=False), parts)
    if (sinks := parts[0].pairs.sinks) is not None:
        small = state.base is None and tiling.backend.arrays.surely(xp.abs(sinks) <= BOUND, True)
        state = merge(tiling.backend.tiles, state, of_sinks(xp, sinks, state, small))
    base = xp.zeros_like(state.total) if state.base is None else state.base
    output = finish(state, tiling.keep_prob)
    if spoiled is not None:
        output = xp.where(base <= tiling.fill + 100.0, output + spoiled, output)  # hidden keys have some weight
    return (output, base, state.total), ()


def absorbed(tiling: Tiling, parts: tuple[Block, ...]) -> Any:
    """The partial of some queries over the keys of all the blocks; None where all of them are left out."""
    tiles = tiling.backend.tiles
    query, hidden = parts[0].rows[0], parts[0].hidden
    scaled = query / (tiling.root / tiling.unit)
    state: Any = None
    for part in parts:
        if part.lengths[1]:
            part = part._replace(rows=(scaled,))
            state, _ = tiles.scan_columns(partial(absorb, tiling), state, part, tiling.sizes)
    if hidden and not (tiling.skip or tiling.bounded):
        closed = of_hidden(tiles, query, tiling.fill, hidden)
        state = closed if state is None else merge(tiles, state, closed)
    return state


def absorb(tiling: Tiling, state: Partial | None, tile: Block) -> tuple[Partial | None, tuple[()]]:
    """The partial of the keys so far, with those of the tile."""
    tiles, visible = tiling.backend.tiles, tile_visible(tiling, tile)
    if tiling.skip and visible is not None:
        start, stop = tiles.span(visible)
        if start == stop:
            return state, ()
        if stop - start < visible.shape[-1]:
            tile = cut_columns(tile, start, stop)
            visible = tile_visible(tiling, tile)
    (logits, base), keep = tile_logits(tiling, tile, visible, True), tile_keep(tiling, tile)
    weights = tile_weights(tiling, logits, visible, finite(tiles, base))
    total = tiles.row_sum(weights)
    if keep is not None:  # dropout takes weights out of the output, never out of the normalizer
        weights = tiles.fill(weights, keep, 0.0)
    new = Partial(base, total, tiles.product(weights, tile.columns[1], tiling.options.precision))
    return (new if state is None else merge(tiles, state, new)), ()


def tile_visible(tiling: Tiling, tile: Block) -> Array | None:
    """Where the mask lets a query see a key; None for everywhere."""
    if tiling.expression is None or tile.pairs.mask is None:
        return None
    arrays = tiling.backend.arrays
    shown = visible(arrays, tiling.expression, tile.pairs.mask)
    return None if arrays.surely(shown, True) else shown


def tile_logits(tiling: Tiling, tile: Block, visible: Array | None, forward: bool) -> tuple[Array, Array | None]:
    """The logits of a tile, ``[lead..., rows, columns]``; masked, unless they are bounded: then weights are.

    And, forward, the largest of each row, unless they are bounded; backward their tanh, if they are capped.
    """
    tiles, bias, tanh = tiling.backend.tiles, tile.pairs.bias, None
    unit = tiles.power_unit if tiling.bounded else 1.0
    logits = tiles.logits(tile.rows[0], tile.columns[0], tiling.options.precision, tiling.precise)
    if (cap := tiling.options.logits_soft_cap) is not None:
        logits = logits if cap * tiling.unit == 1.0 else logits / (cap * tiling.unit)
        logits, tanh = tiles.cap(logits, cap * unit, not forward)
    if bias is not None:
        bias = tiling.backend.arrays.cast(bias, tiling.dtype)
        logits = logits + (bias * unit if tiling.bounded else bias)
    masked = visible is not None and not tiling.bounded
    logits = tiles.fill(logits, visible, tiling.fill) if masked else logits
    if tiling.bounded or not forward:
        return logits, None if forward else tanh
    if tanh is None or masked or bias is not None:
        return logits, tiles.row_max(logits)
    return logits, tiles.row_max(tanh) * cap  # XLA would write the logits to memory for their maximum


def tile_weights(tiling: Tiling, logits: Array, visible: Array | None, base: Array | None) -> Array:
    """Exp of the logits, relative to a base where they are not bounded; may overwrite them."""
    tiles = tiling.backend.tiles
    if not tiling.bounded:
        return tiles.exp_minus(logits, base)
    weights = tiles.power(logits)
    return weights if visible is None else tiles.fill(weights, visible, 0.0)


def tile_keep(tiling: Tiling, tile: Block) -> Array | None:
    """Which weights of a tile dropout keeps, from their counts or, drawn before, as they are; None for all."""
    counts = tile.pairs.counts
    if isinstance(counts, tuple):
        return threefry.keep_at(tiling.backend.xp, tiling.keep_prob, counts)
    return counts


def _sound(tiling: Tiling, state: Partial) -> bool:
    """Whether the shortcuts that were taken were right for all rows."""
    if tiling.bounded:
        xp = tiling.backend.xp
        return tiling.backend.arrays.surely((state.total > 0.0) & xp.isfinite(state.output), True)
    return _sees(tiling, state.base)


def _sees(tiling: Tiling, base: Array) -> bool:
    """Whether every row has a logit beside which the fill vanishes; False where it cannot be known."""
    return tiling.backend.arrays.surely(base > tiling.fill + 800.0, True)  # exp(-800) is zero in float64 too


def with_bounds(tiling: Tiling, block: Block) -> Block:
    """The block with what bounds its logits by Cauchy and Schwarz, if values can be looked at.

    Norms of queries, ``[lead..., rows, 1]``; of keys the largest, of a bias the largest size, and of values beside a
    mask the sum of squares, which says whether all are finite: ``[lead..., 1, 1]``. A bias with rows and columns is not
    looked at.
    """
    (query, *_), (key, value), bias, xp = *block[:2], block.pairs.bias, tiling.backend.xp
    if not tiling.backend.arrays.inspects(query):
        return block
    rows, columns = (xp.sqrt(xp.expand_dims(xp.vecdot(x, x), axis=-1)) for x in (query, key))
    columns = xp.max(columns, axis=-2, keepdims=True)
    size = None if bias is None or all(tiling.bias_axes) else xp.max(xp.abs(bias), axis=(-2, -1), keepdims=True)
    values = None if tiling.expression is None else xp.sum(xp.vecdot(value, value), axis=-1)[..., None, None]
    return block._replace(pairs=block.pairs._replace(bounds=(rows, columns, size, values)))


def _inspected(tiling: Tiling, block: Block) -> Tiling:
    """The tiling with the shortcuts that are right for these rows, which are of one batch entry.

    Logits that are small need no maximum, since exp is far from overflow and underflow, and lose less than Flax's in
    a sum in float32. Where a value is not finite, no key may be left out: Flax multiplies it by weights of zero.
    """
    arrays, xp, pairs = tiling.backend.arrays, tiling.backend.xp, block.pairs
    if pairs.bounds is None:
        return tiling._replace(skip=False)
    rows, columns, size, values = pairs.bounds
    largest = xp.max(rows) * xp.max(columns) / abs(tiling.root)
    small = arrays.surely(largest <= BOUND, True)
    finite = values is None or arrays.surely(xp.isfinite(values), True)
    cap = tiling.options.logits_soft_cap
    capped = largest if cap is None else xp.where(largest > cap, cap, largest)
    bounded = finite and arrays.surely(capped <= BOUND, True)
    if bounded and pairs.bias is not None:
        bounded = size is not None and arrays.surely(capped + xp.max(size) <= BOUND, True)
    return tiling._replace(bounded=bounded, precise=tiling.precise and not small, skip=tiling.skip and finite)


def backward(tiling: Tiling, block: Block, output: Array, base: Array, total: Array, doutput: Array) -> Gradients:
    """The gradients of query, key, value, bias and sinks, each in its own shape, from that of the output."""
    backend, bias, sinks = tiling.backend, block.pairs.bias, block.pairs.sinks
    wanted = (block.rows[0], *block.columns, bias, sinks)
    if block.empty:
        return tree_map(backend.xp.zeros_like, wanted)
    block = with_bounds(tiling, unspoiled(backend.xp, block))
    pairs = block.pairs._replace(statistics=(base, total))
    whole = Block((block.rows[0], doutput, output), block.columns, pairs)
    by_row = tiling.bias_axes[0]
    like = (block.rows[0], bias if by_row else None, sinks), (*block.columns, None if by_row else bias)
    draw = partial(threefry.keep_at, backend.xp, tiling.keep_prob)
    results = backend.tiles.map_rows(partial(pull_back, tiling), whole, (everything(block),), tiling.sizes, like, draw)
    (dquery, dbias_rows, dsinks), (dkey, dvalue, dbias) = results
    gradients = (dquery, dkey, dvalue, dbias_rows if by_row else dbias, dsinks)
    return tree_map(lambda x, gradient: sum_to(backend.xp, gradient, x.shape), wanted, gradients)


def prologue(tiling: Tiling, block: Block) -> Block:
    """What every tile of some queries needs: scaled queries and doutput over total as rows; base and delta."""
    tiles, (query, doutput, output), (base, total) = tiling.backend.tiles, block.rows, block.pairs.statistics
    base = None if tiling.backend.arrays.surely(base == 0.0, True) else finite(tiles, base)
    delta = tiles.row_sum(doutput * output) / total
    rows = query / (tiling.root / tiling.unit), doutput / (total * float(tiling.keep_prob))
    return Block(rows, block.columns, block.pairs._replace(statistics=(base, delta)))


def pull_back(tiling: Tiling, parts: tuple[Block, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """For some queries: the gradients that have rows, and what they add to those that have none."""
    tiles, base = tiling.backend.tiles, parts[0].pairs.statistics[0]
    # What was rounded in the forward pass is rounded alike here: in the weights of large logits errors then cancel.
    tiling = _inspected(tiling, parts[0])
    unbased = tiling.backend.arrays.surely(base == 0.0, True)
    tiling = tiling._replace(skip=tiling.skip and _sees(tiling, base), bounded=tiling.bounded and unbased)
    step, block = partial(pull_tile, tiling), prologue(tiling, parts[0])
    dquery, (dkey, dvalue, dbias) = tiles.scan_columns(step, None, block, tiling.sizes)
    dquery, dkey = dquery / tiling.root, dkey if tiling.unit == 1.0 else dkey / tiling.unit
    if (dsinks := block.pairs.sinks) is not None:
        (base, delta), sinks = block.pairs.statistics, dsinks
        dsinks = -tiling.backend.xp.exp(sinks if base is None else sinks - base) * delta
        dsinks = sum_to(tiling.backend.xp, dsinks, (*sinks.shape[:-2], *dsinks.shape[-2:]))
    if dbias is None:
        return (dquery, None, dsinks), (dkey, dvalue, None)
    dbias = tiles.transpose(dbias)
    by_row, by_column = tiling.bias_axes
    if not by_column:
        dbias = tiles.row_sum(dbias)
    return (dquery, dbias if by_row else None, dsinks), (dkey, dvalue, None if by_row else dbias)


def pull_tile(tiling: Tiling, dquery: Array | None, tile: Block) -> tuple[Array, tuple[Array, Array, Array | None]]:
    """One tile of the formulas above: dquery so far; dkey, dvalue and dbias of the tile, columns first."""
    (tiles, xp), bias = (tiling.backend.tiles, tiling.backend.xp), tile.pairs.bias
    (query, doutput), (key, value) = tile.rows, tile.columns
    base, delta = tile.pairs.statistics
    visible, keep = tile_visible(tiling, tile), tile_keep(tiling, tile)
    if tiling.skip and bias is None and tiling.backend.arrays.surely(visible, False):  # every weight is zero
        zeros = [xp.zeros_like(x) for x in (query, key, value)]
        return zeros[0] if dquery is None else dquery, (zeros[1], zeros[2], None)

    product = partial(tiles.product, precision=tiling.options.precision)
    logits, capped = tile_logits(tiling, tile, visible, False)
    weights = tile_weights(tiling, logits, visible, base)
    dweights = product(doutput, tiles.transpose(value), scratch="" if bias is not None else "dweights")
    kept = weights
    if keep is not None:
        kept, dweights = xp.where(keep, weights, 0.0), tiles.fill(dweights, keep, 0.0)
    dvalue = sum_to(xp, product(tiles.transpose(kept), doutput), value.shape)
    dlogits = tiles.times_minus(weights, dweights, delta)
    if visible is not None:
        dlogits = tiles.fill(dlogits, visible, 0.0)
    dbias = None
    if bias is not None:
        shape = (*bias.shape[:-2], dlogits.shape[-2] if tiling.bias_axes[0] else 1, dlogits.shape[-1])
        dbias = tiles.transpose(sum_to(xp, dlogits, shape))
    if capped is not None:
        dlogits = tiles.uncap(dlogits, capped)
    more = sum_to(xp, product(dlogits, key), query.shape)
    dkey = sum_to(xp, product(tiles.transpose(dlogits), query), key.shape)
    return more if dquery is None else dquery + more, (dkey, dvalue, dbias)


def sum_to(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` summed over the axes along which an array of `shape` was broadcast to it."""
    extra = x.ndim - len(shape)
    if extra:
        x = xp.sum(x, axis=tuple(range(extra)))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return xp.sum(x, axis=axes, keepdims=True) if axes else x
