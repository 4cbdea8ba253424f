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
import operator
from functools import partial
from typing import Any, NamedTuple

from anyattention._src import threefry
from anyattention._src.blocks import Block, Group, Sizes, cut_columns, everything, sum_to, tree_map
from anyattention._src.call import Options
from anyattention._src.hidden import unspoiled
from anyattention._src.interfaces import Backend
from anyattention._src.rules import Expression, Mask, Term, added, bound, differentiable, gradients, visible
from anyattention._src.tiles.partials import Partial, finish, finish_some, finite, merge, of_hidden, of_sinks

Array = Any
# Of query, key, value, the operands and the parameters of the bias, and sinks.
Gradients = tuple[Array, Array, Array, tuple[Array | None, ...], tuple[Array | None, ...], Array | None]
BOUND = 20.0  # exp(20) is 5e8: sums over any length, times values, stay in the range of float32
LEAST = 1e-30  # of a total: what is lost of it below the range of float32, 1e-38, does not count


class Tiling(NamedTuple):
    """What is the same in every tile; hashable."""

    backend: Backend
    options: Options  # of the call
    dtype: str  # of logits and accumulators: at least float32
    expression: Expression | None  # the mask, over the arrays in `Pairs.mask`
    root: float  # of the depth, or one over the scale: divides queries
    fill: float  # the logit of a masked key: finfo.min of the compute dtype
    sizes: Sizes  # rows and columns of a tile
    terms: tuple[Term, ...]  # the bias, over `Pairs.bias` and `Block.parameters`
    bias_axes: tuple[tuple[bool, bool] | None, ...]  # whether each of these has rows, and columns; None of integers
    groups: tuple[Group, ...]
    precise: bool  # sum logits in float64, which float32 needs where they are large
    # Shortcuts, which are right where every row sees a key: see `_sound`.
    skip: bool  # leave out what is hidden
    bounded: bool = False  # take exp of logits as they are
    of_bias: bool = True  # backward: whether the bias has a gradient

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
    backend: Backend,
    options: Options,
    dtype: str,
    expression: Expression | None,
    terms: tuple[Term, ...],
    block: Block,
    mask: Any = None,
) -> Tiling:
    """How a block is cut; `mask` is by rule, and tells which rows see which columns where its positions are these."""
    rows, columns = block.lengths
    ruled = mask is not None and mask.ranges(0, 1, columns)[0] != mask.ranges(rows - 1, rows, columns)[0]
    sizes = backend.tiles.sizes(block, ruled)
    root, fill = max(block.rows[0].shape[-1], 1) ** 0.5, float(backend.steps.lowest(options.dtype))
    if options.scale is not None:
        root = 1.0 / options.scale if options.scale else math.inf
    found = differentiable(backend, terms, block.pairs.bias)
    axes = [(x.shape[-2] != 1, x.shape[-1] != 1) if n in found else None for n, x in enumerate(block.pairs.bias)]
    groups = _groups(mask, block, sizes[0], backend.tiles.most_groups) if ruled else (everything(block),)
    skip, precise = expression is not None and backend.arrays.inspects(block.rows[0]), options.dtype == "float32"
    return Tiling(backend, options, dtype, expression, root, fill, sizes, terms, tuple(axes), groups, precise, skip)


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
        output, base, total = (xp.zeros((*block.lead, block.lengths[0], size), **as_query) for size in sizes)
        return output, base - math.inf if tiling.options.partial else base, total
    (query,), lead = block.rows, block.lead
    if tuple(query.shape[:-2]) != lead:  # where a bias or mask alone is mapped over an axis
        block = block._replace(rows=(xp.broadcast_to(query, (*lead, *query.shape[-2:])),))
    block, like = with_bounds(tiling, unspoiled(xp, block)), ((block.rows[0],) * 3, ())
    draw = partial(threefry.keep_at, xp, tiling.keep_prob)
    return tiling.backend.tiles.map_rows(partial(attend, tiling), block, tiling.groups, tiling.sizes, like, draw)[0]


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
    some = tiling.options.partial
    output = finish_some(xp, state, tiling.keep_prob) if some else finish(state, tiling.keep_prob)
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
    tiles, tanh = tiling.backend.tiles, None
    unit = tiles.power_unit if tiling.bounded else 1.0
    logits = tiles.logits(tile.rows[0], tile.columns[0], tiling.options.precision, tiling.precise)
    if (cap := tiling.options.logits_soft_cap) is not None:
        logits = logits if cap * tiling.unit == 1.0 else logits / (cap * tiling.unit)
        logits, tanh = tiles.cap(logits, cap * unit, not forward)
    if tiling.terms:
        bias = added(tiling.backend, tiling.terms, tile.pairs.bias, tile.parameters, tiling.dtype, unit)
        logits = tiles.plus(logits, bias)
    masked = visible is not None and not tiling.bounded
    logits = tiles.fill(logits, visible, tiling.fill) if masked else logits
    if tiling.bounded or not forward:
        return logits, None if forward else tanh
    if tanh is None or masked or tiling.terms:
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
        return tiling.backend.arrays.surely((state.total > LEAST) & xp.isfinite(state.output), True)
    return _sees(tiling, state.base)


def _sees(tiling: Tiling, base: Array) -> bool:
    """Whether every row has a logit beside which the fill vanishes; False where it cannot be known."""
    return tiling.backend.arrays.surely(base > tiling.fill + 800.0, True)  # exp(-800) is zero in float64 too


def with_bounds(tiling: Tiling, block: Block) -> Block:
    """The block with what bounds its logits by Cauchy and Schwarz, if values can be looked at.

    Norms of queries, ``[lead..., rows, 1]``; of keys the largest, what no bias exceeds, and of values beside a mask the
    sum of norms, which says whether all are finite: ``[lead..., 1, 1]``.
    """
    (query, *_), (key, value), xp, norms = *block[:2], tiling.backend.xp, tiling.backend.tiles.norms
    if not tiling.backend.arrays.inspects(query):
        return block
    rows, columns = (norms(x)[..., None] for x in (query, key))
    columns = xp.max(columns, axis=-2, keepdims=True)
    size = bound(tiling.backend, tiling.terms, block.pairs.bias, block.parameters)
    values = None if tiling.expression is None else xp.sum(norms(value), axis=-1)[..., None, None]
    return block._replace(pairs=block.pairs._replace(bounds=(rows, columns, size, values)))


def _inspected(tiling: Tiling, block: Block) -> Tiling:
    """The tiling with the shortcuts that are right for these rows, which are of one batch entry.

    Logits that are small need no maximum, since exp is far from overflow and underflow, and lose less than Flax's in
    a sum in float32; of a partial the maximum is wanted. Where a value is not finite, no key may be left out: Flax
    multiplies it by weights of zero.
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
    bounded = finite and not tiling.options.partial and arrays.surely(capped <= BOUND, True)
    if bounded and tiling.terms:
        bounded = size is not None and arrays.surely(capped + xp.max(size) <= BOUND, True)
    return tiling._replace(bounded=bounded, precise=tiling.precise and not small, skip=tiling.skip and finite)


def backward(
    tiling: Tiling, block: Block, output: Array, base: Array, total: Array, doutput: Array, dtotal: Array | None = None
) -> Gradients:
    """The gradients, each in the shape of what it belongs to, from that of the output.

    Those of a partial also from that of its total, beside which the base counts as a constant.
    """
    backend, sinks = tiling.backend, block.pairs.sinks
    bias = _those(tiling, block.pairs.bias, lambda axes: True)
    real = [tiling.of_bias and "float" in backend.arrays.dtype_name(x) for x in block.parameters]
    parameters = tuple([x if has else None for x, has in zip(block.parameters, real, strict=True)])
    wanted = (block.rows[0], *block.columns, bias, parameters, sinks)
    if block.empty:
        return tree_map(backend.xp.zeros_like, wanted)
    block = with_bounds(tiling, unspoiled(backend.xp, block))
    pairs = block.pairs._replace(statistics=(base, total, dtotal))
    whole = block._replace(rows=(block.rows[0], doutput, output), pairs=pairs)
    by_row, summed = (_those(tiling, bias, lambda axes, rows=rows: axes[0] is rows) for rows in (True, False))
    like = (block.rows[0], by_row, sinks), (*block.columns, summed, parameters)
    draw = partial(threefry.keep_at, backend.xp, tiling.keep_prob)
    results = backend.tiles.map_rows(partial(pull_back, tiling), whole, (everything(block),), tiling.sizes, like, draw)
    (dquery, dbias_rows, dsinks), (dkey, dvalue, dbias, dparameters) = results
    dbias = tuple([x if y is None else y for x, y in zip(dbias, dbias_rows, strict=True)])
    gradients = (dquery, dkey, dvalue, dbias, dparameters, dsinks)
    return tree_map(lambda x, gradient: sum_to(backend.xp, gradient, x.shape), wanted, gradients)


def _those(tiling: Tiling, bias: Any, are: Any) -> tuple[Any, ...]:
    """What belongs to those operands of the bias, integers apart, of whose axes something holds; else None."""
    pairs = zip(bias, tiling.bias_axes, strict=True)
    return tuple([x if tiling.of_bias and axes is not None and are(axes) else None for x, axes in pairs])


def prologue(tiling: Tiling, block: Block) -> Block:
    """What every tile of some queries needs: scaled queries and doutput over total as rows; base and delta."""
    tiles, (query, doutput, output), xp = tiling.backend.tiles, block.rows, tiling.backend.xp
    base, total, dtotal = block.pairs.statistics
    if dtotal is not None:  # where every logit is minus infinity, the output is NaN
        output, total = xp.where(total == 0.0, 0.0, output), xp.where(total == 0.0, 1.0, total)
    base = None if tiling.backend.arrays.surely(base == 0.0, True) else finite(tiles, base)
    delta = tiles.row_sum(doutput * output) / total
    delta = delta if dtotal is None else delta - dtotal
    rows = query / (tiling.root / tiling.unit), doutput / (total * float(tiling.keep_prob))
    return Block(rows, block.columns, block.pairs._replace(statistics=(base, delta)), block.parameters)


def pull_back(tiling: Tiling, parts: tuple[Block, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """For some queries: the gradients that have rows, and what they add to those that have none."""
    tiles, base = tiling.backend.tiles, parts[0].pairs.statistics[0]
    # What was rounded in the forward pass is rounded alike here: in the weights of large logits errors then cancel.
    tiling = _inspected(tiling, parts[0])
    unbased = tiling.backend.arrays.surely(base == 0.0, True)
    tiling = tiling._replace(skip=tiling.skip and _sees(tiling, base), bounded=tiling.bounded and unbased)
    step, block = partial(pull_tile, tiling), prologue(tiling, parts[0])
    (dquery, dbias, dparameters), (dkey, dvalue, by_column) = tiles.scan_columns(step, None, block, tiling.sizes)
    dquery, dkey = dquery / tiling.root, dkey if tiling.unit == 1.0 else dkey / tiling.unit
    if (dsinks := block.pairs.sinks) is not None:
        (base, delta), sinks = block.pairs.statistics, dsinks
        dsinks = -tiling.backend.xp.exp(sinks if base is None else sinks - base) * delta
        dsinks = sum_to(tiling.backend.xp, dsinks, (*sinks.shape[:-2], *dsinks.shape[-2:]))
    dbias = tuple([x if y is None else tiles.transpose(y) for x, y in zip(dbias, by_column, strict=True)])
    by_row, summed = (_those(tiling, dbias, lambda axes, rows=rows: axes[0] is rows) for rows in (True, False))
    return (dquery, by_row, dsinks), (dkey, dvalue, summed, dparameters)


def pull_tile(tiling: Tiling, state: Any, tile: Block) -> tuple[Any, tuple[Array, Array, tuple[Array | None, ...]]]:
    """One tile of the formulas above: dquery, and what of the bias has no columns, so far; dkey, dvalue and what of the
    bias has columns, of the tile, columns first.
    """
    backend, tiles, xp = tiling.backend, tiling.backend.tiles, tiling.backend.xp
    (query, doutput), (key, value) = tile.rows, tile.columns
    base, delta = tile.pairs.statistics
    visible, keep = tile_visible(tiling, tile), tile_keep(tiling, tile)
    if tiling.skip and not tiling.terms and backend.arrays.surely(visible, False):  # every weight is zero
        zeros = [xp.zeros_like(x) for x in (query, key, value)]
        return (zeros[0], (), ()) if state is None else state, (zeros[1], zeros[2], ())

    product = partial(tiles.product, precision=tiling.options.precision)
    logits, capped = tile_logits(tiling, tile, visible, False)
    weights = tile_weights(tiling, logits, visible, base)
    dweights = product(doutput, tiles.transpose(value), scratch="" if tiling.terms else "dweights")
    kept = weights
    if keep is not None:
        kept, dweights = xp.where(keep, weights, 0.0), tiles.fill(dweights, keep, 0.0)
    dvalue = sum_to(xp, product(tiles.transpose(kept), doutput), value.shape)
    dlogits = tiles.times_minus(weights, dweights, delta)
    if visible is not None:
        dlogits = tiles.fill(dlogits, visible, 0.0)
    dbias, dparameters = _of_bias(tiling, tile, dlogits)
    if capped is not None:
        dlogits = tiles.uncap(dlogits, capped)
    dquery = sum_to(xp, product(dlogits, key), query.shape)
    dkey = sum_to(xp, product(tiles.transpose(dlogits), query), key.shape)
    more = dquery, _those(tiling, dbias, lambda axes: not axes[1]), dparameters
    by_column = tree_map(tiles.transpose, _those(tiling, dbias, lambda axes: axes[1]))
    return more if state is None else tree_map(operator.add, state, more), (dkey, dvalue, by_column)


def _of_bias(tiling: Tiling, tile: Block, dlogits: Array) -> tuple[tuple[Array | None, ...], tuple[Array | None, ...]]:
    """The gradients of the operands and the parameters of the bias of a tile, in their shapes."""
    xp, operands = tiling.backend.xp, tile.pairs.bias
    if not (tiling.terms and tiling.of_bias):
        return (None,) * len(operands), (None,) * len(tile.parameters)
    of_operands, of_parameters = gradients(tiling.backend, tiling.terms, operands, dlogits, tiling.dtype)
    return (
        tuple([sum_to(xp, of_operands[n], x.shape) if n in of_operands else None for n, x in enumerate(operands)]),
        tuple([sum_to(xp, of_parameters[n], x.shape) for n, x in enumerate(tile.parameters)]),
    )
