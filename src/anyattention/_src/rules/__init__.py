"""Masks and biases by rule: what they are made of, how they are joined, and which expressions they become."""

from anyattention._src.rules.biases import Alibi, Bias, Relative, as_bias
from anyattention._src.rules.biases import Rule as BiasRule
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
from anyattention._src.rules.terms import (
    Term,
    bound_of_terms,
    gradients_of_terms,
    operands_with_gradients,
    sum_of_terms,
)

__all__ = [
    "Alibi",
    "AnyArray",
    "Bias",
    "BiasRule",
    "ByRule",
    "CausalMask",
    "Convertible",
    "Expression",
    "LengthMask",
    "LocalMask",
    "Lowering",
    "Mask",
    "MaskRule",
    "Relative",
    "SegmentMask",
    "Term",
    "as_bias",
    "as_mask",
    "bound_of_terms",
    "conjunction",
    "gradients_of_terms",
    "is_band",
    "operands_with_gradients",
    "short",
    "sum_of_terms",
    "visible",
]
