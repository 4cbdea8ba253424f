"""Flax's attention, operation for operation: the exact implementation.

The order of these steps, and the dtype of each, is the whole of what makes the numbers Flax's:

    query  <- query / sqrt(depth), or query * scale   rounded to the compute dtype, before the product
    logits <- query . key                             rounded to the compute dtype
    logits <- cap * tanh(logits / cap)                where there is a soft cap, which Flax lacks
    logits <- logits + bias                           in the wider of the two dtypes
    logits <- logits where mask, else finfo.min       the finite minimum of the *compute* dtype: a replacement
    weights <- softmax(logits)                        in the logits' dtype, then back to the compute dtype;
                                                      over the sink too, where there is one, which Flax lacks
    weights <- weights * keep / keep_prob             dropout, not renormalised
    output <- weights . value

A row whose mask hides every key has equal logits, so its output is the mean of all values, hidden ones too.

Source: Vaswani et al., Attention is all you need (2017), and the observed behaviour of flax.linen.
Shapes: query ``[batch..., q_length, num_heads, depth]``, key ``[batch..., kv_length, num_heads, depth]``, value
``[batch..., kv_length, num_heads, v_depth]``, logits and weights ``[batch..., num_heads, q_length, kv_length]``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from anyattention._src import threefry
from anyattention._src.call import Call, Dropout
from anyattention._src.implementations.base import EINSUMS, OWN, Implementation
from anyattention._src.interfaces import products
from anyattention._src.rules import Mask

Array = Any
Einsum = Callable[[str, Array, Array], Array]


class Exact(Implementation):
    """Flax's steps."""

    name = "exact"
    serves = OWN | {*EINSUMS, "module", "weights_only", "origin", "whole"}

    def compute(self, call: Call) -> Array:
        """The output; of a call for the weights alone these, ``[batch..., num_heads, q_length, kv_length]``."""
        weights = attention_weights(call)
        if call.options.weights_only:
            return weights
        query, key, value = call.operands[:3]
        weights_value = _product(call, call.options.attn_weights_value_einsum)
        if query.shape[-2] == key.shape[-2]:
            return weights_value(products.WEIGHTS_VALUE, weights, value)

        # Grouped heads: num_heads is a multiple of the key heads, each of which serves `group` query heads in a row.
        xp, kv_heads = call.backend.xp, value.shape[-2]
        *batch, heads, q_length, kv_length = weights.shape
        weights = xp.reshape(weights, (*batch, kv_heads, heads // kv_heads, q_length, kv_length))
        output = weights_value(products.GROUPED_WEIGHTS_VALUE, weights, xp.expand_dims(value, axis=-2))
        return xp.reshape(output, (*output.shape[:-3], heads, output.shape[-1]))


def attention_weights(call: Call) -> Array:
    """The weight of each key for each query, ``[batch..., num_heads, q_length, kv_length]``."""
    backend, options = call.backend, call.options
    arrays, steps, dtype = backend.arrays, backend.steps, options.dtype
    (query, key, _, bias, mask, *_), sinks = call.operands, call.sinks
    if options.scale is None:
        query = steps.scale(query, query.shape[-1], dtype)
    else:
        query = query * _scalar(call, options.scale, query)
    logits = attention_logits(call, query, key)
    if options.logits_soft_cap is not None:
        name = arrays.dtype_name(logits)
        if name == "float16" and options.logits_soft_cap > 65504.0:  # infinite there, and 0 * inf is NaN
            logits = arrays.cast(logits, "float32")
        cap = _scalar(call, options.logits_soft_cap, logits)
        logits = arrays.cast(backend.xp.tanh(steps.divide(logits, cap)) * cap, name)

    if bias is not None:
        logits, bias = arrays.join(logits, call.added())
        logits = logits + bias
    if mask is not None:
        if isinstance(mask, Mask):  # by rule no longer, since all the logits are here anyway
            mask = call.visible(mask)
        logits = steps.where(mask, logits, steps.lowest(dtype))

    if sinks is not None:
        logits, sinks = arrays.join(logits, sinks)
        if call.has_unknown_sizes:
            sinks, _ = backend.xp.broadcast_arrays(sinks, logits[..., :1])
        else:
            sinks = backend.xp.broadcast_to(sinks, (*logits.shape[:-1], 1))
        logits = backend.xp.concat((logits, sinks), axis=-1)

    if options.force_fp32_for_softmax and dtype != "float32":
        weights = steps.softmax(arrays.cast(logits, "float32"))
    else:
        weights = arrays.cast(steps.softmax(logits), dtype)

    weights = weights if sinks is None else weights[..., :-1]
    if options.module:  # a Flax module that collects the weights, before dropout
        options.module.sow("intermediates", "attention_weights", weights)
    return weights if options.dropout is None else weights_after_dropout(call, options.dropout, weights)


def attention_logits(call: Call, query: Array, key: Array) -> Array:
    """The product of each (scaled) query with each key, ``[batch..., num_heads, q_length, kv_length]``."""
    query_key = _product(call, call.options.qk_attn_weights_einsum)
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads == kv_heads:
        return query_key(products.QUERY_KEY, query, key)
    xp = call.backend.xp
    *lead, _, depth = query.shape
    query = xp.reshape(query, (*lead, kv_heads, heads // kv_heads, depth))
    logits = query_key(products.GROUPED_QUERY_KEY, query, xp.expand_dims(key, axis=-2))
    return xp.reshape(logits, (*logits.shape[:-4], heads, *logits.shape[-2:]))


def weights_after_dropout(call: Call, dropout: Dropout, weights: Array) -> Array:
    """The weights kept, times 1 / keep_prob (rounded to the compute dtype); the others times zero."""
    arrays, steps, dtype = call.backend.arrays, call.backend.steps, call.options.dtype
    shape, key = tuple(weights.shape), call.operands.dropout_key
    origin, whole = call.operands.origin, call.options.whole
    if dropout.broadcast:
        shape = (1,) * (call.operands.key.ndim - 2) + shape[-2:]
    if origin is None or whole is None:
        kept = steps.keep(key, dropout.keep_prob, shape, weights)
    else:
        origin, whole = (origin[-2:], whole[-2:]) if dropout.broadcast else (origin, whole)
        words, beside = call.backend.tiles.key_words(key, weights), arrays.beside(weights)
        counts = threefry.counts(call.backend.xp, words, shape, origin, whole, beside)
        kept = threefry.keep_at(call.backend.xp, dropout.keep_prob, counts)
    keep = arrays.cast(kept, dtype)
    weights, multiplier = arrays.join(weights, steps.divide_by_scalar(keep, dropout.keep_prob, dtype))
    return weights * multiplier


def _scalar(call: Call, value: float, x: Array) -> Array:
    """A number in the dtype of `x`, beside it: not as it is, which some libraries round and others do not."""
    return call.backend.xp.full((), value, dtype=x.dtype, **call.backend.arrays.beside(x))


def _product(call: Call, einsum: Einsum | None) -> Einsum:
    """What computes a product: the caller's einsum, or the library's own."""
    if einsum is not None:
        return einsum
    options, contract = call.options, call.backend.steps.contract
    if options.precision is None and options.einsum_dot_general is None:
        return contract
    return partial(contract, precision=options.precision, dot_general=options.einsum_dot_general)
