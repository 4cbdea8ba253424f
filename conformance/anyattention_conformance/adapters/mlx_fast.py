"""MLX's ``fast.scaled_dot_product_attention``: a boolean `mask` hides keys, any other is added to the logits."""

from typing import Any

import mlx.core as mx

from anyattention_conformance.adapters.layouts import adds_only, batches, masks_only, one_batch, one_batch_of_logits

Array = Any


def attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    mask: Array = None,
    *,
    scale: float | None = None,
    sinks: Array = None,
) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    bias, mask, batch = adds_only(bias), masks_only(mask), query.shape[:-3]
    if bias is not None and mask is not None:
        raise TypeError("there is one mask, which hides keys or is added: pass bias or mask")
    either = one_batch_of_logits(bias if mask is None else mask, batch, mx.broadcast_to)
    query, key, value = (x.swapaxes(1, 2) for x in one_batch(query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=either, sinks=sinks)
    return batches(output.swapaxes(1, 2), batch)
