"""Flax's attention, operation for operation: the exact implementation.

The order of these steps, and the dtype of each, is the whole of what makes the numbers Flax's:

    query  <- query / sqrt(depth)                     rounded to the compute dtype, before the product
    logits <- query . key                             rounded to the compute dtype
    logits <- logits + bias                           in the wider of the two dtypes
    logits <- logits where mask, else finfo.min       the finite minimum of the *compute* dtype: a replacement
    weights <- softmax(logits)                        in the logits' dtype, then back to the compute dtype
    weights <- weights * keep / keep_prob             dropout, not renormalised
    output <- weights . value

A row whose mask hides every key has equal logits, so its output is the mean of all values, hidden ones too.

Source: Vaswani et al., Attention is all you need (2017), and the observed behaviour of flax.linen.
Shapes: query ``[batch..., q_length, num_heads, depth]``, key ``[batch..., kv_length, num_heads, depth]``, value
``[batch..., kv_length, num_heads, v_depth]``, logits and weights ``[batch..., num_heads, q_length, kv_length]``.
"""

from collections.abc import Callable
from typing import Any

from anyattention import backend as products
from anyattention.backend import Backend
from anyattention.request import Dropout

Array = Any
Einsum = Callable[[str, Array, Array], Array]


def attention(
    backend: Backend,
    dtype: str,
    query: Array,
    key: Array,
    value: Array,
    bias: Any = None,
    mask: Array | None = None,
    dropout: Dropout | None = None,
    *,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    query_key: Einsum,
    weights_value: Einsum,
) -> Array:
    """The weighted mean of the values, ``[batch..., q_length, num_heads, v_depth]``."""
    weights = attention_weights(
        backend,
        dtype,
        query,
        key,
        bias=bias,
        mask=mask,
        dropout=dropout,
        module=module,
        force_fp32_for_softmax=force_fp32_for_softmax,
        query_key=query_key,
    )
    if query.shape[-2] == key.shape[-2]:
        return weights_value(products.WEIGHTS_VALUE, weights, value)

    # Grouped heads: num_heads is a multiple of the key heads, each of which serves `group` query heads in a row.
    *batch, heads, q_length, kv_length = weights.shape
    kv_heads = value.shape[-2]
    weights = backend.xp.reshape(weights, (*batch, kv_heads, heads // kv_heads, q_length, kv_length))
    value = backend.xp.expand_dims(value, axis=-2)
    output = weights_value(products.GROUPED_WEIGHTS_VALUE, weights, value)
    return backend.xp.reshape(output, (*output.shape[:-3], heads, output.shape[-1]))


def attention_weights(
    backend: Backend,
    dtype: str,
    query: Array,
    key: Array,
    *,
    bias: Any,
    mask: Array | None,
    dropout: Dropout | None,
    module: Any,
    force_fp32_for_softmax: bool,
    query_key: Einsum,
) -> Array:
    """The weight of each key for each query, ``[batch..., num_heads, q_length, kv_length]``."""
    query = backend.scale(query, query.shape[-1], dtype)
    logits = attention_logits(backend, query, key, query_key)

    if bias is not None:
        logits, bias = backend.join(logits, bias)
        logits = logits + bias
    if mask is not None:
        logits = backend.where(mask, logits, backend.lowest(dtype))

    if force_fp32_for_softmax and dtype != "float32":
        weights = backend.softmax(backend.cast(logits, "float32"))
    else:
        weights = backend.cast(backend.softmax(logits), dtype)

    if module:  # a Flax module that collects the weights, before dropout
        module.sow("intermediates", "attention_weights", weights)

    if dropout is not None:
        weights = weights_after_dropout(backend, dtype, weights, dropout, rank=key.ndim)
    return weights


def attention_logits(backend: Backend, query: Array, key: Array, query_key: Einsum) -> Array:
    """The product of each (scaled) query with each key, ``[batch..., num_heads, q_length, kv_length]``."""
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads == kv_heads:
        return query_key(products.QUERY_KEY, query, key)
    *lead, _, depth = query.shape
    query = backend.xp.reshape(query, (*lead, kv_heads, heads // kv_heads, depth))
    key = backend.xp.expand_dims(key, axis=-2)
    logits = query_key(products.GROUPED_QUERY_KEY, query, key)
    return backend.xp.reshape(logits, (*logits.shape[:-4], heads, *logits.shape[-2:]))


def weights_after_dropout(backend: Backend, dtype: str, weights: Array, dropout: Dropout, rank: int) -> Array:
    """The weights kept, times 1 / keep_prob (rounded to the compute dtype); the others times zero."""
    shape = tuple(weights.shape)
    if dropout.broadcast:
        shape = (1,) * (rank - 2) + shape[-2:]
    keep = backend.cast(backend.keep(dropout.key, dropout.keep_prob, shape, weights), dtype)
    weights, multiplier = backend.join(weights, backend.divide_by_scalar(keep, dropout.keep_prob, dtype))
    return weights * multiplier
