"""``jax.nn.dot_product_attention``."""

from typing import Any

import jax
import jax.numpy as jnp

from anyattention_conformance.adapters.layouts import batches, one_batch, one_batch_of_logits

Array = Any


def attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    mask: Array = None,
    *,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    batch = query.shape[:-3]
    bias, mask = (one_batch_of_logits(x, batch, jnp.broadcast_to) for x in (bias, mask))
    arrays = one_batch(query, key, value)
    output = jax.nn.dot_product_attention(*arrays, bias, mask, scale=scale, local_window_size=window)
    return batches(output, batch)
