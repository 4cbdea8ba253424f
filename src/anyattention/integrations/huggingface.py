"""Hugging Face's Transformers: attention that any of its models is switched to by name."""

import re as _re
from functools import partial as _partial
from importlib import import_module as _import_module

from anyattention._src.settings import Name as _Name
from anyattention._src.settings import check_implementation as _check_implementation

__all__ = ["register"]

_LEAST = (5, 20)  # the oldest Transformers that the tests have run with
# What Transformers takes a name that contains one of these for: its own implementations, and kernels of its hub.
_TAKEN = ("flash", "sdpa", "flex_attention", "eager", "|", "/", ":")


def register(name: str = "anyattention", implementation: _Name | None = None) -> None:
    """Register attention and its masks with Transformers, whose models then take them by ``set_attn_implementation``.

    A model computes what it computes with ``"eager"``: scaling, grouped heads, sliding windows, soft cap, sinks and
    position biases included, and dropout in training. Dropout keys are drawn from PyTorch's generator, a fresh one for
    each call of a layer, so that `torch.manual_seed` repeats them. Weights of ``output_attentions=True`` are those of
    the exact implementation, an array of ``[batch, num_heads, q_length, kv_length]``.

    Args:
        name: by which models are switched.
        implementation: ``"exact"``, ``"tiled"``, ``"fused"``, or None to choose for each call; see `explain`. A name
            that is registered again follows the last call.

    Raises:
        ImportError: Transformers is not installed, or too old.
        ValueError: an unknown implementation; a name that belongs to Transformers or somebody else, or that
            Transformers would take for something of its own.

    Examples:
        >>> import torch, transformers
        >>> from anyattention.integrations import huggingface
        >>> huggingface.register()
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=9, **sizes))
        >>> model.set_attn_implementation("anyattention")
        >>> tuple(model(torch.arange(6)[None]).last_hidden_state.shape)
        (1, 6, 8)
    """
    _check_implementation(implementation)
    if not isinstance(name, str) or not name or any(part in name for part in _TAKEN):
        raise ValueError(
            f"name={name!r}: pass a name without {', '.join(_TAKEN)}, which Transformers takes for its own "
            "implementations and for kernels of its hub"
        )
    _check_version()
    transformers, masking = _import_module("transformers"), _import_module("transformers.masking_utils")
    attention, masks = (_import_module(f"{__package__}._huggingface_{part}") for part in ("attention", "masks"))
    ours = _partial(attention.attend, implementation=implementation)
    for interface, function in (
        (transformers.AttentionInterface, attention.attend),
        (transformers.AttentionMaskInterface, masks.make_mask),
    ):
        known = interface().get(name)
        if known is not None and getattr(known, "func", known) is not function:
            raise ValueError(f"name={name!r} is registered with Transformers by somebody else: pass another name")
    transformers.AttentionInterface.register(name, ours)
    masking.AttentionMaskInterface.register(name, masks.make_mask)


def _check_version() -> None:
    """Raise ImportError unless Transformers and PyTorch are there, and new enough."""
    wanted = (
        f"transformers {'.'.join(map(str, _LEAST))} or later, with PyTorch: pip install 'anyattention[huggingface]'"
    )
    try:
        transformers, _ = _import_module("transformers"), _import_module("torch")
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed, but the integration needs {wanted}") from error
    found = tuple(int(part) for part in _re.findall(r"\d+", transformers.__version__)[:2])
    if found < _LEAST:
        raise ImportError(f"transformers {transformers.__version__} is too old: the integration needs {wanted}")
