"""The tiled implementation in Flax's layout: a call becomes a tiling and a block, and results go back.

In a block heads stand before lengths, and grouped heads are two axes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyattention._src import dtypes, threefry
from anyattention._src.blocks import Block, Pairs, sum_to, tree_map
from anyattention._src.call import Call
from anyattention._src.hidden import shown_keys
from anyattention._src.implementations.base import OWN, Implementation
from anyattention._src.interfaces import Arrays, permute
from anyattention._src.rules import Bias, as_bias, as_mask
from anyattention._src.spread import remark
from anyattention._src.tiles.passes import Gradients, backward, forward
from anyattention._src.tiles.tiling import Tiling, tiling

Array = Any


class Tiled(Implementation):
    """Attention a tile at a time, in memory that grows with the lengths."""

    name = "tiled"
    serves = OWN | {"origin", "whole", "partial", "spread"}

    def refusals(self, call: Call) -> Iterator[str]:
        yield from super().refusals(call)
        if reason := call.backend.tiles.no_tiles(call):
            yield reason
        if call.has_unknown_sizes:
            yield "lengths are unknown"
        if call.options.spread is not None and call.options.partial:
            yield "partials know no sequence_axis: pass origin and whole"
        arrays, bias = call.backend.arrays, call.operands.bias
        dense = bias.dense() if isinstance(bias, Bias) else [bias]
        if any(isinstance(x, complex) or (hasattr(x, "shape") and "complex" in arrays.dtype_name(x)) for x in dense):
            yield "the bias is complex"
        if call.options.dtype not in ("bfloat16", "float16", "float32", "float64"):
            yield f"tiles of {call.options.dtype} are not supported"

    def remarks(self, call: Call) -> list[str]:
        tiles = call.backend.tiles
        if call.options.spread is not None:
            return [remark(call)]
        return tiles.remarks(*prepare(call)) if tiles.chunks else []

    def compute(self, call: Call) -> Array:
        """The output. Sums are in float32 at least; `force_fp32_for_softmax` returns them so."""
        how, block = prepare(call)
        return _restored(call, call.backend.tiles.differentiable(forward, backward, how, block)[0])

    def partial(self, call: Call) -> tuple[Array, Array, Array]:
        """The output over these keys alone, the largest logits and the totals, as `anyattention.partials` has them."""
        how, block = prepare(call)
        output, *statistics = call.backend.tiles.differentiable(forward, backward, how, block)
        output = permute(call.backend.arrays, _flat(call, output), (-2, -3, -1))
        largest, total = (_flat(call, x)[..., 0] for x in statistics)
        return output, largest, total

    def vjp(self, call: Call, given: Sequence[str]) -> tuple[Array, Callable[[Array], Gradients]]:
        """The output, and a function from its gradient to those of query, key, value, bias and sinks.

        `given` are the dtypes that query, key and value had before promotion, which their gradients get back. The
        function keeps copies: whoever calls it may have changed the arguments and the output in place.
        """
        if call.options.spread is not None:
            raise NotImplementedError(
                f"dot_product_attention_vjp knows no sequence over {call.options.spread.name}: differentiate "
                f"dot_product_attention, as {call.backend.name} does itself"
            )
        call = call.of_copies()
        how, block = prepare(call)
        arrays, tiles, sinks = call.backend.arrays, call.backend.tiles, call.operands.sinks
        group = _group(call)
        results = tiles.compiled(forward, how, block)

        def pullback(doutput: Array) -> Gradients:
            doutput = _heads_first(arrays, arrays.cast(doutput, how.dtype), results[0].ndim, group)
            *gradients, dbias, dparameters, dsinks = tiles.compiled(backward, how, block, *results, doutput)
            parts = zip(gradients, call.operands[:3], given, strict=True)
            dquery, dkey, dvalue = (_like(arrays, gradient, x, group, name) for gradient, x, name in parts)
            found = _of_bias(call, {"operands": dbias, "parameters": dparameters})
            return dquery, dkey, dvalue, found, *([] if sinks is None else [_shaped(call, dsinks, sinks)])

        output = arrays.own(_restored(call, results[0]))
        return (output, pullback) if call.restore is None else (call.restore(output), call.restore.pullback(pullback))


TILED = Tiled()


def prepare(call: Call) -> tuple[Tiling, Block]:
    """The call as a block: heads first, all arrays of one rank, in the accumulators' dtype."""
    (query, key, value, bias, mask, dropout_key, *_), sinks = call.operands, call.sinks
    options, arrays, xp, group = call.options, call.backend.arrays, call.backend.xp, _group(call)
    wide = dtypes.promote(options.dtype, "float32")
    if bias is not None:
        bias = as_bias(bias if isinstance(bias, Bias) or hasattr(bias, "shape") else arrays.adopt(bias, query))
        wide = bias.dtype(arrays, wide)
    if sinks is not None:
        wide = dtypes.promote(wide, arrays.dtype_name(sinks))
        sinks = arrays.cast(sinks, wide)
    spread, lengths = options.spread, call.lengths
    to, by, mask = call.lowering(), call.lowering(1 if group is None else 2), as_mask(mask)
    expression = None if mask is None else mask.lower(to)
    if arrays.inspects(query) and call.first is None and spread is None:
        by.reach = _reach(call)
    terms = () if bias is None else bias.terms(by)
    guests = (*to.operands, *by.operands, *by.parameters, *([] if sinks is None else [sinks]))
    rank = max(x.ndim for x in (query, *guests)) + (group is not None)

    key, value = (x if spread else arrays.cast(x, wide) for x in (key, value))  # which travel as they are
    q, k, v = (_heads_first(arrays, x, rank, group) for x in (arrays.cast(query, wide), key, value))
    shown = _shown(call, k, v, group)
    of_pairs = Pairs(tuple(by.operands), sinks, tuple(to.operands))
    pairs, parameters = tree_map(lambda x: _pair(xp, x, rank, group), (of_pairs, tuple(by.parameters)))
    block = Block((q,), (k, v), pairs, parameters)
    lead, (rows, columns) = block.lead, block.grown_lengths
    if rows != lengths[0] or lead != tuple(q.shape[:-2]):  # grown by a bias or mask
        q = xp.broadcast_to(q, (*lead, rows, q.shape[-1]))
    if columns != lengths[1] and spread is None:
        k, v = (xp.broadcast_to(x, (*x.shape[:-2], columns, x.shape[-1])) for x in (k, v))
    if options.dropout is not None:
        shape = (*((1,) * len(lead) if options.dropout.broadcast else lead), rows, columns)
        words = call.backend.tiles.key_words(dropout_key, query)
        place = *_place(call, group), arrays.beside(query)
        pairs = pairs._replace(counts=threefry.counts(xp, words, shape, *place))
    block = Block((q,), (k, v), pairs, parameters, shown=shown)
    tiles = call.backend.tiles
    plain = call.first is None and spread is None
    ruled = mask if plain and tiles.most_groups and (options.dropout is None or tiles.chunks) else None
    return tiling(call.backend, options, wide, expression, terms, block, ruled), block


def _place(call: Call, group: int | None) -> tuple[Any, Any]:
    """The origin of a block in the whole, and its sizes, as `threefry.counts` has them: grouped heads are two axes."""
    origin, whole = call.operands.origin, call.options.whole
    if origin is None or whole is None or len(whole) == 2:
        return origin, whole
    if call.options.dropout is not None and call.options.dropout.broadcast:
        return origin[-2:], whole[-2:]
    if group is not None:
        heads, of_whole = call.operands.query.shape[-2], whole[-3]
        size = of_whole if group == 1 else heads // group  # with one key head, its group may be cut
        origin = (*origin[:-3], origin[-3] // size, origin[-3] % size, *origin[-2:])
        whole = (*whole[:-3], of_whole // size, size, *whole[-2:])
    return origin, whole


def _reach(call: Call) -> tuple[int, int]:
    """Between which numbers ``j - i`` is for keys j that some query i may see, by the lengths and the mask's band."""
    (rows, columns), mask = call.lengths, call.structure
    first = 1 - rows if mask.left is None else max(1 - rows, -mask.left)
    return first, columns - 1 if mask.right is None else min(columns - 1, mask.right)


def _shown(call: Call, key: Array, value: Array, group: int | None) -> Array | None:
    """Which keys of a block some query may see, ``[lead..., columns or 1, 1]``; None where it makes no difference."""
    arrays, xp, norms = call.backend.arrays, call.backend.xp, call.backend.tiles.norms
    if call.operands.mask is None or call.backend.tiles.chunks or call.options.spread is not None:
        return None
    if arrays.inspects(key) and all(arrays.surely(xp.isfinite(xp.sum(norms(x))), True) for x in (key, value)):
        return None
    if (shown := shown_keys(call)) is None:
        return None
    shown = _pair(xp, shown, key.ndim, group)
    more = tuple(axis for axis in range(key.ndim - 2) if shown.shape[axis] != 1 == key.shape[axis])
    return permute(arrays, xp.any(shown, axis=more, keepdims=True) if more else shown, (-1, -2))


def _group(call: Call) -> int | None:
    """The number of key heads, where several query heads share one."""
    heads, kv_heads = call.operands.query.shape[-2], call.operands.key.shape[-2]
    return None if heads == kv_heads else kv_heads


def _restored(call: Call, output: Array) -> Array:
    """The output as Flax shapes it, in the compute dtype, or float32 where a 16-bit call asks for such a softmax."""
    arrays, dtype = call.backend.arrays, call.options.dtype
    dtype = dtypes.promote(dtype, "float32") if call.options.force_fp32_for_softmax else dtype
    return arrays.cast(permute(arrays, _flat(call, output), (-2, -3, -1)), dtype)


def _flat(call: Call, x: Array) -> Array:
    """An array of a block with its heads in one axis."""
    if _group(call) is None:
        return x
    *batch, kv_heads, group, length, depth = x.shape
    return call.backend.xp.reshape(x, (*batch, kv_heads * group, length, depth))


def _heads_first(arrays: Arrays, x: Array, rank: int, group: int | None) -> Array:
    """``[batch..., length, heads, *]`` as ``[1..., batch..., heads, length, *]``, the heads in two axes if grouped."""
    x = permute(arrays, x, (-2, -3, -1))
    *batch, heads, length, depth = x.shape
    heads = (heads,) if group is None else (group, heads // group)
    return arrays.xp.reshape(x, ((1,) * (rank - x.ndim - len(heads) + 1) + (*batch, *heads, length, depth)))


def _pair(xp: Any, x: Array, rank: int, group: int | None) -> Array:
    """A bias or mask with all the axes of the block."""
    shape = (1,) * (rank - x.ndim - (group is not None)) + tuple(x.shape)
    if group is not None:
        heads = (1, 1) if shape[-3] == 1 else (group, shape[-3] // group)
        shape = (*shape[:-3], *heads, *shape[-2:])
    return xp.reshape(x, shape)


def _of_bias(call: Call, gradients: dict[str, tuple[Array | None, ...]]) -> Any:
    """The gradient of an array; of a bias by rule a tuple of those of its arrays; None of a scalar and of integers."""
    bias, arrays = call.operands.bias, call.backend.arrays
    if not isinstance(bias, Bias):
        gradient = gradients["operands"][0] if hasattr(bias, "shape") else None
        return None if gradient is None else _shaped(call, gradient, bias)
    to = call.lowering()
    bias.terms(to)
    found: list[Array | None] = []
    for x, source in zip(bias.arrays(), to.sources, strict=True):
        gradient = None if source is None else gradients[source[0]][source[1]]
        if gradient is not None and source is not None and source[0] == "parameters" and x.ndim == 2:
            gradient = arrays.permute_dims(arrays.xp.reshape(gradient, (x.shape[1], x.shape[0])), (1, 0))  # a table
        found.append(None if gradient is None else _shaped(call, gradient, x))
    return tuple(found)


def _shaped(call: Call, gradient: Array, x: Array) -> Array:
    """The gradient of a bias or of sinks, in their shape, and in their dtype, of integers the compute dtype."""
    arrays = call.backend.arrays
    name = arrays.dtype_name(x)
    name = name if dtypes.is_inexact(name) else call.options.dtype
    return arrays.cast(arrays.xp.reshape(gradient, tuple(x.shape)), name)


def _like(arrays: Arrays, gradient: Array, x: Array, group: int | None, given: str) -> Array:
    """A gradient in the block's layout as one of query, key or value, in the dtype that was given if it can be."""
    gradient = sum_to(arrays.xp, gradient, _heads_first(arrays, x, gradient.ndim, group).shape)
    *batch, length, heads, depth = x.shape
    gradient = permute(arrays, arrays.xp.reshape(gradient, (*batch, heads, length, depth)), (-2, -3, -1))
    gradient = arrays.cast(gradient, arrays.dtype_name(x))
    return arrays.cast(gradient, given) if dtypes.is_inexact(given) else gradient
