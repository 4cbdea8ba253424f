"""What is right: Flax's formula in float64, with its gradients, and how large the sums were that gave each number."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from anyattention_conformance.case import lowest
from anyattention_conformance.positions import dense
from anyattention_conformance.threefry import bernoulli

Array = Any
NAMES = ("query", "key", "value", "bias", "sinks")  # the arrays that have gradients
MINIMUM = "minimum"


class Answer(NamedTuple):
    """The output and, given a cotangent, the gradients by name, as NumPy arrays."""

    output: Array
    gradients: dict[str, Array]


@dataclass(frozen=True)
class Meaning:
    """What attention means where definitions differ; the defaults are Flax's.

    `fill` replaces the logits of hidden keys: "minimum", the smallest finite number of the compute dtype, or a number.
    `empty` is the weight of every key where all logits are minus infinity: NaN or zero.
    """

    fill: float | str = MINIMUM
    empty: float = float("nan")


FLAX = Meaning()


def truth(
    arguments: dict[str, Any], dtype: str, cotangent: Array | None = None, meaning: Meaning = FLAX
) -> tuple[Answer, Answer]:
    """The answer in float64, and for each number of it the sum of the absolute values of what was added to give it.

    `arguments` are NumPy arrays and Python values by Flax's names, `dtype` is the compute dtype. What a weight of zero
    multiplies is left out: a NaN behind a mask does not show. Without a cotangent there are no gradients.
    """
    arguments = dense(arguments)
    arrays = {name: np.asarray(arguments[name], np.float64) for name in NAMES if name in arguments}
    query, key, value = (np.swapaxes(served(arrays["query"], arrays[name]), -2, -3) for name in NAMES[:3])
    scale = arguments.get("scale")
    factor = 1.0 / max(query.shape[-1], 1) ** 0.5 if scale is None else float(scale)
    cap = arguments.get("logits_soft_cap")
    with np.errstate(all="ignore"):
        logits = (query * factor) @ np.swapaxes(key, -1, -2)
        bent = 0.0 if cap is None else np.tanh(logits / cap)
        logits = (logits if cap is None else cap * bent) + arrays.get("bias", 0.0)
        if (mask := arguments.get("mask")) is not None:
            mask = np.asarray(mask).astype(bool)
            logits = np.where(mask, logits, lowest(dtype) if meaning.fill == MINIMUM else float(meaning.fill))
        weights, sink = _softmax(logits, column(arrays.get("sinks")), meaning.empty)
        kept = weights * _keep(arguments, logits.shape)
        rows = np.broadcast_to(value, (*value.shape[:-2], logits.shape[-1], value.shape[-1]))
        output = _product(kept, rows)
        size = np.abs(kept) @ np.abs(_finite(rows))
        if cotangent is None:
            return Answer(np.swapaxes(output, -2, -3), {}), Answer(np.swapaxes(size, -2, -3), {})

        cotangent = np.swapaxes(np.asarray(cotangent, np.float64), -2, -3)
        keep = np.where(weights == 0, 0.0, kept / weights)
        dweights = np.where(kept == 0, 0.0, (cotangent @ np.swapaxes(rows, -1, -2)) * keep)
        terms = (np.abs(cotangent) @ np.abs(np.swapaxes(_finite(rows), -1, -2))) * np.abs(keep)
        mean, size_of_mean = (np.sum(weights * x, axis=-1, keepdims=True) for x in (dweights, terms))
        dlogits, sizes = weights * (dweights - mean), weights * (terms + size_of_mean)
        if mask is not None:
            dlogits, sizes = (np.where(mask, x, 0.0) for x in (dlogits, sizes))

        def gradients(
            dlogits: Array, slope: Array, dsinks: Array, kept: Array, cotangent: Array, query: Array, key: Array
        ) -> dict[str, Array]:
            bent, length = dlogits * slope, dlogits.shape[-1]
            found = {
                "query": _product(bent, _grown(key, length)),
                "key": _product(np.swapaxes(bent, -1, -2), _grown(query, dlogits.shape[-2])),
                "value": np.swapaxes(kept, -1, -2) @ cotangent,
                "bias": dlogits,
                "sinks": dsinks[..., 0],
            }
            turned = {name: x if name in NAMES[3:] else np.swapaxes(x, -2, -3) for name, x in found.items()}
            turned |= {name: _gathered(turned[name], _group(arrays["query"], arrays[name])) for name in NAMES[1:3]}
            if np.ndim(arrays.get("sinks")) == 1:  # of each head
                turned["sinks"] = turned["sinks"].sum(axis=-1)
            return {name: sum_to(turned[name], x.shape) for name, x in arrays.items()}

        absolute = (np.abs(_finite(x)) for x in (query * factor, key * factor))
        return (
            Answer(
                np.swapaxes(output, -2, -3),
                gradients(dlogits, 1.0 - bent**2, -sink * mean, kept, cotangent, query * factor, key * factor),
            ),
            Answer(
                np.swapaxes(size, -2, -3),
                gradients(sizes, 1.0 + bent**2, sink * size_of_mean, np.abs(kept), np.abs(cotangent), *absolute),
            ),
        )


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum of `x` over the axes along which an array of this shape was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return np.sum(x, axis=axes, keepdims=True)


def _softmax(logits: Array, sinks: Array, empty: float) -> tuple[Array, Array]:
    """The weights of the keys, and that of the sink: zero where there is none."""
    top = np.maximum(np.max(logits, axis=-1, keepdims=True, initial=-np.inf), sinks)
    weights, sink = np.exp(logits - top), np.exp(sinks - np.where(top == -np.inf, 0.0, top))
    total = np.sum(weights, axis=-1, keepdims=True) + sink
    return np.where(top == -np.inf, empty, weights / total), np.where(top == -np.inf, 0.0, sink / total)


def column(sinks: Array | None) -> Array:
    """The sinks as a column of logits: minus infinity where there are none."""
    if sinks is None:
        return np.asarray(-np.inf)
    sinks = np.asarray(sinks, np.float64)
    return (sinks[:, None] if sinks.ndim == 1 else sinks)[..., None]


def served(query: Array, x: Array) -> Array:
    """`x` with the heads of the query, where each of its own serves several."""
    return np.repeat(x, _group(query, x), axis=-2)


def _gathered(gradient: Array, group: int) -> Array:
    """The gradient of keys or values, summed over the query heads that each of their heads serves."""
    *lead, heads, depth = gradient.shape
    return gradient.reshape((*lead, heads // group, group, depth)).sum(axis=-2)


def _group(query: Array, x: Array) -> int:
    heads, own = query.shape[-2], x.shape[-2]
    return heads // own if own and heads % own == 0 else 1


def _keep(arguments: dict[str, Any], shape: tuple[int, ...]) -> Array:
    """What dropout multiplies the weights with."""
    rate = arguments.get("dropout_rate", 0.0)
    if not rate or arguments.get("deterministic", False):
        return 1.0
    if arguments.get("broadcast_dropout", True):
        shape = (*(1,) * (np.ndim(arguments["key"]) - 2), *shape[-2:])
    return bernoulli(arguments["dropout_rng"], 1.0 - rate, shape) / np.float64(1.0 - rate)


def _finite(x: Array) -> Array:
    return np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _product(x: Array, y: Array) -> Array:
    """``x @ y``, without the terms whose left factor is zero."""
    if (finite := np.isfinite(y)).all():
        return x @ y
    bad = (x != 0).astype(float) @ (~finite).astype(float)
    return np.where(bad > 0, x @ y, x @ _finite(y))


def _grown(x: Array, length: int) -> Array:
    """`x` with `length` rows, repeated where it has one."""
    return np.broadcast_to(x, (*x.shape[:-2], length, x.shape[-1]))
