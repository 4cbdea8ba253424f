"""Attention a tile at a time: the same numbers within Flax's own error, in memory that grows with the lengths alone.

Forward, for some queries at a time: the `partials` of their tiles of keys are merged into one, then normalized.
Backward, from the row statistics that the forward pass leaves: tile by tile, with weights = exp(logits - maximum)
recomputed, doutput already divided by total, and delta the row sums of doutput * output,

    dvalue = weights^T . doutput      dlogits = weights * (doutput . value^T - delta), zero where masked
    dquery = dlogits . key            dkey = dlogits^T . query            dbias = dlogits

How tiles are cut, looped over and shared among threads is the backend's part: `map_rows` and `scan_columns`.

Source of the backward formulas: Dao et al., FlashAttention (2022). Maximum and total are kept apart, because the
maximum of a row that sees nothing is finfo.min, which would absorb the logarithm of the total.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from anyattention import dtypes, masks, random
from anyattention.attention import Dropout
from anyattention.backend import Backend
from anyattention.blocks import Block, Pairs, cut_columns, cut_rows, tree_map
from anyattention.partials import Partial, finish, merge, of_hidden, of_tile, shift

Array = Any
Gradients = tuple[Array, Array, Array, Array | None]


class Call(NamedTuple):
    """What is the same in every tile."""

    backend: Backend
    dtype: str  # of logits and accumulators: at least float32
    fill: float  # the logit of a masked key: finfo.min of the compute dtype
    keep_prob: Any
    tiles: tuple[int, int]  # rows and columns of a tile
    bias_axes: tuple[bool, bool] = (False, False)  # whether the bias has rows, and columns, of its own
    expression: masks.Expression | None = None  # the mask, over the arrays in `Pairs.mask`
    groups: tuple[tuple[int, int, int, int], ...] = ()  # rows from, to, and which columns those may see at most
    precision: Any = None
    left_out: int = 0  # how many keys are not in the block, hidden from all its rows
    skip: bool = False  # leave hidden tiles out, which is right where a row sees anything at all


# --- forward ---


def forward(call: Call, block: Block) -> tuple[Array, Array, Array]:
    """Output, maximum and total of every query, ``[lead..., rows, *]``."""
    if block.empty:
        shape = (*block.lead, block.lengths[0])
        sizes = (block.columns[1].shape[-1], 1, 1)
        return tuple(call.backend.zeros((*shape, size), block.rows[0]) for size in sizes)
    results = []
    for start, stop, first, last in call.groups:
        part = cut_columns(cut_rows(block, start, stop), first, last)
        left_out = block.lengths[1] - (last - first)
        if left_out:
            before, after = cut_columns(block, 0, first), cut_columns(block, last, block.lengths[1])
            sums = [call.backend.column_sum(x.columns[1]) for x in (before, after) if x.lengths[1]]
            part = part._replace(hidden=sum(sums[1:], sums[0]))
        results.append(call.backend.map_rows(partial(attend, call._replace(left_out=left_out)), part, call.tiles)[0])
    return call.backend.join_rows(results)


def attend(call: Call, block: Block) -> tuple[tuple[Array, ...], tuple[()]]:
    """Output, maximum and total of some queries, over all their keys."""
    backend = call.backend
    state: Any = None
    if block.lengths[1]:
        state, _ = backend.scan_columns(partial(absorb, call), block, call.tiles)
        if call.skip and not (state and _sees(call, state.maximum)):
            return attend(call._replace(skip=False), block)
    if block.hidden is not None:
        hidden = of_hidden(backend, block.rows[0], call.fill, call.left_out, block.hidden)
        state = hidden if state is None else merge(backend, state, hidden)
    return (finish(state, call.keep_prob), state.maximum, state.total), ()


def absorb(call: Call, state: Partial | None, tile: Block) -> tuple[Partial | None, tuple[()]]:
    """The partial of the keys so far, with those of the tile."""
    visible = tile_visible(call, tile)
    if call.skip and call.backend.surely(visible, False):
        return state, ()
    logits, keep = tile_logits(call, tile, visible), tile_keep(call, tile)
    new = of_tile(call.backend, logits, tile.columns[1], keep, call.precision)
    return (new if state is None else merge(call.backend, state, new)), ()


def tile_visible(call: Call, tile: Block) -> Array | None:
    """Where the mask lets a query see a key; None for everywhere."""
    arrays = tile.pairs.mask
    return None if call.expression is None else masks.visible(call.backend, call.expression, arrays)


def tile_logits(call: Call, tile: Block, visible: Array | None) -> Array:
    """The logits of a tile, ``[lead..., rows, columns]``."""
    backend, bias = call.backend, tile.pairs.bias
    logits = backend.matmul(tile.rows[0], backend.transpose(tile.columns[0]), call.precision)
    if bias is not None:
        logits = logits + backend.cast(bias, call.dtype)
    if visible is None:
        return logits
    grown = any(size > 1 == other for size, other in zip(visible.shape, logits.shape, strict=True))
    if not grown and backend.surely(visible, True):
        return logits
    return backend.fill(logits, visible, call.fill)


def tile_keep(call: Call, tile: Block) -> Array | None:
    """Which weights of a tile dropout keeps; None for all."""
    counts = tile.pairs.counts
    return None if counts is None else random.keep_at(call.backend.xp, call.keep_prob, counts)


def _sees(call: Call, maximum: Array) -> bool:
    """Whether every row has a logit beside which the fill vanishes; False where it cannot be known."""
    return call.backend.surely(maximum > call.fill + 800.0, True)  # exp(-800) is zero in float64 too


# --- backward ---


def backward(call: Call, block: Block, output: Array, maximum: Array, total: Array, doutput: Array) -> Gradients:
    """The gradients of query, key, value and bias, each in its own shape, from that of the output."""
    backend, bias = call.backend, block.pairs.bias
    if block.empty:
        return tree_map(backend.xp.zeros_like, (block.rows[0], *block.columns, bias))
    delta = backend.row_sum(doutput * output) / total
    call = call._replace(skip=call.skip and _sees(call, maximum))
    tiles = Block(
        (block.rows[0], doutput / (total * call.keep_prob)),
        block.columns,
        block.pairs._replace(statistics=(maximum, delta)),
    )
    (dquery, dbias_rows), (dkey, dvalue, dbias) = backend.map_rows(partial(pull_back, call), tiles, call.tiles)
    gradients = (dquery, dkey, dvalue, dbias if dbias_rows is None else dbias_rows)
    wanted = (block.rows[0], *block.columns, bias)
    return tree_map(lambda x, gradient: sum_to(backend, gradient, x.shape), wanted, gradients)


def pull_back(call: Call, block: Block) -> tuple[tuple[Array, Array | None], tuple[Array, Array, Array | None]]:
    """For some queries: the gradients that have rows, and what they add to those that have none."""
    backend, bias = call.backend, block.pairs.bias
    dquery, (dkey, dvalue, dbias) = backend.scan_columns(partial(pull_tile, call), block, call.tiles)
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
    maximum, delta = tile.pairs.statistics
    visible, keep = tile_visible(call, tile), tile_keep(call, tile)
    if call.skip and bias is None and backend.surely(visible, False):  # every weight is zero
        zeros = [backend.xp.zeros_like(x) for x in (query, key, value)]
        return zeros[0] if dquery is None else dquery, (zeros[1], zeros[2], None)

    product = partial(backend.matmul, precision=call.precision)
    weights = backend.exp_minus(tile_logits(call, tile, visible), shift(backend, maximum))
    dweights = product(doutput, backend.transpose(value))
    kept = weights
    if keep is not None:
        kept, dweights = (backend.xp.where(keep, x, 0.0) for x in (weights, dweights))
    dvalue = sum_to(backend, product(backend.transpose(kept), doutput), value.shape)
    dlogits = weights * (dweights - delta)
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


# --- from Flax's layout and back ---


def attention(
    backend: Backend,
    dtype: str,
    query: Array,
    key: Array,
    value: Array,
    bias: Any,
    mask: Any,
    dropout: Dropout | None,
    precision: Any,
    force_fp32: bool,
) -> Array:
    """The output, ``[batch..., q_length, num_heads, v_depth]``; arguments as the exact implementation's.

    Sums are in float32 at least; `force_fp32` returns them so.
    """
    call, block = prepare(backend, dtype, query, key, value, bias, mask, dropout, precision)
    output = backend.differentiable(forward, backward, call, block)
    return restore(backend, output, result_dtype(dtype, force_fp32), grouped=query.shape[-2] != key.shape[-2])


def vjp(
    backend: Backend,
    dtype: str,
    query: Array,
    key: Array,
    value: Array,
    bias: Any,
    mask: Any,
    dropout: Dropout | None,
    precision: Any,
    force_fp32: bool,
) -> tuple[Array, Callable[[Array], Gradients]]:
    """The output, and a function from its gradient to those of query, key, value and bias."""
    call, block = prepare(backend, dtype, query, key, value, bias, mask, dropout, precision)
    grouped = query.shape[-2] != key.shape[-2]
    results = backend.compiled(forward, call, block)

    def pullback(doutput: Array) -> Gradients:
        doutput = heads_first(backend, doutput, results[0].ndim, key.shape[-2] if grouped else None)
        doutput = backend.cast(doutput, call.dtype)
        dquery, dkey, dvalue, dbias = backend.compiled(backward, call, block, *results, doutput)
        pairs = ((dquery / root(query), query), (dkey, key), (dvalue, value))
        gradients = [_like(backend, gradient, x, lengths_first=True) for gradient, x in pairs]
        scalar = dbias is None or not hasattr(bias, "shape")
        return *gradients, None if scalar else _like(backend, dbias, bias, lengths_first=False)

    return restore(backend, results[0], result_dtype(dtype, force_fp32), grouped), pullback


def result_dtype(dtype: str, force_fp32: bool) -> str:
    """The dtype of the output: the compute dtype, or float32 where a 16-bit call asks for a float32 softmax."""
    return dtypes.promote(dtype, "float32") if force_fp32 else dtype


def prepare(
    backend: Backend,
    dtype: str,
    query: Array,
    key: Array,
    value: Array,
    bias: Any,
    mask: Any,
    dropout: Dropout | None,
    precision: Any,
) -> tuple[Call, Block]:
    """The call as a block: heads first, all arrays of one rank, the query scaled, in the accumulators' dtype."""
    xp, kv_heads = backend.xp, key.shape[-2]
    group = kv_heads if query.shape[-2] != kv_heads else None
    wide = dtypes.promote(dtype, "float32")
    if bias is not None:
        bias = bias if hasattr(bias, "shape") else backend.adopt(bias, query)
        wide = dtypes.promote(wide, backend.dtype_name(bias))
    lengths = query.shape[-3], key.shape[-3]
    to = masks.Lowering(backend, tuple(query.shape[:-3]), lengths, query)
    mask = masks.as_mask(mask)
    expression = None if mask is None else mask.lower(to)
    rank = max(x.ndim for x in (query, bias, *to.arrays) if x is not None) + (group is not None)

    q = heads_first(backend, backend.cast(query, wide) / root(query), rank, group)
    k, v = (heads_first(backend, backend.cast(x, wide), rank, kv_heads if group else None) for x in (key, value))
    pairs = tree_map(lambda x: _pair(backend, x, rank, group), Pairs(bias, tuple(to.arrays)))
    block = Block((q,), (k, v), pairs)
    lead, (rows, columns) = block.lead, block.grown_lengths
    if rows != lengths[0]:  # one query, grown by a bias or mask
        q = xp.broadcast_to(q, (*q.shape[:-2], rows, q.shape[-1]))
    if columns != lengths[1]:
        k, v = (xp.broadcast_to(x, (*x.shape[:-2], columns, x.shape[-1])) for x in (k, v))
    if dropout is not None:
        shape = (*((1,) * len(lead) if dropout.broadcast else lead), rows, columns)
        pairs = pairs._replace(counts=random.counts(xp, backend.key_array(dropout.key), shape))
    block = Block((q,), (k, v), pairs)
    tiles = backend.tiles(block)
    return Call(
        backend,
        dtype=wide,
        fill=float(backend.lowest(dtype)),
        keep_prob=1.0 if dropout is None else dropout.keep_prob,
        tiles=tiles,
        bias_axes=(False, False) if bias is None else tuple(size != 1 for size in pairs.bias.shape[-2:]),
        expression=expression,
        groups=_groups(None if dropout else mask, block, tiles[0]),
        precision=precision,
        skip=expression is not None and backend.inspects(query),
    ), block


def _groups(mask: Any, block: Block, tile: int) -> tuple[tuple[int, int, int, int], ...]:
    """At most eight groups of rows, each with the range of columns outside which its rows see nothing."""
    rows, columns = block.lengths
    if mask is None or mask.key_range(0, 1, columns) == mask.key_range(rows - 1, rows, columns):
        return ((0, rows, 0, columns),)
    size = -(-rows // (8 * tile)) * tile
    return tuple(
        (start, stop, *mask.key_range(start, stop, columns))
        for start, stop in ((i, min(i + size, rows)) for i in range(0, rows, size))
    )


def restore(backend: Backend, output: Array, dtype: str, grouped: bool) -> Array:
    """The output as Flax shapes it, in the compute dtype."""
    if grouped:
        *batch, kv_heads, group, length, depth = output.shape
        output = backend.xp.reshape(output, (*batch, kv_heads * group, length, depth))
    return backend.cast(backend.permute(output, (-2, -3, -1)), dtype)


def root(query: Array) -> float:
    """``sqrt(depth)``; one without depth, where nothing is left to divide."""
    return max(query.shape[-1], 1) ** 0.5


def heads_first(backend: Backend, x: Array, rank: int, group: int | None) -> Array:
    """``[batch..., length, heads, *]`` as ``[1..., batch..., heads, length, *]``, the heads in two axes if grouped."""
    x = backend.permute(x, (-2, -3, -1))
    *batch, heads, length, depth = x.shape
    heads = (heads,) if group is None else (group, heads // group)
    return backend.xp.reshape(x, ((1,) * (rank - x.ndim - len(heads) + 1) + (*batch, *heads, length, depth)))


def _pair(backend: Backend, x: Array, rank: int, group: int | None) -> Array:
    """A bias or mask with all the axes of the block."""
    shape = (1,) * (rank - x.ndim - (group is not None)) + tuple(x.shape)
    if group is not None:
        heads = (1, 1) if shape[-3] == 1 else (group, shape[-3] // group)
        shape = (*shape[:-3], *heads, *shape[-2:])
    return backend.xp.reshape(x, shape)


def _like(backend: Backend, gradient: Array, x: Array, lengths_first: bool) -> Array:
    """A gradient in the block's layout as one of `x`."""
    shape = tuple(x.shape)
    if lengths_first:
        *batch, length, heads, depth = shape
        shape = (*batch, heads, length, depth)
    length = gradient.shape[-2]
    if lengths_first and length != shape[-2]:  # one query or one key, grown
        gradient = backend.xp.sum(gradient, axis=-2, keepdims=True)
    gradient = backend.xp.reshape(gradient, shape)
    if lengths_first:
        gradient = backend.permute(gradient, (-2, -3, -1))
    return backend.cast(gradient, backend.dtype_name(x))
