"""PyTorch's ``flex_attention`` without compilation: soft cap and bias in `score_mod`, the mask in a block mask."""

from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from anyattention_conformance.adapters.layouts import batches, four_axes, masks_only, one_batch, one_batch_of_logits

Array = Any


def attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    mask: Array = None,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> Array:
    """Attention over ``[batch..., length, heads, depth]``."""
    batch = query.shape[:-3]
    bias, mask = (one_batch_of_logits(x, batch, torch.broadcast_to) for x in (bias, masks_only(mask)))
    # On CPU there is a forward pass alone, which refuses arrays that want gradients.
    query, key, value = (x.detach().transpose(1, 2) for x in one_batch(query, key, value))
    logits = (*query.shape[:-1], key.shape[-2])
    added = None if bias is None else four_axes(bias.detach()).expand(logits)
    score_mod = block_mask = None
    if not (bias is None and logits_soft_cap is None):

        def score_mod(score: Array, b: Array, h: Array, q: Array, k: Array) -> Array:
            if logits_soft_cap is not None:
                score = logits_soft_cap * torch.tanh(score / logits_soft_cap)
            return score if added is None else score + added[b, h, q, k]

    if mask is not None:
        kept = four_axes(mask).expand(logits)
        block_mask = flex.create_block_mask(lambda b, h, q, k: kept[b, h, q, k], *logits, device=query.device)
    options: Any = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    output = flex.flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask, **options)
    return batches(output.transpose(1, 2), batch)
