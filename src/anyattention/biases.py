"""Biases by rule, which are never expanded: numbers that are added to logits by position.

`Alibi`, `Relative` and `Rule`, which takes any function of positions, go wherever `dot_product_attention` takes an
array as `bias`, and join each other and arrays by ``+``. They are no larger than their slopes and tables: a tile
computes its own part. A library that differentiates does so by their arrays too; `dot_product_attention_vjp` gives the
gradients of slopes and tables in any library.
"""

from anyattention._src.rules import Alibi, Bias, Relative
from anyattention._src.rules import BiasRule as Rule

__all__ = ["Alibi", "Bias", "Relative", "Rule"]
