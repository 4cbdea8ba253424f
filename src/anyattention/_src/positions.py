"""Positions of queries and keys as arrays, of lengths that may be known at run time only."""

from typing import Any

from anyattention._src.interfaces import Arrays, permute, unknown

Array = Any


def positions(arrays: Arrays, x: Array, axis: int = -1) -> Array:
    """0, 1, 2, ... along the last axis, or -3, int32: ``[length]``, or ``[..., length]`` where that is unknown."""
    xp, length = arrays.xp, x.shape[axis]
    if unknown(length):
        if axis == -3:  # one head serves all, since queries may have more of them than keys
            x = permute(arrays, x[..., :1, 0], (-1, -2))
        ones = xp.ones_like(x, dtype=xp.int32)
        return xp.cumulative_sum(ones, axis=-1, dtype=xp.int32) - 1
    return xp.arange(length, dtype=xp.int32, **arrays.beside(x))
