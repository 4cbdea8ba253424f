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

    base: Array | None  # [..., rows, 1], what is taken from logits before exp: the largest of them; None for nothing
    total: Array  # [..., rows, 1], sum of exp(logit - base)
    output: Array  # [..., rows, v_depth], sum of exp(logit - base) * value


def of_weights(
    backend: Backend, base: Array | None, weights: Array, keep: Array | None, value: Array, precision: Any
) -> Partial:
    """The partial of a tile, from exp of its logits ``[..., rows, columns]``, which it may overwrite.

    Dropout takes weights out of the output, never out of the normalizer.
    """
    total = backend.row_sum(weights)
    if keep is not None:
        weights = backend.fill(weights, keep, 0.0)
    return Partial(base, total, backend.matmul(weights, value, precision))


def of_hidden(backend: Backend, rows: Array, fill: float, values: tuple[Array, ...]) -> Partial:
    """The partial of keys, given by their values, that none of the rows may see: all their logits are the fill."""
    ones = backend.xp.ones_like(rows[..., :1])
    sums = [backend.column_sum(x) for x in values]
    return Partial(ones * fill, ones * sum(x.shape[-2] for x in values), ones * sum(sums[1:], sums[0]))


def merge(backend: Backend, a: Partial, b: Partial) -> Partial:
    """The partial of the union of two disjoint sets of keys, whose bases it may overwrite."""
    if a.base is None or b.base is None:
        return Partial(None, a.total + b.total, a.output + b.output)
    base = backend.xp.maximum(a.base, b.base)
    left, right = (backend.exp_minus(x, finite(backend, base)) for x in (a.base, b.base))
    return Partial(base, a.total * left + b.total * right, a.output * left + b.output * right)


def finish(partial: Partial, keep_prob: float) -> Array:
    """The output, ``[..., rows, v_depth]``; NaN where every logit was minus infinity, as a softmax gives."""
    return partial.output / (partial.total * keep_prob)


def finite(backend: Backend, base: Array | None) -> Array | None:
    """The base to subtract before exp: zero where it is -inf, since -inf - -inf is NaN."""
    return None if base is None else backend.xp.where(base == -float("inf"), 0.0, base)
