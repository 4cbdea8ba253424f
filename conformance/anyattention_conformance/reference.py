"""Flax's attention in plain NumPy, one method a step: a right answer that owes nothing to what it is held against.

An array has the dtype that it has in Flax. Each operation is computed in float64 and rounded to that dtype once, to 16
bits by way of float32, as XLA does. The gradients are written out: the same steps backwards, rounded at the end alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from anyattention_conformance.threefry import bernoulli

Array = Any
DType = Any
LOWEST = {name: float(np.finfo(name).min) for name in ("float16", "float32", "float64")} | {
    "bfloat16": -float.fromhex("0x1.fep127")
}
QUERY_KEY, WEIGHTS_VALUE = "...qhd,...khd->...hqk", "...hqk,...khd->...qhd"


@dataclass
class Call:
    """One call: the arguments by Flax's names, with its defaults, and then what the steps make of them."""

    query: Array
    key: Array
    value: Array
    bias: Any = None
    mask: Any = None
    broadcast_dropout: bool = True
    dropout_rng: Any = None
    dropout_rate: float = 0.0
    deterministic: bool = False
    dtype: DType = None
    precision: Any = None
    module: Any = None
    force_fp32_for_softmax: bool = False

    scaled: Array = None  # the query after division
    softmax: Array = None  # in the dtype of the logits
    multiplier: Array = 1.0  # of dropout: zero, or the reciprocal of the probability to be kept
    weights: Array = None  # in the compute dtype, after dropout
    output: Array = None

    @property
    def forced(self) -> bool:
        """Whether the softmax is computed in float32 and its result left there."""
        return bool(self.force_fp32_for_softmax) and self.dtype != np.float32


class Attention:
    """Flax's `dot_product_attention`. To make a mistake, override a step."""

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | float | None = None,
        mask: Array | bool | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DType = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
    ) -> Array:
        """The weighted mean of the values, ``[batch..., q_length, heads, v_depth]``.

        query is ``[batch..., q_length, heads, depth]``, key ``[batch..., kv_length, heads, depth]``, value
        ``[batch..., kv_length, heads, v_depth]``; bias and mask broadcast with ``[batch..., heads, q_length,
        kv_length]``. A dropout key is raw, uint32 ``[2]``. On a CPU `precision` changes nothing, here as in Flax.
        """
        dropout = broadcast_dropout, dropout_rng, dropout_rate, deterministic
        call = Call(query, key, value, bias, mask, *dropout, dtype, precision, module, force_fp32_for_softmax)
        return self.run(call).output

    def vjp(self, **arguments: Any) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array, Array | None]]]:
        """The output, and the function from its cotangent to the gradients of query, key, value and bias.

        A gradient has the shape and the (floating-point) dtype of its array; that of a bias not given is None.
        """
        call = self.run(Call(**arguments))
        return call.output, partial(self.pulled_back, call, arguments)

    def pulled_back(
        self, call: Call, arguments: dict[str, Any], cotangent: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """The gradients, of a call that has run."""
        with np.errstate(all="ignore"):
            cotangent = wide(cotangent)
            dlogits = self.softmax_gradient(call, self.weights_gradient(call, cotangent))
            if call.mask is not None:
                dlogits = self.fill_gradient(call, dlogits)
            return (
                reduced(self.query_gradient(call, dlogits), arguments["query"]),
                reduced(self.key_gradient(call, dlogits), arguments["key"]),
                reduced(self.value_gradient(call, cotangent), arguments["value"]),
                None if call.bias is None else reduced(self.bias_gradient(call, dlogits), call.bias),
            )

    def run(self, call: Call) -> Call:
        """All steps forward."""
        with np.errstate(all="ignore"):  # overflow and NaN are answers
            call.dtype = self.promote(call)
            call.query, call.key, call.value = (rounded(x, call.dtype) for x in (call.query, call.key, call.value))
            self.check(call)
            call.scaled = self.scale(call, call.query)
            logits = self.logits(call, call.scaled)
            if call.bias is not None:
                logits = self.add_bias(call, logits)
            if call.mask is not None:
                logits = self.fill_hidden(call, logits)
            call.softmax = self.softmax(call, rounded(logits, np.float32) if call.forced else logits)
            call.weights = call.softmax if call.forced else self.round_weights(call, call.softmax)
            if call.module:
                call.module.sow("intermediates", "attention_weights", call.weights)
            if not call.deterministic and call.dropout_rate > 0.0:
                call.weights = self.drop(call, call.weights)
            call.output = self.combine(call, call.weights)
        return call

    # --- forward ---

    def promote(self, call: Call) -> DType:
        """The compute dtype: the one asked for, else what query, key and value have in common."""
        if call.dtype is None:
            return promoted(*(np.asarray(x).dtype for x in (call.query, call.key, call.value)))
        dtype = numpy_dtype(call.dtype)
        if dtype.name not in LOWEST:
            raise ValueError(f"Dtype must be inexact: {call.dtype}")
        return dtype

    def check(self, call: Call) -> None:
        """Flax's assertions. That each axis exists is left to Python's tuples: IndexError, in Flax too."""
        query, key, value = call.query.shape, call.key.shape, call.value.shape
        _demand(len(query) == len(key) == len(value), "q, k, v must have same rank.")
        _demand(query[:-3] == key[:-3] == value[:-3], "q, k, v batch dims must match.")
        _demand(query[-2] == key[-2] == value[-2], "q, k, v num_heads must match.")
        _demand(key[-3] == value[-3], "k, v lengths must match.")
        _demand(query[-1] == key[-1], "q, k depths must match.")

    def root(self, call: Call) -> Array:
        """What the query is divided by: the root of its depth, in the compute dtype."""
        return rounded(np.sqrt(call.query.shape[-1]), call.dtype)

    def scale(self, call: Call, query: Array) -> Array:
        """The query divided, before the product."""
        return divided(query, self.root(call))

    def logits(self, call: Call, query: Array) -> Array:
        """Products of queries and keys, ``[batch..., heads, q_length, kv_length]``."""
        return rounded(einsum(QUERY_KEY, query, call.key), call.dtype)

    def add_bias(self, call: Call, logits: Array) -> Array:
        """In the wider dtype of the two; a Python number has none of its own."""
        _no_list(call.bias, "unsupported operand type(s) for +: 'ArrayImpl' and 'list'")
        _fit(logits.shape, np.shape(call.bias))
        weak = type(call.bias) in (bool, int, float)
        dtype = logits.dtype if weak else promoted(logits.dtype, np.asarray(call.bias).dtype)
        return rounded(wide(logits) + wide(rounded(call.bias, dtype)), dtype)

    def fill_hidden(self, call: Call, logits: Array) -> Array:
        """What the mask hides is replaced by the smallest finite number of the compute dtype, be the logits wider."""
        _no_list(call.mask, "where requires ndarray or scalar arguments, got <class 'list'> at position 0.")
        _fit(np.shape(call.mask), logits.shape, ())
        return rounded(np.where(visible(call.mask), wide(logits), LOWEST[call.dtype.name]), logits.dtype)

    def softmax(self, call: Call, logits: Array) -> Array:
        """Over the keys, each operation in the dtype of the logits; the maximum of no keys is minus infinity."""
        top = np.max(wide(logits), axis=-1, keepdims=True, initial=-np.inf)
        powers = rounded(np.exp(wide(rounded(wide(logits) - top, logits.dtype))), logits.dtype)
        return divided(powers, rounded(np.sum(wide(powers), axis=-1, keepdims=True), logits.dtype))

    def round_weights(self, call: Call, softmax: Array) -> Array:
        """The weights in the compute dtype."""
        return rounded(softmax, call.dtype)

    def drop(self, call: Call, weights: Array) -> Array:
        """Some weights times zero, the others times the rounded reciprocal: NaN stays NaN, rows are not normalised."""
        shape = (*(1,) * (call.key.ndim - 2), *weights.shape[-2:]) if call.broadcast_dropout else weights.shape
        kept = rounded(self.keep(call, shape), call.dtype)
        call.multiplier = divided(kept, rounded(1.0 - call.dropout_rate, call.dtype))
        return rounded(wide(weights) * wide(call.multiplier), promoted(weights.dtype, call.dtype))

    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        """True where a weight is kept, as JAX draws it."""
        key = np.asarray(call.dropout_rng)
        if key.dtype != np.uint32 or key.shape[-1:] != (2,):
            raise TypeError(f"unexpected PRNG key type {type(call.dropout_rng)}")
        if key.ndim > 1:
            raise ValueError(f"bernoulli accepts a single key, but was given a key array of shape {key.shape[:-1]}")
        return bernoulli(key, 1.0 - call.dropout_rate, shape)

    def combine(self, call: Call, weights: Array) -> Array:
        """Sums of values, float32 where the weights were left in it."""
        return rounded(einsum(WEIGHTS_VALUE, weights, call.value), promoted(weights.dtype, call.dtype))

    # --- backward: float64 throughout, of the shapes that broadcasting led to ---

    def value_gradient(self, call: Call, cotangent: Array) -> Array:
        """``[batch..., kv_length, heads, v_depth]``."""
        return einsum("...hqk,...qhd->...khd", call.weights, cotangent)

    def weights_gradient(self, call: Call, cotangent: Array) -> Array:
        """Of the weights before dropout, ``[batch..., heads, q_length, kv_length]``."""
        return einsum("...qhd,...khd->...hqk", cotangent, call.value) * wide(call.multiplier)

    def softmax_gradient(self, call: Call, dweights: Array) -> Array:
        """Of the logits that the softmax was given."""
        terms = wide(call.softmax) * dweights
        return terms - wide(call.softmax) * np.sum(terms, axis=-1, keepdims=True)

    def fill_gradient(self, call: Call, dlogits: Array) -> Array:
        """None, not even NaN, for a logit that was replaced."""
        return np.where(visible(call.mask), dlogits, 0.0)

    def query_gradient(self, call: Call, dlogits: Array) -> Array:
        """``[batch..., q_length, heads, depth]``. A hidden key still counts, times zero: its NaN shows."""
        return einsum("...hqk,...khd->...qhd", dlogits, call.key) / wide(self.root(call))

    def key_gradient(self, call: Call, dlogits: Array) -> Array:
        """``[batch..., kv_length, heads, depth]``."""
        return einsum("...hqk,...qhd->...khd", dlogits, call.scaled)

    def bias_gradient(self, call: Call, dlogits: Array) -> Array:
        """``[batch..., heads, q_length, kv_length]``."""
        return dlogits


def numpy_dtype(dtype: DType) -> DType:
    """NumPy's dtype; it learns of bfloat16 when ml_dtypes is imported."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def promoted(*dtypes: DType) -> DType:
    """JAX's common dtype: integers and booleans give way to any float, and float16 meets bfloat16 in float32."""
    if strange := [dtype.name for dtype in dtypes if dtype.name not in LOWEST and dtype.kind not in "biu"]:
        raise TypeError(f"attention does not compute in {', '.join(strange)}")
    floats = {dtype.name: dtype for dtype in dtypes if dtype.name in LOWEST}
    if len(floats) == 1:
        return next(iter(floats.values()))
    return np.dtype("float64" if "float64" in floats else "float32")


def wide(x: Array) -> Array:
    """The same numbers in float64."""
    return np.asarray(x).astype(np.float64)


def rounded(x: Array, dtype: DType) -> Array:
    """To nearest, 16 bits by way of float32."""
    x, dtype = np.asarray(x), np.dtype(dtype)
    return (x.astype(np.float32) if dtype.itemsize == 2 else x).astype(dtype)


def divided(x: Array, y: Array) -> Array:
    """What XLA makes of ``x / y`` on CPUs: times the reciprocal in the dtype, but bfloat16 in float32 altogether."""
    if x.dtype.name == "bfloat16":
        return rounded(wide(x) / wide(y), x.dtype)
    return rounded(wide(x) * wide(rounded(1.0 / wide(y), x.dtype)), x.dtype)


def einsum(equation: str, x: Array, y: Array) -> Array:
    """In float64; axes of size 1 broadcast."""
    return np.einsum(equation, wide(x), wide(y))


def visible(mask: Array) -> Array:
    """What is not zero, NaN included."""
    return np.asarray(mask).astype(bool)


def reduced(gradient: Array, x: Array) -> Array:
    """The gradient of `x`, in its dtype: summed over the axes along which it was broadcast."""
    x = np.asarray(x)
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - x.ndim)))
    return rounded(gradient.sum(axis=tuple(a for a, size in enumerate(x.shape) if size == 1), keepdims=True), x.dtype)


def _demand(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)  # raised, not asserted, so that python -O keeps it


def _no_list(x: Any, sentence: str) -> None:
    if isinstance(x, list):
        raise TypeError(sentence)


def _fit(*shapes: tuple[int, ...]) -> None:
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(f"Incompatible shapes for broadcasting: shapes={list(shapes)}") from None


attention = Attention()
