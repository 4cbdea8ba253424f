"""MLX's `fast.scaled_dot_product_attention`.

MLX itself replaces the kernel by plain operations on CPU and where it is differentiated, so that low biases have right
gradients. An output of a bias that is minus infinity throughout is NaN, as a softmax makes it, but for a sink.
"""

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from anyattention.extend import Call, Fused, Structure

Array = Any


class MLXFast(Fused):
    """The kernel; of masks it has causality for equal lengths, and arrays."""

    name = "mlx"
    serves = Fused.serves | {"sinks"}
    platforms = ("cpu", "gpu")
    dtypes = ("float32", "bfloat16", "float16")
    broadcasts = True
    most_elements = 0
    low_biases = True

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        if call.operands.bias is not None and call.operands.mask is not None:
            yield "beside a bias it cannot hide keys as Flax does"
        if (sinks := call.operands.sinks) is not None:
            if (name := call.backend.arrays.dtype_name(sinks)) == "float32" != call.options.dtype:
                yield f"its sinks are of the call's dtype, not {name}"
            if sinks.ndim > 1 and math.prod(sinks.shape[:-2]) != 1:
                yield "its sinks are the same for all batch entries"

    def lacks(self, call: Call, mask: Structure) -> dict[str, str]:
        found = super().lacks(call, mask)
        if mask.causal and list(found) == ["band"] and not mask.rest and call.lengths[0] == call.lengths[1]:
            return {}
        return found | ({"band": "its causal mask ends with the last key, and stands alone"} if mask.banded else {})

    def summed(self, xp: Any, value: Array, dtype: Any) -> Array:
        """MLX's sum takes no dtype."""
        return mx.sum(value.astype(dtype), axis=-3, keepdims=True)

    def kernel(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        mask: Structure,
        scale: float,
        sinks: Array | None = None,
    ) -> Any:
        infinite = None
        sinks = None if sinks is None else sinks[0].astype(query.dtype)
        shown = "causal" if mask.causal else mask.joined
        if bias is not None:
            largest = mx.max(bias, axis=-1, keepdims=True)
            infinite, shown = largest == -mx.inf, bias
            infinite = infinite if sinks is None else infinite & (sinks[:, None, None] == -mx.inf)
            if bias.dtype != mx.float16:  # the kernel's powers of two overflow; half of it hides as well
                shown = mx.where(largest < mx.finfo(bias.dtype).min / 2, bias * 0.5, bias)
        four = (mx.swapaxes(x, 1, 2) for x in (query, key, value))
        output = mx.fast.scaled_dot_product_attention(*four, scale=scale, mask=shown, sinks=sinks)
        if infinite is not None:
            output = output * mx.where(infinite, mx.nan, 1.0).astype(output.dtype)
        return mx.swapaxes(output, 1, 2)
