"""Flax itself: what is certified against must certify."""

from flax.linen import dot_product_attention as attention

__all__ = ["attention"]
