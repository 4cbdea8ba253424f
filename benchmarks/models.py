"""Cases of Gemma 2 and gpt-oss: what our call takes, Transformers' own attention, and the true answer."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.cases import Case

SOFT_CAP = {"Gemma 2": 50.0}
WINDOW = {"Gemma 2": 4096, "gpt-oss": 128}  # keys that a query sees, its own among them


def sinks(case: Case) -> np.ndarray | None:
    """A logit for each head of gpt-oss."""
    if case.kind != "gpt-oss":
        return None
    return np.random.default_rng(1).standard_normal(case.heads, dtype=np.float32)


def our_options(case: Case, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """The arguments that say the same to `dot_product_attention`."""
    from anyattention.masks import LocalMask

    options: dict[str, Any] = {"scale": case.depth**-0.5, "mask": LocalMask(WINDOW[case.kind] - 1, 0)}
    if case.kind in SOFT_CAP:
        options["logits_soft_cap"] = SOFT_CAP[case.kind]
    return options if (logits := sinks(case)) is None else options | {"sinks": put(logits)}


def visible(case: Case, rows: np.ndarray) -> np.ndarray:
    """Which keys some queries see, ``[rows, keys]``."""
    distance = rows[:, None] - np.arange(case.keys)
    return (distance >= 0) & (distance < WINDOW[case.kind])


def eager(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    """The `eager` attention of Transformers, with the mask as the model makes it, once for all its layers."""
    import torch
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    mask = torch.zeros(1, 1, case.q_length, case.keys)
    hidden = torch.asarray(~visible(case, np.arange(case.q_length)))
    mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
    module = SimpleNamespace(num_key_value_groups=case.heads // case.kv_heads, training=False)
    query, key, value = (x.transpose(1, 2) for x in arrays)
    if case.kind == "Gemma 2":
        function, more = modeling_gemma2.eager_attention_forward, {"softcap": SOFT_CAP[case.kind]}
    else:
        function, more = modeling_gpt_oss.eager_attention_forward, {}
        module.sinks = torch.asarray(sinks(case))
    return lambda: function(module, query, key, value, mask, scaling=case.depth**-0.5, **more)[0]


def right(case: Case, arrays: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The output of some queries of the last batch entry in float64, or its sum of squares' gradient by them."""
    query, key, value = (x[-1].astype(np.float64) for x in arrays)
    key, value = (np.repeat(x, case.heads // case.kv_heads, axis=1) for x in (key, value))
    scale, cap, extra = case.depth**-0.5, SOFT_CAP.get(case.kind), sinks(case)
    logits, slope = np.einsum("qhd,khd->hqk", query[rows], key) * scale, 1.0
    if cap is not None:
        tanh = np.tanh(logits / cap)
        logits, slope = cap * tanh, 1 - tanh**2
    weights = np.where(visible(case, rows), np.exp(logits), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True) + (0.0 if extra is None else np.exp(extra)[:, None, None])
    output = np.einsum("hqk,khd->qhd", weights, value)
    if not case.gradient:
        return output
    dweights = np.einsum("qhd,khd->hqk", 2 * output, value)
    dlogits = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True)) * slope
    return np.einsum("hqk,khd->qhd", dlogits, key) * scale
