"""How far an answer may be from Flax's, from the inputs alone: no tolerance is tuned."""

from typing import Any

import numpy as np

Array = Any
EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


def within_c2(actual: Array, expected: Array, arguments: dict[str, Any], dtype: str) -> str:
    """Contract C2; the empty string if it holds, else what is wrong.

    Per row, ``abs(ours - Flax) <= eps (1 + kappa) max_d sum_k w abs(v)``, with
    ``kappa = max_k (sum_d abs(q_d k_d) / sqrt(depth) + abs(bias))`` over visible keys and eps of the compute dtype.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype}{actual.shape} instead of {expected.dtype}{expected.shape}"
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    if not np.array_equal(np.isnan(actual), np.isnan(expected)):
        return "NaN in other places"
    allowed = EPS[dtype] * _scale(arguments)
    error = np.nan_to_num(np.abs(actual - expected))
    worst = float(np.max(error - allowed, initial=0.0))
    return f"outside the budget by {worst:.3g}" if worst > 0 else ""


def _scale(arguments: dict[str, Any]) -> Array:
    """``(1 + kappa) max_d sum_k w abs(v)``, ``[..., q_length, heads, 1]``, in float64."""
    query, key, value = (arguments[name].astype(np.float64) for name in ("query", "key", "value"))
    if not key.shape[-3]:
        return np.zeros((*query.shape[:-1], 1))
    root = max(query.shape[-1], 1) ** 0.5
    logits = np.einsum("...qhd,...khd->...hqk", query, key) / root
    size = np.einsum("...qhd,...khd->...hqk", np.abs(query), np.abs(key)) / root
    if (bias := arguments.get("bias")) is not None:
        bias = bias.astype(np.float64)
        logits, size = logits + bias, size + np.where(np.isfinite(bias), np.abs(bias), 0)
    if (mask := arguments.get("mask")) is not None:
        logits = np.where(mask, logits, -1e300)
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
        weights = np.nan_to_num(weights / np.sum(weights, axis=-1, keepdims=True))
    weights = weights / (1.0 - arguments.get("dropout_rate", 0.0))
    if value.shape[-3] == 1:
        weights = weights.sum(axis=-1, keepdims=True)
    spread = np.einsum("...hqk,...khd->...qhd", weights, np.abs(value)).max(axis=-1, keepdims=True, initial=0.0)
    kappa = np.swapaxes(size.max(axis=-1, keepdims=True), -3, -2)
    return (1 + kappa) * spread


def within_c3(actual: Array, flax: Array, truth: Array, size: Array, dtype: str) -> str:
    """Contract C3 for an output or a gradient; the empty string if it holds, else what is wrong.

    Error against float64 truth, in units of the largest `size` (sum of absolute values of what was added) in its
    row: maximum and root mean square over all rows are at most twice Flax's own, plus 4 eps.
    """
    if actual.shape != truth.shape:
        return f"shape {actual.shape} instead of {truth.shape}"
    if not np.array_equal(np.isnan(actual), np.isnan(truth)):
        return "NaN in other places than the truth"
    unit = np.max(size, axis=-1, keepdims=True, initial=0.0)
    unit = np.where(unit > 0, unit, 1.0)

    def errors(x: Array) -> Array:
        with np.errstate(invalid="ignore"):
            error = np.abs(x.astype(np.float64) - truth) / unit
        return np.where(np.isfinite(truth) & np.isfinite(x.astype(np.float64)), error, 0.0)

    for name, measure in (("maximum", lambda x: np.max(x, initial=0.0)), ("rms", lambda x: np.sqrt(np.mean(x * x)))):
        ours, theirs = (float(measure(errors(x))) if x.size else 0.0 for x in (actual, flax))
        if ours > 2 * theirs + 4 * EPS[dtype]:
            return f"{name} error {ours:.3g}, Flax's {theirs:.3g}"
    return ""
