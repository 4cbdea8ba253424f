"""ONNX's operator ``Attention``, of opset 23: one node, which onnxruntime computes without all logits at once.

ONNX gives zero to a fully masked row, where Flax gives the mean of all values: a `where` behind the node mends that.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import ndonnx
import spox.opset.ai.onnx.v23 as onnx

from anyattention.extend import Call, CausalMask, Fused, Structure
from anyattention_backends.ndonnx.arrays import xp

Array = Any


class OnnxAttention(Fused):
    """The node, for lengths that are known and for those that are not."""

    name = "onnx"
    serves = frozenset({"mask", "scale", "grouped heads", "force_fp32_for_softmax"})
    platforms = ("cpu",)
    dtypes = ("float32",)  # onnxruntime 1.32 loses half the digits of float64, and rounds weights of float16

    def refusals(self, call: Call) -> Iterator[str]:
        query, key, value, bias, *_ = call.operands
        if bias is not None:
            yield "onnxruntime gives zero to a row whose biases are all the least number, and Flax the mean"
        if call.options.logits_soft_cap is not None:
            yield "onnxruntime takes two to four times as long as exact for a soft cap"
        if others := call.needs - self.serves - {"bias", "logits_soft_cap"}:
            yield f"it has no {', no '.join(sorted(others))}"
        if call.options.dtype not in self.dtypes:
            yield f"there is no kernel for {call.options.dtype}"
        if call.scale <= 0.0:
            yield "it takes no scale of zero or below"
        if query.ndim > 4:
            yield "it takes one batch axis"
        if 0 in (*query.shape, *key.shape, *value.shape):
            yield "an axis is empty"
        if None in (*query.shape[-2:], *key.shape[-2:], *value.shape[-2:]):
            yield "heads and depths are unknown"
        if not call.operands_fit():
            yield "the mask has axes, or known sizes, that query and key lack"

    def lacks(self, call: Call, mask: Structure) -> dict[str, str]:
        found = super().lacks(call, mask)
        return {} if mask.causal and list(found) == ["band"] and not mask.rest else found

    def remarks(self, call: Call) -> list[str]:
        found = ["the model needs opset 23: onnxruntime 1.23 or later"]
        return found if call.operands.mask is None else [*found, "NaN or infinity in a hidden key may show"]

    def attend(self, call: Call) -> Array:
        query, key, value, _, mask, *_ = call.operands
        arrays, group = [query, key, value], query.shape[-2] // key.shape[-2]
        batch = query.ndim == 4
        arrays = arrays if batch else [xp.expand_dims(x, axis=0) for x in arrays]
        causal = type(mask) is CausalMask and isinstance(mask.offset, int) and mask.offset == 0
        shown = None if mask is None or causal else _whole(call.visible(mask), *arrays[:2])
        if shown is not None:  # hidden padding must not show
            keys = xp.any(shown, axis=(-3, -2))[..., None, None]
            arrays[1:] = [xp.where(keys, x, xp.zeros_like(x)) for x in arrays[1:]]
        flat = [onnx.reshape(x.unwrap_spox(), onnx.const([0, 0, -1], "int64")) for x in arrays]
        with warnings.catch_warnings():  # spox cannot tell the shapes of three more outputs, which are for caches
            warnings.filterwarnings("ignore", message="Output type for variable")
            output, *_ = onnx.attention(
                *flat,
                None if shown is None else shown.unwrap_spox(),
                is_causal=int(causal),
                q_num_heads=query.shape[-2],
                kv_num_heads=key.shape[-2],
                scale=call.scale,
            )
        output = _shaped(output, [0, 0, query.shape[-2], value.shape[-1]])
        if shown is not None:
            seen = xp.permute_dims(xp.any(shown, axis=-1, keepdims=True), (0, 2, 1, 3))
            mean = xp.mean(value if batch else xp.expand_dims(value, axis=0), axis=-3, keepdims=True)[..., None, :]
            mean = xp.concat([mean] * group, axis=-2).unwrap_spox()
            output = xp.where(seen, output, _shaped(mean, [0, 1, query.shape[-2], value.shape[-1]]))
        return output if batch else xp.squeeze(output, axis=0)


def _whole(shown: Array, query: Array, key: Array) -> Array:
    """A mask with four axes and both lengths, as onnxruntime wants it."""
    lengths = [x.dynamic_shape[1:2] for x in (query, key)]
    ones = ndonnx.asarray([1, 1], dtype=ndonnx.int64)
    return ndonnx.asarray(onnx.expand(shown.unwrap_spox(), ndonnx.concat([ones, *lengths]).unwrap_spox()))


def _shaped(x: Array, sizes: list[int]) -> Array:
    """An array with these sizes, of which 0 keeps the one that it has."""
    return ndonnx.asarray(onnx.reshape(x, onnx.const(sizes, "int64")))
