"""PyTorch's ``scaled_dot_product_attention``: `attn_mask` hides keys if boolean, and else is added to the logits."""

from typing import Any

import torch

from anyattention_conformance.adapters.layouts import adds_only, masks_only

Array = Any


def attention(
    query: Array, key: Array, value: Array, bias: Array = None, mask: Array = None, *, scale: float | None = None
) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    bias, mask = adds_only(bias), masks_only(mask)
    if bias is not None and mask is not None:
        attn_mask = torch.where(mask, bias, float("-inf"))
    else:
        attn_mask = bias if mask is None else mask
    query, key, value = (x.transpose(-2, -3) for x in (query, key, value))
    options = {"scale": scale, "enable_gqa": query.shape[-3] != key.shape[-3]}
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)
    return output.transpose(-2, -3)
