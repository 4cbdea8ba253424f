"""The tiled implementation in Flax's layout: a request becomes a call and a block, and results go back.

In a block heads stand before lengths, and grouped heads are two axes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from anyattention import dtypes, masks, random
from anyattention.backend import Backend
from anyattention.blocks import Block, Group, Pairs, everything, tree_map
from anyattention.request import Request
from anyattention.tiled import Call, Gradients, backward, forward, sum_to

Array = Any


def attention(backend: Backend, request: Request) -> Array:
    """The output, ``[batch..., q_length, num_heads, v_depth]``.

    Sums are in float32 at least; `force_fp32` returns them so.
    """
    call, block = prepare(backend, request)
    output = backend.differentiable(forward, backward, call, block)
    return restore(backend, output, result_dtype(request), grouped=_group(request) is not None)


def vjp(backend: Backend, request: Request, given: Sequence[str]) -> tuple[Array, Callable[[Array], Gradients]]:
    """The output, and a function from its gradient to those of query, key, value and bias.

    `given` are the dtypes that query, key and value had before promotion, which their gradients get back.
    """
    call, block = prepare(backend, request)
    bias, group = request.bias, _group(request)
    results = backend.compiled(forward, call, block)

    def pullback(doutput: Array) -> Gradients:
        doutput = heads_first(backend, backend.cast(doutput, call.dtype), results[0].ndim, group)
        *gradients, dbias = backend.compiled(backward, call, block, *results, doutput)
        pairs = zip(gradients, (request.query, request.key, request.value), strict=True)
        like = (_like(backend, gradient, x, group) for gradient, x in pairs)
        dquery, dkey, dvalue = (
            backend.cast(gradient, name) if dtypes.is_inexact(name) else gradient
            for gradient, name in zip(like, given, strict=True)
        )
        if dbias is not None and not hasattr(bias, "shape"):
            dbias = None  # of a scalar
        elif dbias is not None:
            dbias = backend.cast(backend.xp.reshape(dbias, tuple(bias.shape)), backend.dtype_name(bias))
        return dquery, dkey, dvalue, dbias

    return restore(backend, results[0], result_dtype(request), grouped=group is not None), pullback


def result_dtype(request: Request) -> str:
    """The dtype of the output: the compute dtype, or float32 where a 16-bit call asks for a float32 softmax."""
    return dtypes.promote(request.dtype, "float32") if request.force_fp32 else request.dtype


def _group(request: Request) -> int | None:
    """The number of key heads, where several query heads share one."""
    heads, kv_heads = request.query.shape[-2], request.key.shape[-2]
    return None if heads == kv_heads else kv_heads


def prepare(backend: Backend, request: Request) -> tuple[Call, Block]:
    """The call as a block: heads first, all arrays of one rank, in the accumulators' dtype."""
    dtype, query, key, value, bias, mask, dropout, precision, _ = request
    xp, group = backend.xp, _group(request)
    wide = dtypes.promote(dtype, "float32")
    if bias is not None:
        bias = bias if hasattr(bias, "shape") else backend.adopt(bias, query)
        wide = dtypes.promote(wide, backend.dtype_name(bias))
    lengths = query.shape[-3], key.shape[-3]
    to = masks.Lowering(backend, tuple(query.shape[:-3]), lengths, query)
    mask = masks.as_mask(mask)
    expression = None if mask is None else mask.lower(to)
    rank = max(x.ndim for x in (query, bias, *to.arrays) if x is not None) + (group is not None)

    q = heads_first(backend, backend.cast(query, wide), rank, group)
    k, v = (heads_first(backend, backend.cast(x, wide), rank, group) for x in (key, value))
    pairs = tree_map(lambda x: _pair(backend, x, rank, group), Pairs(bias, tuple(to.arrays)))
    block = Block((q,), (k, v), pairs)
    lead, (rows, columns) = block.lead, block.grown_lengths
    if rows != lengths[0] or lead != tuple(q.shape[:-2]):  # grown by a bias or mask
        q = xp.broadcast_to(q, (*lead, rows, q.shape[-1]))
    if columns != lengths[1]:
        k, v = (xp.broadcast_to(x, (*x.shape[:-2], columns, x.shape[-1])) for x in (k, v))
    if dropout is not None:
        shape = (*((1,) * len(lead) if dropout.broadcast else lead), rows, columns)
        pairs = pairs._replace(counts=random.counts(xp, backend.key_array(dropout.key), shape))
    block = Block((q,), (k, v), pairs)
    ruled = mask is not None and dropout is None and _ruled(mask, rows, columns)
    tiles = backend.tiles(block, ruled)
    return Call(
        backend,
        dtype=wide,
        root=max(query.shape[-1], 1) ** 0.5,
        fill=float(backend.lowest(dtype)),
        keep_prob=1.0 if dropout is None else dropout.keep_prob,
        tiles=tiles,
        bias_axes=(False, False) if bias is None else tuple(size != 1 for size in pairs.bias.shape[-2:]),
        expression=expression,
        groups=_groups(mask, block, tiles[0], backend.most_groups) if ruled else (everything(block),),
        precision=precision,
        precise=dtype == "float32",
        skip=expression is not None and backend.inspects(query),
    ), block


def _ruled(mask: masks.Mask, rows: int, columns: int) -> bool:
    """Whether the rule of the mask alone says that the rows see different columns."""
    return mask.key_range(0, 1, columns) != mask.key_range(rows - 1, rows, columns)


def _groups(mask: masks.Mask, block: Block, tile: int, most: int) -> tuple[Group, ...]:
    """Groups of rows that see different columns, `most` at most, of whole tiles; `sure` at multiples of 64."""
    rows, columns = block.lengths
    groups = []
    for part in everything(block).split(max(tile, -(-rows // (most * tile)) * tile)):
        first, last = mask.sure_range(*part.rows, columns)
        groups.append(Group(part.rows, mask.key_range(*part.rows, columns), (-(-first // 64) * 64, last // 64 * 64)))
    return tuple(groups)


def restore(backend: Backend, output: Array, dtype: str, grouped: bool) -> Array:
    """The output as Flax shapes it, in the compute dtype."""
    if grouped:
        *batch, kv_heads, group, length, depth = output.shape
        output = backend.xp.reshape(output, (*batch, kv_heads * group, length, depth))
    return backend.cast(backend.permute(output, (-2, -3, -1)), dtype)


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


def _like(backend: Backend, gradient: Array, x: Array, group: int | None) -> Array:
    """A gradient in the block's layout as one of query, key or value."""
    gradient = sum_to(backend, gradient, heads_first(backend, x, gradient.ndim, group).shape)
    *batch, length, heads, depth = x.shape
    gradient = backend.permute(backend.xp.reshape(gradient, (*batch, heads, length, depth)), (-2, -3, -1))
    return backend.cast(gradient, backend.dtype_name(x))
