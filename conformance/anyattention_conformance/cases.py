"""The cases: shapes, dtypes and arguments as data, with inputs from seeds.

Inputs are drawn in NumPy's float64 and rounded once, so every framework sees the same bits.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Case:
    """One call of attention. Shapes are ``[batch..., length, heads, depth]``."""

    id: str
    query: tuple[int, ...] = (2, 3, 2, 4)
    key: tuple[int, ...] = (2, 5, 2, 4)
    v_depth: int = 4
    bias: tuple[int, ...] | None = None
    bias_kind: str = "normal"
    mask: tuple[int, ...] | None = None
    mask_kind: str = "bool"
    scale: float = 1.0
    dropout: float = 0.0
    broadcast_dropout: bool = True
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def inputs(self, dtype: str = "float32", bias_dtype: str | None = None) -> dict[str, Any]:
        """The arguments, as NumPy arrays and Python values, by their names in Flax's signature."""
        random = np.random.default_rng(sum(map(ord, self.id)))

        def normal(shape: tuple[int, ...], to: str, scale: float = 1.0) -> Array:
            return (random.standard_normal(shape) * scale).astype(_dtype(to))

        value = (*self.key[:-1], self.v_depth)
        arguments: dict[str, Any] = {
            "query": normal(self.query, dtype, self.scale),
            "key": normal(self.key, dtype),
            "value": normal(value, dtype),
        }
        if self.bias is not None:
            bias = normal(self.bias, bias_dtype or dtype)
            if self.bias_kind == "-inf row":
                bias[..., 0, :] = -np.inf
            elif self.bias_kind == "-inf some":
                bias[..., ::2] = -np.inf
            arguments["bias"] = bias
        if self.mask is not None:
            mask = random.random(self.mask) < 0.6
            if self.mask_kind == "hidden row":
                mask[..., 0, :] = False
            arguments["mask"] = mask.astype(np.float32) if self.mask_kind == "float" else mask
        if self.dropout:
            arguments |= {
                "dropout_rate": self.dropout,
                "dropout_rng": np.asarray([0, 7], dtype=np.uint32),
                "broadcast_dropout": self.broadcast_dropout,
            }
        return arguments | self.options


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return name


SMOKE = (
    Case("plain"),
    Case("no-batch", query=(3, 2, 4), key=(5, 2, 4)),
    Case("two-batch", query=(2, 1, 3, 2, 4), key=(2, 1, 5, 2, 4)),
    Case("depth-24", query=(2, 3, 2, 24), key=(2, 5, 2, 24)),
    Case("value-depth", v_depth=7),
    Case("large-logits", query=(2, 33, 2, 16), key=(2, 47, 2, 16), scale=30.0),
    Case("q-length-1", query=(2, 1, 2, 4)),
    Case("q-length-0", query=(2, 0, 2, 4)),
    Case("kv-length-1", key=(2, 1, 2, 4)),
    Case("kv-length-0", key=(2, 0, 2, 4)),
    Case("depth-0", query=(2, 3, 2, 0), key=(2, 5, 2, 0)),
    Case("bias", bias=(2, 2, 3, 5)),
    Case("bias-lower-rank", bias=(3, 5)),
    Case("bias-keys", bias=(5,)),
    Case("bias-higher-rank", bias=(3, 1, 2, 3, 5)),
    Case("bias-minus-infinity", bias=(2, 1, 3, 5), bias_kind="-inf some"),
    Case("bias-row-minus-infinity", bias=(2, 1, 3, 5), bias_kind="-inf row"),
    Case("mask", mask=(2, 1, 3, 5)),
    Case("mask-float", mask=(2, 1, 3, 5), mask_kind="float"),
    Case("mask-keys", mask=(2, 1, 1, 5)),
    Case("mask-lower-rank", mask=(3, 5)),
    Case("mask-higher-rank", mask=(3, 1, 1, 3, 5)),
    Case("mask-hidden-row", mask=(2, 1, 3, 5), mask_kind="hidden row"),
    Case("mask-and-bias", mask=(2, 1, 3, 5), bias=(1, 2, 3, 5)),
    Case("heads-grown-by-bias", query=(2, 3, 1, 4), key=(2, 5, 1, 4), bias=(3, 3, 5)),
    Case("keys-grown-by-bias", key=(2, 1, 2, 4), bias=(3, 5)),
    Case("dropout", dropout=0.3),
    Case("dropout-everywhere", dropout=0.5, broadcast_dropout=False, mask=(2, 1, 3, 5)),
    Case("force-fp32", options={"force_fp32_for_softmax": True}, mask=(2, 1, 3, 5)),
)
