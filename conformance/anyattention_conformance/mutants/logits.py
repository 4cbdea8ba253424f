"""Wrong attentions: mistakes in fully masked rows, infinities, the fill and large logits."""

import numpy as np

from anyattention_conformance.mutants import steps
from anyattention_conformance.mutants.register import mutant
from anyattention_conformance.reference import (
    LOWEST,
    QUERY_KEY,
    WEIGHTS_VALUE,
    Array,
    Attention,
    Call,
    divided,
    einsum,
    promoted,
    rounded,
    visible,
    wide,
)

FLOAT32 = np.dtype("float32")

# --- rows that see nothing ---


@mutant("hidden rows", "A row that sees nothing is zero.", row=1)
class HiddenRowsZero(Attention):
    def round_weights(self, call: Call, softmax: Array) -> Array:
        weights = super().round_weights(call, softmax)
        return weights if call.mask is None else np.where(steps.sees(call, weights), weights, rounded(0, weights.dtype))


@mutant("hidden rows", "The fill is minus infinity, so that a row that sees nothing is NaN.", row=1)
class HiddenRowsNan(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return np.where(visible(call.mask), super().fill_hidden(call, logits), rounded(-np.inf, logits.dtype))


@mutant("hidden rows", "A row that sees nothing is computed as if it saw everything.", row=1)
class HiddenRowsSeeAll(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        call.mask = visible(call.mask) | ~steps.sees(call, super().fill_hidden(call, logits))
        return super().fill_hidden(call, logits)


@mutant("hidden rows", "A mask adds -10000: rows that see nothing keep the differences of their logits.", row=1)
class MaskAddsTenThousand(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return rounded(wide(logits) + np.where(visible(call.mask), 0.0, -1e4), logits.dtype)


# --- infinities and NaN ---


@mutant("infinities", "A row whose bias is minus infinity everywhere is zero.", row=2)
class InfiniteRowsZero(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        nothing = np.all(wide(logits) == -np.inf, axis=-1, keepdims=True)
        return np.where(nothing, rounded(0, logits.dtype), super().softmax(call, logits))


@mutant("infinities", "An infinite logit is replaced by the largest finite number.", row=2)
class InfinitiesClipped(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        lowest = LOWEST[logits.dtype.name]
        return super().softmax(call, rounded(np.clip(wide(logits), lowest, -lowest), logits.dtype))


@mutant("infinities", "A NaN in the output is replaced by zero.")
class NanReplaced(Attention):
    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        return np.where(np.isnan(output), rounded(0, output.dtype), output)


@mutant("infinities", "What a weight of zero multiplies is left out, NaN and all.", row=9, contract="C2")
class HiddenValuesSkipped(Attention):
    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        shows = einsum(WEIGHTS_VALUE, wide(weights) != 0, ~np.isfinite(call.value)) > 0
        call.value = np.where(np.isfinite(call.value), call.value, rounded(0, call.dtype))
        return np.where(shows, output, super().combine(call, weights))


@mutant("infinities", "The smallest number is added to hidden logits, where it should replace them.", row=10)
class MaskAddsTheSmallest(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return rounded(wide(logits) + np.where(visible(call.mask), 0.0, LOWEST[call.dtype.name]), logits.dtype)


@mutant("infinities", "Minus infinity is added to hidden logits, save in rows that see nothing.", row=11)
class MaskAddsInfinity(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        filled = super().fill_hidden(call, logits)
        added = rounded(wide(logits) + np.where(visible(call.mask), 0.0, -np.inf), logits.dtype)
        return np.where(steps.sees(call, filled), added, filled)


@mutant("infinities", "The bias is added after hidden logits were replaced.", row=10)
class BiasAfterMask(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return logits if call.mask is not None else super().add_bias(call, logits)

    def fill_hidden(self, call: Call, logits: Array) -> Array:
        filled = super().fill_hidden(call, logits)
        return filled if call.bias is None else super().add_bias(call, filled)


# --- the fill ---


@mutant("fill", "Hidden keys are left out, where they should win over visible ones at minus infinity.", row=4)
class HiddenKeysLeftOut(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        filled = super().fill_hidden(call, logits)
        return np.where(visible(call.mask) | ~steps.sees(call, filled), filled, rounded(-np.inf, filled.dtype))


@mutant("fill", "The fill is the smallest number of the logits' dtype, where a bias made that wider.", row=5)
class FillOfTheLogits(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        filled = super().fill_hidden(call, logits)
        return np.where(visible(call.mask), filled, rounded(LOWEST[logits.dtype.name], logits.dtype))


@mutant("fill", "Weights of hidden keys are set to zero and the rest made to sum to one: no tie with the fill.", row=6)
class HiddenWeightsRemoved(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        weights = super().softmax(call, logits)
        if call.mask is None:
            return weights
        left = np.where(visible(call.mask) | ~steps.sees(call, weights), wide(weights), 0.0)
        return rounded(left / np.sum(left, axis=-1, keepdims=True), weights.dtype)


@mutant("fill", "The fill is 0.7 times the smallest number, as in jax.nn.", row=8)
class FillOfJaxNn(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        filled = super().fill_hidden(call, logits)
        return np.where(visible(call.mask), filled, rounded(0.7 * LOWEST[call.dtype.name], logits.dtype))


@mutant("fill", "The fill is -1e9 where the dtype can hold it.", row=8)
class FillModest(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        filled = super().fill_hidden(call, logits)
        return np.where(visible(call.mask), filled, rounded(max(-1e9, LOWEST[call.dtype.name]), logits.dtype))


@mutant("fill", "Logits of 16 bits are float32 from the bias on, and do not overflow.", row=7, contract="C2")
class BiasInFloat32(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return super().add_bias(call, rounded(logits, promoted(logits.dtype, FLOAT32)))


# --- large logits ---


@mutant("large logits", "The maximum is not subtracted before the exponential.")
class NoMaximum(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        return steps.normalised(np.exp(wide(logits)), logits.dtype)


@mutant("large logits", "One maximum, of the whole array, is subtracted from every row.")
class MaximumOfAll(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        return steps.normalised(np.exp(wide(logits) - np.max(wide(logits), initial=-np.inf)), logits.dtype)


@mutant("large logits", "Logits are clipped to 50.")
class LogitsClipped(Attention):
    def logits(self, call: Call, query: Array) -> Array:
        return rounded(np.clip(wide(super().logits(call, query)), -50, 50), call.dtype)


@mutant("large logits", "Logits are bent to less than 50 by a hyperbolic tangent.")
class LogitsCapped(Attention):
    def logits(self, call: Call, query: Array) -> Array:
        return rounded(50 * np.tanh(wide(super().logits(call, query)) / 50), call.dtype)


@mutant("large logits", "The product is divided by the root of the depth, not the query: it overflows float16.", row=12)
class ScaleAfterProduct(Attention):
    def logits(self, call: Call, query: Array) -> Array:
        product = rounded(einsum(QUERY_KEY, call.query, call.key), call.dtype)
        return divided(product, self.root(call)) if query.shape[-1] else product


@mutant("large logits", "The exponential of float16 is taken without subtracting the maximum.")
class NoMaximumInFloat16(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        if logits.dtype != np.float16 or call.mask is not None:
            return super().softmax(call, logits)
        return steps.normalised(np.exp(wide(logits)), logits.dtype)
