"""Flax's dot-product attention for every array library, with Flax's numbers."""

from anyattention import masks, random
from anyattention.api import (
    dot_product_attention,
    dot_product_attention_vjp,
    dot_product_attention_weights,
    explain,
)
from anyattention.errors import ShapeError
from anyattention.masks import combine_masks, make_attention_mask, make_causal_mask
from anyattention.plan import Plan
from anyattention.settings import config

__all__ = [
    "Plan",
    "ShapeError",
    "combine_masks",
    "config",
    "dot_product_attention",
    "dot_product_attention_vjp",
    "dot_product_attention_weights",
    "explain",
    "make_attention_mask",
    "make_causal_mask",
    "masks",
    "random",
]
