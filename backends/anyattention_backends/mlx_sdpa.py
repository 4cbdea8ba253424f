"""MLX's `fast.scaled_dot_product_attention`.

Queries that see no key are shown every key, and their output is replaced by Flax's, the mean of all values, so that
their gradients are Flax's too. An output of a bias that is minus infinity throughout is NaN, as a softmax makes it.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from anyattention import dtypes, masks
from anyattention.engine import Engine, fits, pairs
from anyattention.request import Request

Array = Any


class MLXFast(Engine):
    """The kernel, which MLX itself replaces by plain operations on CPU and where it is differentiated."""

    name = "mlx"

    def refusals(self, request: Request) -> list[str]:
        dtype, query, key, value, bias, mask = request[:6]
        checks = {
            f"there is no kernel for {dtype}": dtype not in ("float32", "bfloat16", "float16"),
            "a softmax in float32 of 16-bit arrays returns float32": request.force_fp32 and "16" in dtype,
            "it has no dropout of Flax's bits": request.dropout is not None,
            "its precision is its own": request.precision is not None,
            "something is empty": 0 in (*query.shape, *key.shape, *value.shape),
            "beside a bias, finfo.min is no mask": bias is not None and mask is not None,
            "bias or mask has axes that query and key lack": not fits(request),
            f"{type(mask).__name__} would be expanded": isinstance(mask, masks.Mask) and not _known(request),
        }
        if hasattr(bias, "shape"):
            wide = dtypes.promote(dtype, self.backend.dtype_name(bias))
            checks[f"the bias makes logits {wide}"] = wide != dtype
        return [reason for reason, holds in checks.items() if holds]

    def attention(self, request: Request, fallback: Callable[[Request], Array]) -> Array:
        dtype, query, key, value, bias, mask = request[:6]
        *batch, _, heads, depth = query.shape
        four = [mx.swapaxes(mx.reshape(x, (-1, *x.shape[-3:])), 1, 2) for x in (query, key, value)]
        seen = infinite = shown = None
        if bias is not None:
            bias = bias if hasattr(bias, "shape") else self.backend.adopt(bias, query)
            shown = pairs(mx, self.backend.cast(bias, dtype), batch)
            largest = mx.max(shown, axis=-1, keepdims=True)
            infinite = largest == -mx.inf
            if dtype != "float16":  # the kernel's powers of two overflow; half of it hides as well
                shown = mx.where(largest < self.backend.lowest(dtype) / 2, shown * 0.5, shown)
        elif isinstance(mask, masks.CausalMask):
            shown = "causal"
        elif mask is not None:
            visible = pairs(mx, self._visible(request), batch)
            seen = mx.any(visible, axis=-1, keepdims=True)
            shown = mx.logical_or(visible, mx.logical_not(seen))
        output = mx.fast.scaled_dot_product_attention(*four, scale=depth**-0.5, mask=shown)
        if seen is not None:
            mean = mx.mean(four[2].astype(mx.float32), axis=-2, keepdims=True).astype(output.dtype)
            output = mx.where(seen, output, mx.repeat(mean, heads // key.shape[-2], axis=1))
        if infinite is not None:
            output = output * mx.where(infinite, mx.nan, 1.0).astype(output.dtype)
        return mx.reshape(mx.swapaxes(output, 1, 2), (*query.shape[:-1], value.shape[-1]))

    def _visible(self, request: Request) -> Array:
        """Where a query sees a key, ``[batch..., 1, 1, kv_length]`` of lengths."""
        query, mask = request.query, request.mask
        if not isinstance(mask, masks.Mask):
            return self.backend.truth(mask)
        to = masks.Lowering(self.backend, tuple(query.shape[:-3]), (query.shape[-3], request.key.shape[-3]), query)
        return masks.visible(self.backend, mask.lower(to), tuple(to.arrays))


def _known(request: Request) -> bool:
    """Masks by rule that the kernel has, or that are small. Its causal mask ends with the last key."""
    mask = request.mask
    if isinstance(mask, masks.CausalMask):
        return mask.offset == 0 and request.query.shape[-3] == request.key.shape[-3]
    return isinstance(mask, masks.LengthMask) and mask.query_lengths is None
