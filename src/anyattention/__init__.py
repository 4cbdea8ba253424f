"""Flax's dot-product attention for every array library, with Flax's numbers."""

from anyattention import biases, extend, integrations, masks, partials, random
from anyattention._src.api import (
    dot_product_attention,
    dot_product_attention_vjp,
    dot_product_attention_weights,
    explain,
)
from anyattention._src.dense_masks import combine_masks, make_attention_mask, make_causal_mask
from anyattention._src.errors import ShapeError
from anyattention._src.partials import dot_product_attention_partial
from anyattention._src.plan import RULES, Plan
from anyattention._src.settings import config

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "Plan",
    "ShapeError",
    "biases",
    "combine_masks",
    "config",
    "dot_product_attention",
    "dot_product_attention_partial",
    "dot_product_attention_vjp",
    "dot_product_attention_weights",
    "explain",
    "extend",
    "integrations",
    "make_attention_mask",
    "make_causal_mask",
    "masks",
    "partials",
    "random",
]
