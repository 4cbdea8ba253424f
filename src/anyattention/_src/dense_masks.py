"""Flax's helpers that make and combine dense masks."""

import operator
from collections.abc import Callable
from typing import Any

from anyattention._src import arguments, dtypes, registry
from anyattention._src.errors import ShapeError
from anyattention._src.interfaces import Backend
from anyattention._src.positions import positions
from anyattention._src.rules import Mask

Array = Any


def make_attention_mask(
    query_input: Array,
    key_input: Array,
    pairwise_fn: Callable[[Array, Array], Array] = operator.mul,
    extra_batch_dims: int = 0,
    dtype: Any = "float32",
) -> Array:
    """Mask from a value for each query and one for each key, ``[batch..., 1, q_length, kv_length]``.

    Args:
        query_input: ``[batch..., q_length]``, for example 1 at tokens and 0 at padding.
        key_input: ``[batch..., kv_length]``.
        pairwise_fn: called with ``[batch..., q_length, 1]`` and ``[batch..., 1, kv_length]``.
        extra_batch_dims: this many axes of size 1 in front.
        dtype: of the mask, cast last; name, scalar type or the library's dtype.

    Examples:
        >>> import numpy as np
        >>> make_attention_mask(np.array([1, 1, 0]), np.array([1, 0]), dtype=bool).tolist()
        [[[True, False], [True, False], [False, False]]]
    """
    backend = registry.backend_for(query_input=query_input, key_input=key_input)
    xp = backend.xp
    query_input, key_input = (
        _with_length(backend, name, x) for name, x in (("query_input", query_input), ("key_input", key_input))
    )

    def mask() -> Array:
        one, two = backend.arrays.join(query_input, key_input)
        result = pairwise_fn(xp.expand_dims(one, axis=-1), xp.expand_dims(two, axis=-2))
        for axis in (-3, *(0,) * extra_batch_dims):
            result = xp.expand_dims(result, axis=axis)
        return result

    return _cast(backend, backend.arrays.run(query_input, mask), dtype)


def _with_length(backend: Backend, name: str, x: Any) -> Array:
    x = arguments.array_of(backend, name, x)
    if x.ndim == 0:
        raise ShapeError(f"{name} needs a length axis, got shape ()")
    return x


def _cast(backend: Backend, mask: Array, dtype: Any) -> Array:
    try:
        return backend.arrays.cast(mask, dtypes.name_of(dtype))
    except (TypeError, KeyError) as error:
        raise dtypes.refused(dtype, error) from None


def make_causal_mask(x: Array, extra_batch_dims: int = 0, dtype: Any = "float32") -> Array:
    """Lower-triangular mask, ``[batch..., 1, length, length]``, for an array ``[batch..., length]``.

    Args:
        x: ``[batch..., length]``, of which only the shape is read.
        extra_batch_dims: this many axes of size 1 in front.
        dtype: of the mask; name, scalar type or the library's dtype.

    Examples:
        >>> import numpy as np
        >>> make_causal_mask(np.zeros(3), dtype=int).tolist()
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    """
    backend = registry.backend_for(x=x)
    x = _with_length(backend, "x", x)
    index, _ = backend.xp.broadcast_arrays(positions(backend.arrays, x), x)
    return make_attention_mask(index, index, operator.ge, extra_batch_dims, dtype)


def combine_masks(*masks: Array | None, dtype: Any = "float32") -> Array | None:
    """The logical and of masks of one rank, skipping None; None if there is no mask.

    One mask alone is cast and keeps its values, as in Flax.

    Raises:
        ShapeError: masks of different rank.
    """
    given = {f"masks[{i}]": mask for i, mask in enumerate(masks) if mask is not None}
    if not given:
        return None
    for name, mask in given.items():
        if isinstance(mask, Mask):
            raise TypeError(f"{name} is {mask}, a mask by rule: join such masks and arrays by &, as in {mask} & other")
    backend = registry.backend_for(**given)
    present = [arguments.dense_of(backend, name, mask, None) for name, mask in given.items()]
    ranks = tuple(mask.ndim for mask in present)
    if len(set(ranks)) > 1:
        raise ShapeError(f"masks must have same rank: {ranks}")
    result = present[0]
    for mask in present[1:]:
        result = backend.xp.logical_and(backend.arrays.truth(result), backend.arrays.truth(mask))
    return _cast(backend, result, dtype)
