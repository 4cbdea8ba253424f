"""Attention over some of the keys, in a form that can be joined with attention over the others.

A softmax need not see a whole row at once. Over any set of keys it is enough to know, for each query, the largest
logit, the sum of the exponentials relative to it, and the sum of the values weighted by them. Two such partials of
disjoint sets merge into that of their union, in any order and grouping.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Rabe and Staats, Self-attention
does not need O(n^2) memory (2021).
"""

from typing import Any, NamedTuple

from anyattention.backend import Backend

Array = Any


class Partial(NamedTuple):
    """Attention over a set of keys, not yet divided by its normalizer."""

    maximum: Array  # [..., rows, 1], the largest logit
    total: Array  # [..., rows, 1], sum of exp(logit - maximum)
    output: Array  # [..., rows, v_depth], sum of exp(logit - maximum) * value


def of_tile(backend: Backend, logits: Array, value: Array, keep: Array | None, precision: Any) -> Partial:
    """The partial of a tile of logits ``[..., rows, columns]``, which it may overwrite, and its values.

    Dropout takes weights out of the output, never out of the normalizer.
    """
    maximum = backend.row_max(logits)
    weights = backend.exp_minus(logits, shift(backend, maximum))
    total = backend.row_sum(weights)
    if keep is not None:
        weights = backend.xp.where(keep, weights, 0.0)
    return Partial(maximum, total, backend.matmul(weights, value, precision))


def of_hidden(backend: Backend, rows: Array, fill: float, count: int, values: Array) -> Partial:
    """The partial of keys that none of the rows may see: all their logits are the fill.

    `count` is their number, `values` ``[..., 1, v_depth]`` the sum of their values.
    """
    ones = backend.xp.ones_like(rows[..., :1])
    return Partial(ones * fill, ones * count, ones * values)


def merge(backend: Backend, a: Partial, b: Partial) -> Partial:
    """The partial of the union of two disjoint sets of keys."""
    maximum = backend.xp.maximum(a.maximum, b.maximum)
    base = shift(backend, maximum)
    left, right = (backend.xp.exp(x.maximum - base) for x in (a, b))
    return Partial(maximum, a.total * left + b.total * right, a.output * left + b.output * right)


def finish(partial: Partial, keep_prob: float) -> Array:
    """The output, ``[..., rows, v_depth]``; NaN where every logit was minus infinity, as a softmax gives."""
    return partial.output / (partial.total * keep_prob)


def shift(backend: Backend, maximum: Array) -> Array:
    """What to subtract before exp: the maximum, but zero where that is -inf, since -inf - -inf is NaN."""
    return backend.xp.where(maximum == -float("inf"), 0.0, maximum)
