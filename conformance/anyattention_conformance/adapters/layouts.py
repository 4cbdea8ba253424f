"""Flax's arguments in the forms that other libraries want; what has the right form already is handed on as it is."""

from collections.abc import Callable
from math import prod
from typing import Any

Array = Any
Shape = tuple[int, ...]


def one_batch(*arrays: Array) -> tuple[Array, ...]:
    """Query, key and value with exactly one batch axis, ``[batch, length, heads, depth]``."""
    return arrays if arrays[0].ndim == 4 else tuple(_one_batch(x) for x in arrays)


def one_batch_of_logits(x: Array, batch: Shape, broadcast_to: Callable[..., Array]) -> Array:
    """A mask or bias for arrays that had these batch axes and now have one."""
    if x is None or len(batch) < 2 or x.ndim < 4:
        return x
    return _one_batch(broadcast_to(x, (*batch, *x.shape[-3:])))


def batches(output: Array, batch: Shape) -> Array:
    """The output with the batch axes that the query had."""
    return output if len(batch) == 1 else output.reshape((*batch, *output.shape[1:]))


def four_axes(x: Array) -> Array:
    """A mask or bias with exactly four axes, ``[batch, heads, q_length, kv_length]``. ValueError if it has more."""
    if x is None:
        return None
    if x.ndim > 4:
        raise ValueError(f"a mask or bias has at most four axes, not {x.ndim}")
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))


def masks_only(mask: Array) -> Array:
    """A mask for a library that adds others to the logits, or does not say what they mean. TypeError if not boolean."""
    if mask is not None and not str(mask.dtype).endswith("bool"):
        raise TypeError(f"a mask of {mask.dtype} is no mask to this library: pass a boolean one")
    return mask


def adds_only(bias: Array) -> Array:
    """A bias for a library that takes a boolean one for a mask. TypeError if it is boolean."""
    if bias is not None and str(bias.dtype).endswith("bool"):
        raise TypeError("a boolean bias would hide keys: pass one of numbers")
    return bias


def _one_batch(x: Array) -> Array:
    return x.reshape((prod(x.shape[:-3]), *x.shape[-3:]))
