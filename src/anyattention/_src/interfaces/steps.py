"""The steps of the exact implementation."""

from typing import Any

from anyattention._src import dtypes, threefry
from anyattention._src.interfaces.arrays import Arrays, permute, place, unknown
from anyattention._src.interfaces.products import PRODUCTS

Array = Any


class Steps:
    """The steps of the exact implementation."""

    full_precision = ("default", "high", "highest", "float32", "tensorfloat32", "bfloat16", "bfloat16_3x", "fastest")
    """`precision` values that change nothing here, since products are computed in full precision anyway."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays, self.xp = arrays, arrays.xp

    def scale(self, query: Array, depth: int, dtype: str) -> Array:
        """``query / sqrt(depth)``, the root rounded to the compute dtype."""
        if unknown(depth):
            raise ValueError(f"attention needs a known depth, got the query's shape {tuple(query.shape)}")
        return self.divide_by_scalar(query, depth**0.5, dtype)

    def divide(self, x: Array, y: Array) -> Array:
        """``x / y``; in float16 ``x`` times the rounded reciprocal, which is how XLA divides there."""
        return x * (1.0 / y) if self.arrays.dtype_name(y) == "float16" else x / y

    def divide_by_scalar(self, x: Array, value: Any, dtype: str) -> Array:
        """The same, with a scalar that is first rounded to the dtype of `x`."""
        value = float(value)
        if dtype not in ("float32", "float64"):  # those round a scalar so themselves
            value = dtypes.round_to(value, dtype)
        if dtype == "float16" and value:
            return x * dtypes.round_to(1.0 / value, dtype)
        return x / value

    def contract(self, equation: str, x: Array, y: Array, precision: Any = None, dot_general: Any = None) -> Array:
        """The einsum of a product in `PRODUCTS`, as a matrix product: the standard has no einsum."""
        arrays = self.arrays
        if precision is not None or dot_general is not None:
            self.check_precision(precision, dot_general, x)
        if x.dtype != y.dtype:
            x, y = arrays.join(x, y)
        left, right, result = PRODUCTS[equation]
        x, y = x if left is None else permute(arrays, x, left), permute(arrays, y, right)
        if y.shape[-2] == 1 and x.shape[-1] != 1:
            x = self.xp.sum(x, axis=-1, keepdims=True)  # as einsum: one value serves all the weights
        product = arrays.matmul(x, y)
        return product if result is None else permute(arrays, product, result)

    def check_precision(self, precision: Any, dot_general: Any, x: Array) -> None:
        """Raise where these cannot be honoured for a product with `x`; the classic levels ask for full precision."""
        name = self.arrays.name
        if dot_general:
            raise ValueError(
                f"einsum_dot_general is called as jax.lax.dot_general is, which {name} cannot do: pass "
                "qk_attn_weights_einsum and attn_weights_value_einsum instead"
            )
        for level in precision if isinstance(precision, tuple | list) else (precision,):
            if level is not None and str(getattr(level, "name", level)).lower() not in self.full_precision:
                raise ValueError(
                    f"precision={precision!r} cannot be honoured by {name}, which computes products in the "
                    f"compute dtype; pass None or one of {', '.join(self.full_precision)}"
                )

    def where(self, mask: Array, x: Array, fill: float) -> Array:
        """`x` where the mask is truthy (any nonzero, NaN too), `fill` elsewhere."""
        return self.xp.where(self.arrays.truth(mask), x, fill)

    def lowest(self, dtype: str) -> Any:
        """The finite minimum of a dtype."""
        return dtypes.lowest(dtype)

    def softmax(self, logits: Array) -> Array:
        """Softmax over the last axis, each step rounded to the logits' dtype."""
        xp = self.xp
        if 0 in logits.shape:
            return logits  # the standard has no maximum of nothing
        weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        return self.divide(weights, xp.sum(weights, axis=-1, keepdims=True))

    def keep(self, key: Any, keep_prob: Any, shape: tuple[int, ...], like: Array) -> Array:
        """The dropout mask of this key: True with probability `keep_prob`."""
        if any(map(unknown, shape)):
            raise ValueError(f"dropout needs known lengths, got the weights' shape {shape}: pass deterministic=True")
        return threefry.keep(self.xp, place(self.arrays, key, like), keep_prob, shape)
