"""Masks and biases by rule: what they are made of, how they are joined, and which expressions they become."""

from anyattention._src.rules.lowering import Expression, Lowering, short, visible
from anyattention._src.rules.masks import (
    CausalMask,
    LengthMask,
    LocalMask,
    Mask,
    SegmentMask,
    as_mask,
    conjunction,
    is_band,
)
from anyattention._src.rules.rule import AnyArray, Convertible, Rule

__all__ = [
    "AnyArray",
    "CausalMask",
    "Convertible",
    "Expression",
    "LengthMask",
    "LocalMask",
    "Lowering",
    "Mask",
    "Rule",
    "SegmentMask",
    "as_mask",
    "conjunction",
    "is_band",
    "short",
    "visible",
]
