"""The steps of exact in NumPy, where a Python scalar turns bfloat16 into float32 or float64."""

from typing import Any

import numpy as np

from anyattention._src import dtypes
from anyattention.extend import Steps
from anyattention_backends.numpy.arrays import HALF

Array = Any


class NumPySteps(Steps):
    def divide(self, x: Array, y: Array) -> Array:
        """In bfloat16 the quotient of float32, rounded once."""
        if x.dtype.name == "bfloat16":
            return (x.astype(np.float32) / y.astype(np.float32)).astype(x.dtype)
        return super().divide(x, y)

    def divide_by_scalar(self, x: Array, value: Any, dtype: str) -> Array:
        if dtype == "bfloat16":
            return (x.astype(np.float32) / np.float32(dtypes.round_to(float(value), dtype))).astype(x.dtype)
        return super().divide_by_scalar(x, value, dtype)

    def contract(self, equation: str, x: Array, y: Array, precision: Any = None, dot_general: Any = None) -> Array:
        """16-bit products accumulate in float32 and are rounded once."""
        if x.dtype != y.dtype:
            x, y = self.arrays.join(x, y)
        if self.arrays.dtype_name(x) not in HALF:
            return super().contract(equation, x, y, precision, dot_general)
        wide = super().contract(equation, x.astype(np.float32), y.astype(np.float32), precision, dot_general)
        return wide.astype(x.dtype)

    def where(self, mask: Array, x: Array, fill: float) -> Array:
        return np.where(self.arrays.truth(mask), x, np.asarray(fill, x.dtype))

    def softmax(self, logits: Array) -> Array:
        """A 16-bit sum accumulates in float32; the maximum of no keys is minus infinity."""
        if self.arrays.dtype_name(logits) not in HALF:
            weights = logits - logits.max(axis=-1, keepdims=True, initial=-np.inf)
            np.exp(weights, out=weights)
            weights /= weights.sum(axis=-1, keepdims=True)
            return weights
        half = logits.dtype
        logits = logits.astype(np.float32)
        weights = (logits - np.max(logits, axis=-1, keepdims=True, initial=-np.inf)).astype(half)
        weights = np.exp(weights.astype(np.float32)).astype(half)
        return self.divide(weights, np.sum(weights.astype(np.float32), axis=-1, keepdims=True).astype(half))
