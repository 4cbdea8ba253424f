"""Attention over some of the keys, in a form that can be joined with attention over the others.

A softmax need not see a whole row at once. Over any set of keys it is enough to know, for each query, the largest
logit, the sum of the exponentials relative to it, and the sum of the values weighted by them. Two such partials of
disjoint sets merge into that of their union, in any order and grouping.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Rabe and Staats, Self-attention
does not need O(n^2) memory (2021).
"""

from typing import Any, NamedTuple

from anyattention._src.interfaces import Tiles

Array = Any


class Partial(NamedTuple):
    """Attention over a set of keys, not yet divided by its normalizer."""

    base: Array | None  # [..., rows, 1], subtracted from logits before exp: the largest of them; None for zero
    total: Array  # [..., rows, 1], sum of exp(logit - base)
    output: Array  # [..., rows, v_depth], sum of exp(logit - base) * value


def nothing(xp: Any, rows: Array, v_depth: int) -> Partial:
    """The partial of no keys for some rows ``[..., rows, *]``: what a compiled loop starts from."""
    total = xp.zeros_like(rows[..., :1])
    return Partial(total - float("inf"), total, xp.broadcast_to(total, (*total.shape[:-1], v_depth)))


def of_hidden(tiles: Tiles, rows: Array, fill: float, values: tuple[Array, ...]) -> Partial:
    """The partial of keys, given by their values, that none of the rows may see: all their logits are the fill."""
    ones = tiles.xp.ones_like(rows[..., :1])
    sums = [tiles.column_sum(x) for x in values]
    return Partial(ones * fill, ones * sum(x.shape[-2] for x in values), ones * sum(sums[1:], sums[0]))


def of_sinks(xp: Any, sinks: Array, rows: Partial, small: bool) -> Partial:
    """The partial of a key without a value, whose logit is the sink of each row; `small` ones are their own base."""
    ones, nothing = xp.ones_like(rows.total), xp.zeros_like(rows.output)
    return Partial(None, ones * xp.exp(sinks), nothing) if small else Partial(ones * sinks, ones, nothing)


def merge(tiles: Tiles, a: Partial, b: Partial) -> Partial:
    """The partial of the union of two disjoint sets of keys, whose bases and outputs it may overwrite."""
    if a.base is None and b.base is None:
        return Partial(None, a.total + b.total, tiles.plus(a.output, b.output))
    bases = [tiles.xp.zeros_like(x.total) if x.base is None else x.base for x in (a, b)]
    base = tiles.xp.maximum(*bases)
    left, right = (tiles.exp_minus(x, finite(tiles, base)) for x in bases)
    return Partial(base, a.total * left + b.total * right, tiles.plus(a.output * left, b.output * right))


def finish(partial: Partial, keep_prob: float) -> Array:
    """The output, ``[..., rows, v_depth]``; NaN where every logit was minus infinity, as a softmax gives."""
    return partial.output / (partial.total * float(keep_prob))


def finish_some(xp: Any, partial: Partial, keep_prob: float) -> Array:
    """The same of keys beside which there are others: where every logit was minus infinity, no derivative is NaN."""
    none = partial.total == 0.0
    output = finish(partial._replace(total=xp.where(none, 1.0, partial.total)), keep_prob)
    return xp.where(none, float("nan"), output)


def finite(tiles: Tiles, base: Array | None) -> Array | None:
    """The base to subtract before exp: zero where it is -inf, since -inf - -inf is NaN."""
    return None if base is None else tiles.xp.where(base == -float("inf"), 0.0, base)
