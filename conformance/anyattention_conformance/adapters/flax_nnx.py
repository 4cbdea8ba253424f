"""``flax.nnx.dot_product_attention``, whose parameters are Flax Linen's, or their own."""

from typing import Any

from flax import nnx

Array = Any


def attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    mask: Array = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    return nnx.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        dtype=dtype,
    )
