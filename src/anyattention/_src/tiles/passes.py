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

import functools
import math
import operator
from typing import Any

from anyattention._src.blocks import Block, cut_columns, everything, sum_to, tree_map
from anyattention._src.hidden import unspoiled
from anyattention._src.interfaces import is_floating
from anyattention._src.rules import gradients_of_terms, sum_of_terms, visible
from anyattention._src.tiles.partials import Partial, finish, finish_some, finite, merge, of_hidden, of_sinks
from anyattention._src.tiles.tiling import BOUND, Tiling, inspected, sees, sound, with_bounds

Array = Any
Gradient = tuple[Array | None, ...]  # of a bias: of each of its operands, or of each of its parameters
# Of query, key, value, the operands and the parameters of the bias, and sinks.
Gradients = tuple[Array, Array, Array, Gradient, Gradient, Array | None]


def forward(tiling: Tiling, block: Block, each: Any = None) -> tuple[Array, Array, Array]:
    """Output, base and total of every query, ``[lead..., rows, *]``; or what `each` finds in place of `attend`."""
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
    step = functools.partial(each or attend, tiling)
    return tiling.backend.tiles.map_rows(step, block, tiling.groups, tiling.sizes, like, tiling.draw)[0]


def attend(tiling: Tiling, parts: tuple[Block, ...]) -> tuple[tuple[Array, ...], tuple[()]]:
    """Output, base and total of some queries, over all their keys, which are in several blocks."""
    xp, spoiled, tiling = tiling.backend.xp, parts[0].spoiled, inspected(tiling, parts[0])
    state = absorbed(tiling, parts)
    if (tiling.skip or tiling.bounded) and (state is None or not sound(tiling, state)):
        state = absorbed(tiling._replace(skip=False, bounded=False), parts)
    if (sinks := parts[0].pairs.sinks) is not None:
        small = state.base is None and tiling.backend.arrays.surely(xp.abs(sinks) <= BOUND, True)
        state = merge(tiling.backend.tiles, state, of_sinks(xp, sinks, state, small))
    base = xp.zeros_like(state.total) if state.base is None else state.base
    if tiling.options.partial:
        output = finish_some(xp, state, tiling.keep_prob)
    else:
        output = finish(state, tiling.keep_prob)
    if spoiled is not None:
        output = xp.where(base <= tiling.fill + 100.0, output + spoiled, output)  # hidden keys have some weight
    return (output, base, state.total), ()


def attend_some(tiling: Tiling, parts: tuple[Block, ...]) -> tuple[Partial, tuple[()]]:
    """The partial of some queries over keys beside which there are others; a row may see none of these."""
    arrays, xp, tiling = tiling.backend.arrays, tiling.backend.xp, inspected(tiling, parts[0])
    state, spoiled = absorbed(tiling, parts), parts[0].spoiled
    if tiling.bounded and state is not None and tiling.options.dropout is None and not tiling.terms:
        shown, base = state.total > 0.0, xp.zeros_like(state.total)
        if not arrays.surely(shown, True):
            closed = of_hidden(tiling.backend.tiles, base, tiling.fill, tuple([x.columns[1] for x in parts]))
            base, *rest = (xp.where(shown, x, y) for x, y in zip((base, *state[1:]), closed, strict=True))
            state = Partial(base, *rest)
        right = arrays.surely(xp.isfinite(state.output), True)
    else:
        right = not (tiling.skip or tiling.bounded) or (state is not None and sound(tiling, state))
    if not right:
        state = absorbed(tiling._replace(skip=False, bounded=False), parts)
    base = xp.zeros_like(state.total) if state.base is None else state.base
    if spoiled is None:
        return Partial(base, state.total, state.output), ()
    low = base <= tiling.fill + 100.0  # where each key has the weight of one
    count = sum(x.lengths[1] for x in parts) + sum(x.shape[-2] for x in parts[0].hidden)
    return Partial(base, state.total, xp.where(low, state.output + spoiled * count, state.output)), ()


def absorbed(tiling: Tiling, parts: tuple[Block, ...]) -> Any:
    """The partial of some queries over the keys of all the blocks; None where all of them are left out."""
    tiles = tiling.backend.tiles
    query, hidden = parts[0].rows[0], parts[0].hidden
    scaled = query / (tiling.root / tiling.unit)
    state: Any = None
    for part in parts:
        if part.lengths[1]:
            part = part._replace(rows=(scaled,))
            state, _ = tiles.scan_columns(functools.partial(absorb, tiling), state, part, tiling.sizes)
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
    logits, tanh = tile_logits(tiling, tile, visible, again=False)
    base, keep = tile_base(tiling, logits, tanh, visible), tile_keep(tiling, tile)
    weights = tile_weights(tiling, logits, visible, finite(tiles, base))
    total = tiles.row_sum(weights)
    if keep is not None:  # dropout takes weights out of the output, never out of the normalizer
        weights = tiles.fill(weights, keep, 0.0)
    scratch = "" if state is None else "output"
    new = Partial(base, total, tiles.product(weights, tile.columns[1], tiling.options.precision, scratch))
    return (new if state is None else merge(tiles, state, new)), ()


def tile_visible(tiling: Tiling, tile: Block) -> Array | None:
    """Where the mask lets a query see a key; None for everywhere."""
    if tiling.expression is None or tile.pairs.mask is None:
        return None
    arrays = tiling.backend.arrays
    shown = visible(arrays, tiling.expression, tile.pairs.mask)
    return None if arrays.surely(shown, True) else shown


def tile_logits(tiling: Tiling, tile: Block, visible: Array | None, again: bool) -> tuple[Array, Array | None]:
    """The logits of a tile, ``[lead..., rows, columns]``; masked, unless they are bounded: then weights are.

    And the tanh of those that are capped, which libraries that overwrite it return only if it is needed `again`.
    """
    tiles, tanh = tiling.backend.tiles, None
    unit = tiles.power_unit if tiling.bounded else 1.0
    logits = tiles.logits(tile.rows[0], tile.columns[0], tiling.options.precision, tiling.precise)
    if (cap := tiling.options.logits_soft_cap) is not None:
        logits = logits if cap * tiling.unit == 1.0 else logits / (cap * tiling.unit)
        logits, tanh = tiles.cap(logits, cap * unit, again)
    if tiling.terms:
        bias = sum_of_terms(tiling.backend, tiling.terms, tile.pairs.bias, tile.parameters, tiling.dtype, unit)
        logits = tiles.plus(logits, bias)
    if visible is not None and not tiling.bounded:
        logits = tiles.fill(logits, visible, tiling.fill)
    return logits, tanh


def tile_base(tiling: Tiling, logits: Array, tanh: Array | None, visible: Array | None) -> Array | None:
    """The largest logit of each row of a tile, ``[lead..., rows, 1]``; None, which stands for zero, if bounded."""
    tiles = tiling.backend.tiles
    if tiling.bounded:
        return None
    if tanh is None or visible is not None or tiling.terms:
        return tiles.row_max(logits)
    # Of the logits themselves XLA would write all to memory for their maximum.
    return tiles.row_max(tanh) * tiling.options.logits_soft_cap


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
        return tiling.draw(counts)
    return counts


def backward(
    tiling: Tiling,
    block: Block,
    output: Array | None,
    base: Array,
    total: Array,
    doutput: Array,
    dtotal: Array | None = None,
) -> Gradients:
    """The gradients, each in the shape of what it belongs to, from that of the output.

    Those of a partial also from that of its total, beside which the base counts as a constant. Without the output,
    what it has to do with the gradients is in that of the total: minus delta.
    """
    backend, sinks = tiling.backend, block.pairs.sinks
    of_bias = tiling.of_bias
    bias = tuple([x if of_bias and axes else None for x, axes in zip(block.pairs.bias, tiling.bias_axes, strict=True)])
    parameters = tuple([x if of_bias and is_floating(backend.arrays, x) else None for x in block.parameters])
    wanted = (block.rows[0], *block.columns, bias, parameters, sinks)
    if block.empty:
        return tree_map(backend.xp.zeros_like, wanted)
    block = with_bounds(tiling, unspoiled(backend.xp, block))
    pairs = block.pairs._replace(statistics=(base, total, dtotal))
    rows = (block.rows[0], doutput) if output is None else (block.rows[0], doutput, output)
    whole = block._replace(rows=rows, pairs=pairs)
    by_row, summed = _split(tiling, bias, 0)
    like = (block.rows[0], by_row, sinks), (*block.columns, summed, parameters)
    step = functools.partial(pull_back, tiling)
    results = backend.tiles.map_rows(step, whole, (everything(block),), tiling.sizes, like, tiling.draw)
    (dquery, dbias_rows, dsinks), (dkey, dvalue, dbias_summed, dparameters) = results
    found = (dquery, dkey, dvalue, _together(dbias_rows, dbias_summed), dparameters, dsinks)
    return tree_map(lambda x, gradient: sum_to(backend.xp, gradient, x.shape), wanted, found)


def _split(tiling: Tiling, dbias: Gradient, axis: int) -> tuple[Gradient, Gradient]:
    """The gradients of operands of the bias that have rows (axis 0) or columns (axis 1), and of those that have not."""

    def those(has: bool) -> Gradient:  # of integers there is none
        pairs = zip(dbias, tiling.bias_axes, strict=True)
        return tuple([x if axes is not None and axes[axis] is has else None for x, axes in pairs])

    return those(True), those(False)


def _together(one: Gradient, other: Gradient) -> Gradient:
    """What `_split` takes apart."""
    return tuple([y if x is None else x for x, y in zip(one, other, strict=True)])


def prologue(tiling: Tiling, block: Block) -> Block:
    """What every tile of some queries needs: scaled queries and doutput over total as rows; base and delta."""
    tiles, (query, doutput, *outputs), xp = tiling.backend.tiles, block.rows, tiling.backend.xp
    base, total, dtotal = block.pairs.statistics
    output = outputs[0] if outputs else None
    if output is not None and dtotal is not None:  # where every logit is minus infinity, the output is NaN
        output, total = xp.where(total == 0.0, 0.0, output), xp.where(total == 0.0, 1.0, total)
    base = None if tiling.backend.arrays.surely(base == 0.0, True) else finite(tiles, base)
    delta = 0.0 if output is None else tiles.row_sum(doutput * output) / total
    delta = delta if dtotal is None else delta - dtotal
    rows = query / (tiling.root / tiling.unit), doutput / (total * float(tiling.keep_prob))
    return Block(rows, block.columns, block.pairs._replace(statistics=(base, delta)), block.parameters)


def pull_back(tiling: Tiling, parts: tuple[Block, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """For some queries: the gradients that have rows, and what they add to those that have none."""
    tiles, base = tiling.backend.tiles, parts[0].pairs.statistics[0]
    # What was rounded in the forward pass is rounded alike here: in the weights of large logits errors then cancel.
    tiling = inspected(tiling, parts[0])
    unbased = tiling.backend.arrays.surely(base == 0.0, True)
    tiling = tiling._replace(skip=tiling.skip and sees(tiling, base), bounded=tiling.bounded and unbased)
    step, block = functools.partial(pull_tile, tiling), prologue(tiling, parts[0])
    (dquery, dbias, dparameters), (dkey, dvalue, by_column) = tiles.scan_columns(step, None, block, tiling.sizes)
    dquery, dkey = dquery / tiling.root, dkey if tiling.unit == 1.0 else dkey / tiling.unit
    if (dsinks := block.pairs.sinks) is not None:
        (base, delta), sinks = block.pairs.statistics, dsinks
        dsinks = -tiling.backend.xp.exp(sinks if base is None else sinks - base) * delta
        dsinks = sum_to(tiling.backend.xp, dsinks, (*sinks.shape[:-2], *dsinks.shape[-2:]))
    by_row, summed = _split(tiling, _together(dbias, tree_map(tiles.transpose, by_column)), 0)
    return (dquery, by_row, dsinks), (dkey, dvalue, summed, dparameters)


def pull_tile(tiling: Tiling, state: Any, tile: Block) -> tuple[Any, tuple[Array, Array, Gradient]]:
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

    product = functools.partial(tiles.product, precision=tiling.options.precision)
    logits, tanh = tile_logits(tiling, tile, visible, again=True)
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
    if tanh is not None:
        dlogits = tiles.uncap(dlogits, tanh)
    dquery = sum_to(xp, product(dlogits, key), query.shape)
    dkey = sum_to(xp, product(tiles.transpose(dlogits), query), key.shape)
    by_column, summed = _split(tiling, dbias, 1)
    more = dquery, summed, dparameters
    state = more if state is None else tree_map(operator.add, state, more)
    return state, (dkey, dvalue, tree_map(tiles.transpose, by_column))


def _of_bias(tiling: Tiling, tile: Block, dlogits: Array) -> tuple[Gradient, Gradient]:
    """The gradients of the operands and the parameters of the bias of a tile, in their shapes."""
    xp, operands = tiling.backend.xp, tile.pairs.bias
    if not (tiling.terms and tiling.of_bias):
        return (None,) * len(operands), (None,) * len(tile.parameters)
    of_operands, of_parameters = gradients_of_terms(tiling.backend, tiling.terms, operands, dlogits, tiling.dtype)
    return (
        tuple([sum_to(xp, of_operands[n], x.shape) if n in of_operands else None for n, x in enumerate(operands)]),
        tuple([sum_to(xp, of_parameters[n], x.shape) for n, x in enumerate(tile.parameters)]),
    )
