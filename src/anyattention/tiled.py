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

from anyattention import masks, random
from anyattention.backend import Backend
from anyattention.blocks import Block, Group, cut_columns, everything, tree_map
from anyattention.partials import Partial, finish, finite, merge, of_hidden, of_weights

Array = Any
Gradients = tuple[Array, Array, Array, Array | None]
BOUND = 20.0  # exp(20) is 5e8: sums over any length, times values, stay in the range of float32


class Call(NamedTuple):
    """What is the same in every tile."""

    backend: Backend
    dtype: str  # of logits and accumulators: at least float32
    root: float  # of the depth, which divides queries
    fill: float  # the logit of a masked key: finfo.min of the compute dtype
    keep_prob: Any
    tiles: tuple[int, int]  # rows and columns of a tile
    bias_axes: tuple[bool, bool] = (False, False)  # whether the bias has rows, and columns, of its own
    expression: masks.Expression | None = None  # the mask, over the arrays in `Pairs.mask`
    groups: tuple[Group, ...] = ()
    precision: Any = None
    precise: bool = False  # sum logits in float64, which float32 needs where they are large
    # Shortcuts, which are right where every row sees a key: see `_sound`.
    skip: bool = False  # leave out what is hidden
    bounded: bool = False  # take exp of logits as they are


# --- forward ---


def forward(call: Call, block: Block) -> tuple[Array, Array, Array]:
    """Output, base and total of every query, ``[lead..., rows, *]``."""
    if block.empty:
        shape = (*block.lead, block.lengths[0])
        sizes = (block.columns[1].shape[-1], 1, 1)
        return tuple(call.backend.zeros((*shape, size), block.rows[0]) for size in sizes)
    call = _inspected(call, block)
    like = (block.rows[0],) * 3, ()
    return call.backend.map_rows(partial(attend, call), block, call.groups, call.tiles, like)[0]


def attend(call: Call, parts: tuple[Block, ...]) -> tuple[tuple[Array, ...], tuple[()]]:
    """Output, base and total of some queries, over all their keys, which are in several blocks."""
    backend = call.backend
    unit = backend.power_unit if call.bounded else 1.0
    query, hidden = parts[0].rows[0], parts[0].hidden
    scaled = query / (call.root / unit)
    state: Any = None
    for part in parts:
        if part.lengths[1]:
            part = part._replace(rows=(scaled,))
            state, _ = backend.scan_columns(partial(absorb, call), state, part, call.tiles)
    if call.skip or call.bounded:
        if state is None or not _sound(call, state):
            return attend(call._replace(skip=False, bounded=False), parts)
    elif hidden:
        hidden = of_hidden(backend, query, call.fill, hidden)
        state = hidden if state is None else merge(backend, state, hidden)
    base = backend.xp.zeros_like(state.total) if state.base is None else state.base
    return (finish(state, call.keep_prob), base, state.total), ()


def absorb(call: Call, state: Partial | None, tile: Block) -> tuple[Partial | None, tuple[()]]:
    """The partial of the keys so far, with those of the tile."""
    backend, visible = call.backend, tile_visible(call, tile)
    if call.skip and visible is not None:
        start, stop = backend.span(visible)
        if start == stop:
            return state, ()
        if stop - start < visible.shape[-1]:
            tile = cut_columns(tile, start, stop)
            visible = tile_visible(call, tile)
    base, weights = tile_weights(call, tile, visible)
    new = of_weights(backend, base, weights, tile_keep(call, tile), tile.columns[1], call.precision)
    return (new if state is None else merge(backend, state, new)), ()


def tile_visible(call: Call, tile: Block) -> Array | None:
    """Where the mask lets a query see a key; None for everywhere."""
    if call.expression is None or tile.pairs.mask is None:
        return None
    visible = masks.visible(call.backend, call.expression, tile.pairs.mask)
    return None if call.backend.surely(visible, True) else visible


def tile_weights(call: Call, tile: Block, visible: Array | None) -> tuple[Array | None, Array]:
    """The largest logit of each row, and exp of the logits relative to it; without one where they are bounded."""
    backend = call.backend
    if call.bounded:
        weights = backend.power(tile_logits(call, tile))
        return None, weights if visible is None else backend.fill(weights, visible, 0.0)
    logits = tile_logits(call, tile)
    if visible is not None:
        logits = backend.fill(logits, visible, call.fill)
    base = backend.row_max(logits)
    return base, backend.exp_minus(logits, finite(backend, base))


def tile_logits(call: Call, tile: Block) -> Array:
    """The logits of a tile, ``[lead..., rows, columns]``, before the mask."""
    backend, bias = call.backend, tile.pairs.bias
    logits = backend.logits(tile.rows[0], tile.columns[0], call.precision, call.precise)
    return logits if bias is None else logits + backend.cast(bias, call.dtype)


def tile_keep(call: Call, tile: Block) -> Array | None:
    """Which weights of a tile dropout keeps; None for all."""
    counts = tile.pairs.counts
    return None if counts is None else random.keep_at(call.backend.xp, call.keep_prob, counts)


def _sound(call: Call, state: Partial) -> bool:
    """Whether the shortcuts that the call takes were right for all rows."""
    if call.bounded:
        return call.backend.surely((state.total > 0.0) & call.backend.xp.isfinite(state.output), True)
    return _sees(call, state.base)


def _sees(call: Call, base: Array) -> bool:
    """Whether every row has a logit beside which the fill vanishes; False where it cannot be known."""
    return call.backend.surely(base > call.fill + 800.0, True)  # exp(-800) is zero in float64 too


def _inspected(call: Call, block: Block) -> Call:
    """The call with what is known of its logits by Cauchy and Schwarz, a bias apart.

    Those that are small need no maximum, since exp is far from overflow and underflow, and lose less than Flax's in
    a sum in float32.
    """
    backend, query, key = call.backend, block.rows[0], block.columns[0]
    if not backend.inspects(query):
        return call
    largest = (backend.xp.max(backend.xp.vecdot(x, x)) for x in (query, key))
    small = backend.surely(math.prod(largest) <= (BOUND * call.root) ** 2, True)
    return call._replace(bounded=small and block.pairs.bias is None, precise=call.precise and not small)


# --- backward ---


def backward(call: Call, block: Block, output: Array, base: Array, total: Array, doutput: Array) -> Gradients:
    """The gradients of query, key, value and bias, each in its own shape, from that of the output."""
    backend, bias = call.backend, block.pairs.bias
    if block.empty:
        return tree_map(backend.xp.zeros_like, (block.rows[0], *block.columns, bias))
    call = _inspected(call, block)
    unbased = backend.surely(base == 0.0, True)
    # What was rounded in the forward pass is rounded alike here: in the weights of large logits errors then cancel.
    call = call._replace(skip=call.skip and _sees(call, base), bounded=call.bounded and unbased)
    statistics = None if unbased else base, total
    whole = Block((block.rows[0], doutput, output), block.columns, block.pairs._replace(statistics=statistics))
    by_row = call.bias_axes[0]
    like = (block.rows[0], bias if by_row else None), (*block.columns, None if by_row else bias)
    results = backend.map_rows(partial(pull_back, call), whole, (everything(block),), call.tiles, like)
    (dquery, dbias_rows), (dkey, dvalue, dbias) = results
    gradients = (dquery, dkey, dvalue, dbias_rows if by_row else dbias)
    wanted = (block.rows[0], *block.columns, bias)
    return tree_map(lambda x, gradient: sum_to(backend, gradient, x.shape), wanted, gradients)


def pull_back(
    call: Call, parts: tuple[Block, ...]
) -> tuple[tuple[Array, Array | None], tuple[Array, Array, Array | None]]:
    """For some queries: the gradients that have rows, and what they add to those that have none."""
    (block,) = parts
    backend, bias = call.backend, block.pairs.bias
    query, doutput, output = block.rows
    base, total = block.pairs.statistics
    delta = backend.row_sum(doutput * output) / total
    unit = backend.power_unit if call.bounded else 1.0
    rows = (query / (call.root / unit), doutput / (total * call.keep_prob))
    block = Block(rows, block.columns, block.pairs._replace(statistics=(finite(backend, base), delta)))
    dquery, (dkey, dvalue, dbias) = backend.scan_columns(partial(pull_tile, call), None, block, call.tiles)
    dquery, dkey = dquery / call.root, dkey if unit == 1.0 else dkey / unit
    if bias is None:
        return (dquery, None), (dkey, dvalue, None)
    dbias = backend.transpose(dbias)
    by_row, by_column = call.bias_axes
    if not by_column:
        dbias = backend.row_sum(dbias)
    return (dquery, dbias if by_row else None), (dkey, dvalue, None if by_row else dbias)


def pull_tile(call: Call, dquery: Array | None, tile: Block) -> tuple[Array, tuple[Array, Array, Array | None]]:
    """One tile of the formulas above: dquery so far; dkey, dvalue and dbias of the tile, columns first."""
    backend, bias = call.backend, tile.pairs.bias
    (query, doutput), (key, value) = tile.rows, tile.columns
    base, delta = tile.pairs.statistics
    visible, keep = tile_visible(call, tile), tile_keep(call, tile)
    if call.skip and bias is None and backend.surely(visible, False):  # every weight is zero
        zeros = [backend.xp.zeros_like(x) for x in (query, key, value)]
        return zeros[0] if dquery is None else dquery, (zeros[1], zeros[2], None)

    product = partial(backend.matmul, precision=call.precision)
    if call.bounded:
        _, weights = tile_weights(call, tile, visible)
    else:
        logits = tile_logits(call, tile)
        if visible is not None:
            logits = backend.fill(logits, visible, call.fill)
        weights = backend.exp_minus(logits, base)
    dweights = product(doutput, backend.transpose(value), scratch="" if bias is not None else "dweights")
    kept = weights
    if keep is not None:
        kept, dweights = backend.xp.where(keep, weights, 0.0), backend.fill(dweights, keep, 0.0)
    dvalue = sum_to(backend, product(backend.transpose(kept), doutput), value.shape)
    dlogits = backend.times_minus(weights, dweights, delta)
    if visible is not None:
        dlogits = backend.fill(dlogits, visible, 0.0)
    more = sum_to(backend, product(dlogits, key), query.shape)
    dkey = sum_to(backend, product(backend.transpose(dlogits), query), key.shape)
    dbias = None
    if bias is not None:
        shape = (*bias.shape[:-2], dlogits.shape[-2] if call.bias_axes[0] else 1, dlogits.shape[-1])
        dbias = backend.transpose(sum_to(backend, dlogits, shape))
    return more if dquery is None else dquery + more, (dkey, dvalue, dbias)


def sum_to(backend: Backend, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` summed over the axes along which an array of `shape` was broadcast to it."""
    extra = x.ndim - len(shape)
    if extra:
        x = backend.xp.sum(x, axis=tuple(range(extra)))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return backend.xp.sum(x, axis=axes, keepdims=True) if axes else x
