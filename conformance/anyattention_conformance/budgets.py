"""How far an answer may be from Flax's, from the inputs and from Flax's own error: no tolerance is tuned."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from anyattention_conformance.truth import column, served, truth

Array = Any
EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}
# What may be lost to underflow: the smallest normal number, since libraries flush others to zero; in float16, which is
# computed in float32, the smallest number there is.
UNDERFLOW = {"bfloat16": 2.0**-126, "float16": 2.0**-24, "float32": 2.0**-126, "float64": 2.0**-1022}


@dataclass(frozen=True)
class Comparison:
    """How an answer compares: `message` is empty where the contract holds.

    `ratio` is error over budget. `error` and `flax_error` are against the truth, in units of the sums' size.
    `worst` is the index of the element that is furthest off.
    """

    message: str = ""
    ratio: float = 0.0
    error: float | None = None
    flax_error: float | None = None
    worst: tuple[int, ...] | None = None


class Errors(NamedTuple):
    """How far an answer is from the truth, in units of what was summed."""

    maximum: float
    rms: float


def same_bits(actual: Array, expected: Array) -> Comparison:
    """Contract C1: dtype, shape and every bit."""
    if problem := _kind(actual, expected):
        return problem
    bits = f"u{actual.itemsize}"
    other = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)
    other &= ~(np.isnan(actual) & np.isnan(expected))
    if not other.any():
        return Comparison()
    return Comparison(f"{int(other.sum())} of {other.size} numbers have other bits", float("inf"), worst=_where(other))


def within_c2(actual: Array, expected: Array, arguments: dict[str, Any], dtype: str) -> str:
    """What is wrong by contract C2; empty if nothing.

    Args:
        actual: the output that is judged, a NumPy array.
        expected: Flax's output.
        arguments: query, key, value and what else was passed, by Flax's names, as NumPy arrays.
        dtype: of the computation.
    """
    return c2(actual, expected, arguments, dtype).message


def within_c3(actual: Array, flax: Array, truth: Array, size: Array, dtype: str) -> str:
    """What is wrong by contract C3; empty if nothing.

    Args:
        actual: the output or gradient that is judged, a NumPy array.
        flax: Flax's, of which the error is the yardstick.
        truth: the same in float64, as `truth` gives it first.
        size: the sums of absolute values, as `truth` gives them second.
        dtype: of the computation.
    """
    return c3(actual, flax, truth, size, dtype).message


def c2(actual: Array, expected: Array, arguments: dict[str, Any], dtype: str) -> Comparison:
    """Contract C2 of an output, against Flax's.

    Per row, ``abs(ours - Flax) <= eps (1 + kappa) max_d sum_k w abs(v)``, with
    ``kappa = max_k (sum_d abs(q_d k_d) / sqrt(depth) + abs(bias))`` and eps of the compute dtype; NaN in the same
    places. A scale takes the place of ``1 / sqrt(depth)``. A soft cap changes nothing: its slope is at most one. A sink
    is a logit, which is given: it counts where it is the maximum that is subtracted from all.
    """
    if problem := _kind(actual, expected) or same_nan(actual, expected):
        return problem
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    allowed = np.broadcast_to(EPS[dtype] * _allowance(arguments, dtype), actual.shape)
    with np.errstate(invalid="ignore"):
        error = np.where(actual == expected, 0.0, np.nan_to_num(np.abs(actual - expected)))
    return _judged(error, np.maximum(allowed, np.finfo(np.float64).tiny))


def c3(
    actual: Array, flax: Array, truth: Array, size: Array, dtype: str, usual: tuple[Array, Array] | None = None
) -> Comparison:
    """Contract C3 of an output or a gradient, against the truth in float64.

    The errors are measured in units of the largest `size` (the sum of absolute values of what was added) in their row:
    maximum and root mean square over all rows are at most twice Flax's own, plus 4 eps; a row counts as no smaller than
    what loses eps to underflow. Where Flax's answer is not finite it may be given as well. If another meaning than
    Flax's is declared, `usual` has truth and size in Flax's meaning, in which Flax's error is taken.
    """
    if actual.shape != truth.shape:
        return Comparison(f"shape {actual.shape} instead of {truth.shape}", float("inf"))
    actual, flax = actual.astype(np.float64), flax.astype(np.float64)
    flax_truth, flax_size = usual or (truth, size)
    unit = unit_of(np.maximum(size, flax_size), dtype)
    as_flax = ~np.isfinite(flax) & ((actual == flax) | (np.isnan(actual) & np.isnan(flax)))
    as_flax &= ~other_meaning(truth, flax_truth)
    wrong = ~as_flax & (np.isnan(actual) != np.isnan(truth))
    wrong |= ~as_flax & ~np.isnan(truth) & (np.isinf(actual) | np.isinf(truth)) & (actual != truth)
    if wrong.any():
        at = _where(wrong)
        count = f" at {int(wrong.sum())} of {wrong.size} places" if wrong.size > 1 else ""
        return Comparison(f"{actual[at]:.4g} instead of {truth[at]:.4g}{count}", float("inf"), worst=at)

    return by_errors(errors(actual, truth, unit), errors_of(flax, flax_truth, unit), dtype)


def unit_of(size: Array, dtype: str) -> Array:
    """What errors are measured in: the largest sum of a row, at least what loses eps to underflow."""
    unit = np.max(size, axis=-1, keepdims=True, initial=0.0)
    return np.maximum(np.where(unit > 0, unit, 1.0), UNDERFLOW[dtype] / EPS[dtype])


def errors(x: Array, truth: Array, unit: Array) -> Array:
    """The error of every number; zero where it or the truth is not finite."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(truth) & np.isfinite(x), np.abs(x.astype(np.float64) - truth) / unit, 0.0)


def errors_of(x: Array, truth: Array, unit: Array) -> Errors:
    """Their maximum and root mean square."""
    return _errors(errors(x, truth, unit))


def _errors(found: Array) -> Errors:
    return Errors(float(np.max(found, initial=0.0)), float(np.sqrt(np.mean(found * found))) if found.size else 0.0)


def by_errors(ours: Array, flax: Errors, dtype: str) -> Comparison:
    """Contract C3 where nothing but the sizes of errors is in question."""
    found = Comparison()
    for name, error, flax_error in zip(Errors._fields, _errors(ours), flax, strict=True):
        ratio = error / (2 * flax_error + 4 * EPS[dtype])
        if name == "maximum" or ratio > max(1.0, found.ratio):
            message = f"{name} error {error:.3g}, Flax's {flax_error:.3g}" if ratio > 1 else ""
            found = Comparison(message, ratio, error, flax_error, _where(ours == ours.max()) if ours.size else None)
    return found


def other_meaning(truth: Array, usual: Array) -> Array:
    """Where an answer in float64 is another than in Flax's meaning."""
    return ~np.isclose(truth, usual, rtol=1e-12, atol=1e-300, equal_nan=True)


def same_nan(actual: Array, expected: Array) -> Comparison | None:
    """What is wrong if NaN is in other places than Flax's."""
    other = np.isnan(actual) != np.isnan(expected)
    if not other.any():
        return None
    at = _where(other)
    return Comparison(f"{actual[at]:.4g} instead of {expected[at]:.4g}: NaN in other places", float("inf"), worst=at)


def _kind(actual: Array, expected: Array) -> Comparison | None:
    if actual.shape == expected.shape and actual.dtype == expected.dtype:
        return None
    return Comparison(f"{actual.dtype}{actual.shape} instead of {expected.dtype}{expected.shape}", float("inf"))


def _allowance(arguments: dict[str, Any], dtype: str) -> Array:
    """``(1 + kappa) max_d sum_k w abs(v)``, ``[..., q_length, heads, 1]``, in float64."""
    query, key = (arguments[name].astype(np.float64) for name in ("query", "key"))
    query, key = (np.swapaxes(x, -2, -3) for x in (query, served(query, key)))
    scale = arguments.get("scale")
    factor = 1.0 / max(query.shape[-1], 1) ** 0.5 if scale is None else abs(float(scale))
    bias = np.asarray(arguments.get("bias", 0.0), np.float64)
    with np.errstate(all="ignore"):
        terms = np.abs(query) @ np.abs(np.swapaxes(key, -1, -2)) * factor
        terms = np.nan_to_num(terms + np.abs(bias), nan=0.0, posinf=0.0)
    kappa = np.maximum(np.max(terms, axis=-1, keepdims=True, initial=0.0), column(arguments.get("sinks")))
    kappa = np.swapaxes(kappa, -2, -3)
    rate = 0.0 if arguments.get("deterministic", False) else arguments.get("dropout_rate", 0.0)
    spread = truth(arguments | {"dropout_rate": 0.0}, dtype)[1].output
    with np.errstate(all="ignore"):  # at rate 1 the quotient is infinite; so is Flax's answer
        spread = np.max(spread, axis=-1, keepdims=True, initial=0.0) / np.float64(1.0 - rate)
        return np.nan_to_num((1 + kappa) * spread)


def _judged(error: Array, allowed: Array) -> Comparison:
    if not error.size:
        return Comparison()
    ratio = error / allowed
    worst = float(ratio.max())
    return Comparison(f"outside the budget {worst:.3g} times" if worst > 1 else "", worst, worst=_where(ratio == worst))


def _where(found: Array) -> tuple[int, ...]:
    """The first index at which an array is true."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(found)), found.shape))
