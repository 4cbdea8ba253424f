"""The attention functions that the models of Transformers choose from: sdpa, and the eager one of T5.

A mask reaches sdpa as a boolean array, and eager as what the library makes of one: zero where a key is seen, the
smallest finite number where it is hidden. The bias is what T5 calls its position bias.
"""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.models.t5.modeling_t5 import eager_attention_forward

from anyattention_conformance.adapters.layouts import (
    adds_only,
    batches,
    four_axes,
    masks_only,
    one_batch,
    one_batch_of_logits,
)

Array = Any
MODULE = SimpleNamespace(is_causal=False, num_key_value_groups=1, training=False)  # what they read of a layer
SDPA = AttentionInterface()["sdpa"]


def sdpa(query: Array, key: Array, value: Array, bias: Array = None, mask: Array = None) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    return _call(SDPA, query, key, value, adds_only(bias), masks_only(mask))


def eager(query: Array, key: Array, value: Array, bias: Array = None, mask: Array = None) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    if masks_only(mask) is not None:
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), torch.finfo(query.dtype).min)
    return _call(eager_attention_forward, query, key, value, bias, mask)


def _call(function: Any, query: Array, key: Array, value: Array, bias: Array, mask: Array) -> Array:
    batch = query.shape[:-3]
    bias, mask = (four_axes(one_batch_of_logits(x, batch, torch.broadcast_to)) for x in (bias, mask))
    arrays = (x.transpose(1, 2) for x in one_batch(query, key, value))
    return batches(function(MODULE, *arrays, mask, position_bias=bias)[0], batch)
