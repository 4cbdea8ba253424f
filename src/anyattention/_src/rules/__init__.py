"""Masks and biases by rule: what they are made of, how they are joined, and which expressions they become."""

from anyattention._src.rules.by_rule import AnyArray, ByRule, Convertible
from anyattention._src.rules.functions import Rule as MaskRule
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

__all__ = [
    "AnyArray",
    "ByRule",
    "CausalMask",
    "Convertible",
    "Expression",
    "LengthMask",
    "LocalMask",
    "Lowering",
    "Mask",
    "MaskRule",
    "SegmentMask",
    "as_mask",
    "conjunction",
    "is_band",
    "short",
    "visible",
]
