"""Attention over some of the keys, joined with attention over the others.

`anyattention.dot_product_attention_partial` makes a `Partial`, and `merge` joins those of the same queries over
different keys: the result is the same, up to rounding, as that of one call over all keys.
"""

from anyattention._src.partials import Partial, merge

__all__ = ["Partial", "merge"]
