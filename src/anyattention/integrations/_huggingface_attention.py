"""The attention function that models of Transformers call: its keywords, and what each is to `dot_product_attention`.

Transformers 5.24 has 500 such calls in 357 files of models. All that its eager functions read is served here; what only
other functions read, and what is not known, raises.
"""

from typing import Any

import torch

from anyattention._src.api import dot_product_attention, dot_product_attention_weights
from anyattention._src.rules import LocalMask
from anyattention._src.settings import Name
from anyattention.integrations._huggingface_masks import RuleMask

Array = Any

#: Keywords that reach attention because models pass on what they were given, and why they change nothing here.
_HARMLESS = {
    **dict.fromkeys(
        ("position_ids", "decoder_position_ids", "cache_position", "position_embeddings"),
        "the model has put positions into query and key, or into its embeddings",
    ),
    **dict.fromkeys(("cache", "past_key_values", "use_cache"), "key and value are those of the cache already"),
    **dict.fromkeys(
        ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds", "encoder_outputs"),
        "query, key and value were made from it",
    ),
    **dict.fromkeys(("token_type_ids", "mm_token_type_ids", "grid_thw"), "embeddings and masks were made from it"),
    **dict.fromkeys(("labels", "num_items_in_batch", "logits_to_keep"), "it is for the loss and the logits"),
    **dict.fromkeys(("output_hidden_states", "output_router_logits", "return_dict"), "it is about other outputs"),
    **dict.fromkeys(
        ("max_length_q", "max_length_k", "deterministic"), "it is about the speed or order of flash attention's kernel"
    ),
}
_PACKED = (
    "only flash attention takes packed sequences from it. Leave it out, and pass position_ids that start again with "
    "each sequence, use_cache=False and no attention_mask: Transformers then makes the mask"
)
_BLOCKS = "only kernels for blocks of keys take them, and Transformers makes masks of them for 'eager' and 'sdpa' alone"
#: Keywords that change the meaning, and what to do instead.
_REFUSED = {
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"), _PACKED),
    "block_indices": f"{_BLOCKS}: use one of these",
}


def attend(
    module: Any,
    query: Array,
    key: Array,
    value: Array,
    attention_mask: Array | None,
    dropout: float = 0.0,
    scaling: Any = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Array | None = None,
    sinks: Array | None = None,
    position_bias: Array | None = None,
    indices: Array | None = None,
    output_attentions: bool | None = None,
    *,
    implementation: Name | None = None,
    **kwargs: Any,
) -> tuple[Array, Array | None]:
    """Attention as a layer of Transformers asks for it.

    Args:
        module: the layer; says whether it is in training, and by its `is_causal`, if any, what that is if it is None.
        query: ``[batch, num_heads, q_length, depth]``.
        key: ``[batch, kv_heads, kv_length, depth]``.
        value: ``[batch, kv_heads, kv_length, v_depth]``.
        attention_mask: boolean, true where a query sees a key, or floating, added to the logits; broadcastable to
            ``[batch, num_heads, q_length, kv_length]``.
        dropout: the rate, in training.
        scaling: what logits are multiplied by, a number or a tensor; None is ``1 / sqrt(depth)``.
        is_causal: counts where `attention_mask` is None and there are several queries, as in Transformers' sdpa. A
            layer that does not say it is not causal, as in eager attention: Splinter has such.
        sliding_window: counts where `attention_mask` is None; else it is in the mask.
        softcap: `logits_soft_cap`.
        s_aux: sinks, ``[num_heads]``.
        sinks: sinks of each query, ``[batch, num_heads, q_length, 1]``.
        position_bias: added to the logits, broadcastable like `attention_mask`.
        indices: the keys that the sparse attention of DeepSeek V3.2 chose for each query, ``[batch, q_length, k]``;
            others are hidden.
        output_attentions: whether the weights are wanted, too.
        implementation: as in `dot_product_attention`.
        kwargs: what else the model passes on.

    Returns:
        ``[batch, q_length, num_heads, v_depth]``, and the weights after dropout, or None.

    Raises:
        NotImplementedError: a keyword that is not known to change nothing, or a window that cannot be placed.
        TypeError: a mask that is neither boolean nor floating.
    """
    if kwargs:
        _check_others(kwargs)
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (_of_batch(x, batch).transpose(1, 2) for x in (query, key, value))
    mask, bias = _parts_of(attention_mask, position_bias, (query.shape[1], key.shape[1]))
    if mask is None and attention_mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        is_causal = bool(causal) and query.shape[1] > 1
        if sliding_window is not None and key.shape[1] > sliding_window:
            mask = _window(sliding_window, is_causal, query.shape[1], key.shape[1])
    else:
        is_causal = False
    if indices is not None:
        chosen = torch.zeros(*indices.shape[:2], key.shape[1], dtype=torch.bool, device=key.device)
        chosen = chosen.scatter(-1, indices.long(), True)[:, None]
        mask = chosen if mask is None else mask & chosen
    if isinstance(scaling, torch.Tensor):  # which may have a gradient
        query, scaling = query * scaling, 1.0
    if s_aux is not None:
        sinks = s_aux.reshape(-1)
    elif sinks is not None:
        sinks = sinks.squeeze(-1)
    options: dict[str, Any] = {
        "bias": bias,
        "mask": mask,
        "is_causal": is_causal,
        "scale": scaling,
        "logits_soft_cap": softcap,
        "sinks": sinks,
    }
    if dropout and module.training:
        options["dropout_rng"] = torch.randint(2**32, (2,), dtype=torch.int64, device=query.device)
        options.update(dropout_rate=dropout, broadcast_dropout=False)  # PyTorch drops each weight by itself
    output = dot_product_attention(query, key, value, implementation=implementation, **options)
    if output_attentions or getattr(getattr(module, "config", None), "output_attentions", False):
        return output, dot_product_attention_weights(query, key, implementation="exact", **options)
    return output, None


def _of_batch(x: Array, batch: int) -> Array:
    """Learned queries have a batch of one beside keys of many, or the reverse."""
    return x if x.shape[0] == batch else x.expand(batch, *x.shape[1:])


def _parts_of(mask: Array | None, position_bias: Array | None, lengths: tuple[int, int]) -> tuple[Any, Array | None]:
    """What `dot_product_attention` takes as mask, and what as bias."""
    if mask is None:
        return None, position_bias
    if isinstance(mask, RuleMask):
        return mask.visible if tuple(mask.shape[-2:]) == lengths else mask.dense(), position_bias
    if mask.dtype == torch.bool:
        return mask, position_bias
    if not mask.dtype.is_floating_point:
        raise TypeError(
            f"attention_mask must be boolean, true where a query sees a key, or floating, added to the logits; got "
            f"{mask.dtype} of shape {tuple(mask.shape)}: convert it first, as with mask.bool()"
        )
    return None, mask if position_bias is None else position_bias + mask


def _window(size: int, is_causal: bool, q_length: int, kv_length: int) -> LocalMask:
    """The keys that are nearer than the size of a window, as flash attention understands it."""
    if q_length != kv_length:
        raise NotImplementedError(
            f"sliding_window={size} without an attention_mask, for {q_length} queries and {kv_length} keys: the places "
            "of queries among keys are not known. Pass an attention_mask that has the window"
        )
    return LocalMask(size - 1, 0 if is_causal else size - 1)


def _check_others(kwargs: dict[str, Any]) -> None:
    """Raise unless what a model passes on is switched off, or known to change nothing."""
    for name, x in kwargs.items():
        if x is None or x is False or name in _HARMLESS:
            continue
        shown = (
            f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"{type(x).__name__} {x!r:.80}"
        )
        reason = _REFUSED.get(
            name, "it is not known here, so that it may change what attention means: use 'sdpa' or 'eager'"
        )
        raise NotImplementedError(
            f"attention got the keyword {name}, {shown}, which anyattention does not serve: {reason}"
        )
