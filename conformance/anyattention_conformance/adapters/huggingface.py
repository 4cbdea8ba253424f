"""The attention functions that the models of Transformers choose from: sdpa, and the eager one of T5.

A soft cap and grouped heads are those of Gemma 2, sinks those of gpt-oss, whose eager functions have them.

A mask reaches sdpa as a boolean array, and eager as what the library makes of one: zero where a key is seen, the
smallest finite number where it is hidden. The bias is what T5 calls its position bias.
"""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.t5 import modeling_t5 as t5

from anyattention_conformance.adapters.layouts import (
    adds_only,
    batches,
    four_axes,
    masks_only,
    one_batch,
    one_batch_of_logits,
)

Array = Any
SDPA = AttentionInterface()["sdpa"]


def sdpa(
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    mask: Array = None,
    *,
    scaling: float | None = None,
) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    return _call(SDPA, query, key, value, adds_only(bias), masks_only(mask), scaling)


def eager(
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    mask: Array = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Array = None,
) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    if softcap is not None and s_aux is not None:
        raise TypeError("no model's eager function has a soft cap and sinks")
    if masks_only(mask) is not None:
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), torch.finfo(query.dtype).min)
    if softcap is None and s_aux is None and query.shape[-2] == key.shape[-2]:
        return _call(t5.eager_attention_forward, query, key, value, bias, mask, scaling)
    added = bias if mask is None else mask if bias is None else bias + mask  # these have no position bias
    if s_aux is None:
        return _call(gemma2.eager_attention_forward, query, key, value, None, added, scaling, softcap=softcap)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _call(gpt_oss.eager_attention_forward, query, key, value, None, added, scaling, s_aux)


def _call(
    function: Any,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    mask: Array,
    scaling: float | None,
    sinks: Array = None,
    **options: Any,
) -> Array:
    batch = query.shape[:-3]
    bias, mask = (four_axes(one_batch_of_logits(x, batch, torch.broadcast_to)) for x in (bias, mask))
    layer = SimpleNamespace(  # what they read of one
        is_causal=False,
        num_key_value_groups=query.shape[-2] // max(key.shape[-2], 1),
        training=False,
        head_dim=query.shape[-1],
        sinks=sinks,
    )
    arrays = (x.transpose(1, 2) for x in one_batch(query, key, value))
    return batches(function(layer, *arrays, mask, position_bias=bias, scaling=scaling, **options)[0], batch)
