"""Wrong attentions: mistakes in rounding, errors and gradients."""

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
    wide,
)

FLOAT32 = np.dtype("float32")

# --- rounding ---


@mutant("rounding", "The root of the depth is not rounded to 16 bits.", row=13, contract="C2")
class RootNotRounded(Attention):
    def root(self, call: Call) -> Array:
        return rounded(np.sqrt(call.query.shape[-1]), promoted(call.dtype, FLOAT32))


@mutant("rounding", "float16 is divided, not multiplied with the rounded reciprocal.", contract="C2")
class TrueDivision(Attention):
    def scale(self, call: Call, query: Array) -> Array:
        return rounded(wide(query) / wide(self.root(call)), call.dtype)

    def softmax(self, call: Call, logits: Array) -> Array:
        powers = wide(steps.powers(logits))
        total = rounded(np.sum(powers, axis=-1, keepdims=True), logits.dtype)
        return rounded(powers / wide(total), logits.dtype)


@mutant("rounding", "The logits are not rounded to 16 bits, nor what the softmax makes of them.", row=14, contract="C2")
class LogitsNotRounded(Attention):
    def logits(self, call: Call, query: Array) -> Array:
        return rounded(einsum(QUERY_KEY, query, call.key), promoted(call.dtype, FLOAT32))


@mutant(
    "rounding", "The softmax of 16-bit logits is computed in float32 and rounded at the end.", row=14, contract="C2"
)
class SoftmaxInFloat32(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        return super().softmax(call, rounded(logits, promoted(logits.dtype, FLOAT32)))


@mutant("rounding", "The weights are not rounded to 16 bits before the values are summed.", row=14, contract="C2")
class WeightsNotRounded(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        return super().softmax(call, rounded(logits, promoted(logits.dtype, FLOAT32)))

    def round_weights(self, call: Call, softmax: Array) -> Array:
        return softmax

    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        return output if call.forced else rounded(output, call.dtype)


@mutant("rounding", "The factor of a weight that is kept is not rounded to 16 bits.", row=25, contract="C2")
class DropoutFactorNotRounded(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        dropped = super().drop(call, weights)
        call.multiplier = np.where(wide(call.multiplier) > 0, 1.0 / (1.0 - call.dropout_rate), wide(call.multiplier))
        return rounded(wide(weights) * call.multiplier, dropped.dtype)


@mutant("rounding", "The steps of bfloat16 are cut off, not rounded.", row=31, contract="C2")
class Truncated(Attention):
    def scale(self, call: Call, query: Array) -> Array:
        return steps.truncated(wide(query) / wide(self.root(call)), call.dtype)

    def logits(self, call: Call, query: Array) -> Array:
        return steps.truncated(einsum(QUERY_KEY, query, call.key), call.dtype)

    def softmax(self, call: Call, logits: Array) -> Array:
        powers = wide(steps.truncated(np.exp(wide(logits) - steps.top(logits)), logits.dtype))
        total = steps.truncated(np.sum(powers, axis=-1, keepdims=True), logits.dtype)
        return steps.truncated(powers / wide(total), logits.dtype)

    def combine(self, call: Call, weights: Array) -> Array:
        return steps.truncated(einsum(WEIGHTS_VALUE, weights, call.value), promoted(weights.dtype, call.dtype))


@mutant("rounding", "A sum beyond float16 stays finite.", row=32, contract="C2")
class SumDoesNotOverflow(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        powers = wide(steps.powers(logits))
        total = np.sum(powers, axis=-1, keepdims=True)
        beyond = total > -LOWEST[logits.dtype.name]
        return np.where(beyond, rounded(powers / total, logits.dtype), super().softmax(call, logits))


@mutant("rounding", "The sum of exponentials is rounded to 16 bits at each key.")
class SumIn16Bits(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        powers = steps.powers(logits)
        first = np.zeros((*powers.shape[:-1], 1), powers.dtype)
        return divided(powers, np.add.accumulate(np.concatenate((first, powers), axis=-1), axis=-1)[..., -1:])


@mutant("rounding", "Products of float32 take 11 bits of each factor, as tensor cores do.")
class ProductsOf11Bits(Attention):
    def logits(self, call: Call, query: Array) -> Array:
        return rounded(einsum(QUERY_KEY, steps.eleven_bits(query), steps.eleven_bits(call.key)), call.dtype)

    def combine(self, call: Call, weights: Array) -> Array:
        product = einsum(WEIGHTS_VALUE, steps.eleven_bits(weights), steps.eleven_bits(call.value))
        return rounded(product, promoted(weights.dtype, call.dtype))


@mutant("rounding", "The exponential is right to four digits.")
class ExponentialCoarse(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        shifted = wide(logits) - steps.top(logits)
        return steps.normalised(np.exp(shifted) * (1 + 1e-4 * np.sin(1e3 * shifted)), logits.dtype)


# --- errors ---


@mutant("errors", "Shapes that do not match raise ValueError, not AssertionError.", row=27, contract="C2")
class ShapesRaiseValueError(Attention):
    def check(self, call: Call) -> None:
        try:
            super().check(call)
        except AssertionError as error:
            raise ValueError(*error.args) from None


@mutant("errors", "Batch axes broadcast, and so do ranks.", row=27)
class BatchesBroadcast(Attention):
    def check(self, call: Call) -> None:
        arrays = call.query, call.key, call.value
        batch = np.broadcast_shapes(*(x.shape[:-3] for x in arrays))
        call.query, call.key, call.value = (np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in arrays)
        super().check(call)


@mutant("errors", "Heads of keys and values are repeated until there are as many as the query has.", row=27)
class HeadsRepeated(Attention):
    def check(self, call: Call) -> None:
        heads = np.arange(call.query.shape[-2])
        call.key, call.value = (np.take(x, heads, axis=-2, mode="wrap") for x in (call.key, call.value))
        super().check(call)


@mutant("errors", "Keys and values are cut to the shorter of both.", row=27)
class LengthsCut(Attention):
    def check(self, call: Call) -> None:
        length = min(call.key.shape[-3], call.value.shape[-3])
        call.key, call.value = (x[..., :length, :, :] for x in (call.key, call.value))
        super().check(call)


@mutant("errors", "Query and key are cut to the lesser depth.", row=27)
class DepthsCut(Attention):
    def check(self, call: Call) -> None:
        depth = min(call.query.shape[-1], call.key.shape[-1])
        call.query, call.key = (x[..., :depth] for x in (call.query, call.key))
        super().check(call)


@mutant("errors", "A bias or a mask that does not fit is ignored.")
class MisfitsIgnored(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return super().add_bias(call, logits) if steps.fits(call.bias, logits) else logits

    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return super().fill_hidden(call, logits) if steps.fits(call.mask, logits) else logits


# --- gradients: the output is right ---


@mutant("gradients", "dq is not divided by the root of the depth.")
class QueryGradientNotScaled(Attention):
    def query_gradient(self, call: Call, dlogits: Array) -> Array:
        return super().query_gradient(call, dlogits) * np.sqrt(call.query.shape[-1])


@mutant("gradients", "dk is divided by the root of the depth twice.")
class KeyGradientScaledTwice(Attention):
    def key_gradient(self, call: Call, dlogits: Array) -> Array:
        return super().key_gradient(call, dlogits) / np.sqrt(call.query.shape[-1])


@mutant("gradients", "dk has its heads in reverse order.")
class KeyGradientHeadsReversed(Attention):
    def key_gradient(self, call: Call, dlogits: Array) -> Array:
        return super().key_gradient(call, dlogits)[..., ::-1, :]


@mutant("gradients", "dv is summed with the weights before dropout.")
class ValueGradientWithoutDropout(Attention):
    def value_gradient(self, call: Call, cotangent: Array) -> Array:
        call.weights = call.softmax
        return super().value_gradient(call, cotangent)


@mutant("gradients", "dq and dk do not know of dropout.")
class LogitsGradientWithoutDropout(Attention):
    def weights_gradient(self, call: Call, cotangent: Array) -> Array:
        call.multiplier = 1.0
        return super().weights_gradient(call, cotangent)


@mutant("gradients", "A row that sees nothing adds to dv as if each key had a weight of one.", row=1)
class ValueGradientOfHiddenRowsLarge(Attention):
    def value_gradient(self, call: Call, cotangent: Array) -> Array:
        if call.mask is not None:
            count = np.where(steps.sees(call, call.weights), 1, call.weights.shape[-1])
            call.weights = wide(call.weights) * count
        return super().value_gradient(call, cotangent)


@mutant("gradients", "A row that sees nothing does not add to dv.", row=1)
class ValueGradientOfHiddenRowsLost(Attention):
    def value_gradient(self, call: Call, cotangent: Array) -> Array:
        if call.mask is not None:
            call.weights = np.where(steps.sees(call, call.weights), wide(call.weights), 0.0)
        return super().value_gradient(call, cotangent)


@mutant("gradients", "Hidden logits have a gradient, too: dq of a row that sees nothing is not zero.", row=1)
class HiddenLogitsLeak(Attention):
    def fill_gradient(self, call: Call, dlogits: Array) -> Array:
        return dlogits


@mutant("gradients", "For the gradient the weights are computed again, without the mask.")
class GradientWithoutMask(Attention):
    def softmax_gradient(self, call: Call, dweights: Array) -> Array:
        if call.mask is not None:
            logits = self.logits(call, call.scaled)
            call.softmax = self.softmax(call, logits if call.bias is None else self.add_bias(call, logits))
        return super().softmax_gradient(call, dweights)


@mutant("gradients", "The gradient of the softmax lacks what is to be subtracted.")
class SoftmaxGradientNotCentred(Attention):
    def softmax_gradient(self, call: Call, dweights: Array) -> Array:
        return wide(call.softmax) * dweights


@mutant("gradients", "dbias is zero.")
class BiasGradientMissing(Attention):
    def bias_gradient(self, call: Call, dlogits: Array) -> Array:
        return dlogits * 0


@mutant("gradients", "dbias is divided by the root of the depth.")
class BiasGradientScaled(Attention):
    def bias_gradient(self, call: Call, dlogits: Array) -> Array:
        return dlogits / np.sqrt(call.query.shape[-1])


@mutant("gradients", "dbias is the mean over a batch that shares the bias, not the sum.")
class BiasGradientAveraged(Attention):
    def bias_gradient(self, call: Call, dlogits: Array) -> Array:
        shared = np.ndim(call.bias) < dlogits.ndim or np.shape(call.bias)[0] == 1
        return dlogits / dlogits.shape[0] if shared and dlogits.ndim > 3 else dlogits


@mutant("gradients", "dbias is that of the first head alone, where heads share the bias.")
class BiasGradientOfTheFirstHead(Attention):
    def bias_gradient(self, call: Call, dlogits: Array) -> Array:
        shared = np.ndim(call.bias) < 3 or np.shape(call.bias)[-3] == 1
        return dlogits[..., :1, :, :] if shared else dlogits


@mutant("gradients", "The cotangent is taken to be one everywhere.")
class CotangentIgnored(Attention):
    def weights_gradient(self, call: Call, cotangent: Array) -> Array:
        return super().weights_gradient(call, np.ones_like(cotangent))


@mutant("gradients", "A hidden key that is NaN is left out, and does not show in dq.", row=30, contract="C2")
class HiddenKeysSkipped(Attention):
    def query_gradient(self, call: Call, dlogits: Array) -> Array:
        call.key = np.where(np.isnan(call.key), rounded(0, call.dtype), call.key)
        return super().query_gradient(call, dlogits)
