from types import SimpleNamespace
from typing import Any

import ndonnx
import spox.opset.ai.onnx.v21 as onnx

from anyattention.extend import Arrays

Array = Any


class NDonnxArrays(Arrays):
    def matmul(self, x: Array, y: Array) -> Array:
        """The library's own forgets all sizes of its shape, and adds some hundred nodes to the model.

        Like that one it keeps arrays without elements from ONNX's product, in which onnxruntime has crashed.
        """
        sizes = (*x.shape, *y.shape)
        if 0 in sizes:
            return _empty_product(x, y)
        if None not in sizes:
            return _product(x, y)
        empty = (x.dynamic_size == 0) | (y.dynamic_size == 0)
        (result,) = onnx.if_(
            empty.unwrap_spox(),
            then_branch=lambda: [_empty_product(x, y).unwrap_spox()],
            else_branch=lambda: [_product(x, y).unwrap_spox()],
        )
        return ndonnx.asarray(result)


def _product(x: Array, y: Array) -> Array:
    return ndonnx.asarray(onnx.matmul(x.unwrap_spox(), y.unwrap_spox()))


def _empty_product(x: Array, y: Array) -> Array:
    """The product where `x` or `y` has no elements, so that the array of all terms has none either."""
    return ndonnx.sum(ndonnx.expand_dims(x, axis=-1) * ndonnx.expand_dims(y, axis=-3), axis=-2)


def _reshape(x: Array, shape: tuple[int | None, ...]) -> Array:
    """ndonnx's, and for a shape with None in it: the unknown sizes of `x`, in their order."""
    if None not in shape:
        return ndonnx.reshape(x, shape)
    unknown = iter([x.dynamic_shape[axis : axis + 1] for axis, size in enumerate(x.shape) if size is None])
    sizes = [next(unknown) if size is None else ndonnx.asarray([size], dtype=ndonnx.int64) for size in shape]
    result = ndonnx.reshape(x, ndonnx.concat(sizes))
    # Once more, so that the known sizes are: ONNX copies a size where 0 is asked for.
    known = onnx.const([size or 0 for size in shape], "int64")
    return ndonnx.asarray(onnx.reshape(result.unwrap_spox(), known))


# The standard has no words for a reshape to sizes of which some are known at run time only.
xp = SimpleNamespace(**(vars(ndonnx) | {"reshape": _reshape}))
