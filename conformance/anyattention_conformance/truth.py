"""What is right: Flax's formula in float64, with its gradients, and how large the sums were that gave each number."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from anyattention_conformance.case import lowest
from anyattention_conformance.threefry import bernoulli

Array = Any
NAMES = ("query", "key", "value", "bias")
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
    arrays = {name: np.asarray(arguments[name], np.float64) for name in NAMES if name in arguments}
    query, key, value = (np.swapaxes(arrays[name], -2, -3) for name in NAMES[:3])
    root = max(query.shape[-1], 1) ** 0.5
    with np.errstate(all="ignore"):
        logits = (query / root) @ np.swapaxes(key, -1, -2) + arrays.get("bias", 0.0)
        if (mask := arguments.get("mask")) is not None:
            mask = np.asarray(mask).astype(bool)
            logits = np.where(mask, logits, lowest(dtype) if meaning.fill == MINIMUM else float(meaning.fill))
        weights = _softmax(logits, meaning.empty)
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
        dlogits = weights * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True))
        sizes = weights * (terms + np.sum(weights * terms, axis=-1, keepdims=True))
        if mask is not None:
            dlogits, sizes = (np.where(mask, x, 0.0) for x in (dlogits, sizes))

        def gradients(dlogits: Array, kept: Array, cotangent: Array, query: Array, key: Array) -> dict[str, Array]:
            found = {
                "query": _product(dlogits, _grown(key, dlogits.shape[-1])) / root,
                "key": _product(np.swapaxes(dlogits, -1, -2), _grown(query, dlogits.shape[-2])) / root,
                "value": np.swapaxes(kept, -1, -2) @ cotangent,
                "bias": dlogits,
            }
            turned = {name: x if name == "bias" else np.swapaxes(x, -2, -3) for name, x in found.items()}
            return {name: sum_to(turned[name], arrays[name].shape) for name in arrays}

        return (
            Answer(np.swapaxes(output, -2, -3), gradients(dlogits, kept, cotangent, query, key)),
            Answer(
                np.swapaxes(size, -2, -3),
                gradients(sizes, np.abs(kept), np.abs(cotangent), *(np.abs(_finite(x)) for x in (query, key))),
            ),
        )


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum of `x` over the axes along which an array of this shape was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return np.sum(x, axis=axes, keepdims=True)


def _softmax(logits: Array, empty: float) -> Array:
    top = np.max(logits, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - top)
    weights = weights / np.sum(weights, axis=-1, keepdims=True)
    return np.where(top == -np.inf, empty, weights)


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
