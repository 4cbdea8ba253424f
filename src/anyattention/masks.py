"""Masks by rule, which are never expanded, and Flax's helpers that make and combine dense ones.

A mask is truthy where a query may see a key. `CausalMask`, `LocalMask`, `SegmentMask`, `LengthMask` and `Rule`, which
takes any function of positions, go wherever `dot_product_attention` takes an array as `mask`, join by ``&``, ``|`` and
``~``, and are no larger than their ids and lengths: a tile compares what its rows know with what its columns know. They
are equal, and hash alike, where their integers are equal and their arrays and functions are the same, so that they can
be keys and static arguments. Like Flax's, the helpers for dense masks return float32 zeros and ones unless told
otherwise.
"""

from anyattention._src.dense_masks import combine_masks, make_attention_mask, make_causal_mask
from anyattention._src.packed import packed
from anyattention._src.rules import CausalMask, LengthMask, LocalMask, Mask, SegmentMask
from anyattention._src.rules import MaskRule as Rule

__all__ = [
    "CausalMask",
    "LengthMask",
    "LocalMask",
    "Mask",
    "Rule",
    "SegmentMask",
    "combine_masks",
    "make_attention_mask",
    "make_causal_mask",
    "packed",
]
