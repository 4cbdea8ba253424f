"""Wrong attentions: mistakes in growth, dropout and dtypes."""

import numpy as np

from anyattention_conformance.mutants import steps
from anyattention_conformance.mutants.register import mutant
from anyattention_conformance.reference import Array, Attention, Call, DType, promoted, rounded, wide
from anyattention_conformance.threefry import threefry2x32

FLOAT32 = np.dtype("float32")

# --- growth ---


@mutant("growth", "A bias or a mask that enlarges the logits is refused.", row=26)
class GrowthRefused(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        query = call.query.shape
        if logits.shape != (*query[:-3], query[-2], query[-3], call.key.shape[-3]):
            raise ValueError("bias and mask must broadcast to the logits")
        return super().softmax(call, logits)


@mutant("growth", "Axes that a bias or a mask of a higher rank adds are cut off again.", row=26)
class GrownRankCut(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        while logits.ndim > call.query.ndim:
            logits = logits[0]
        return super().softmax(call, logits)


@mutant("growth", "A single value that has got several weights is multiplied with the first.", row=26)
class GrownKeysCut(Attention):
    def combine(self, call: Call, weights: Array) -> Array:
        return super().combine(call, weights[..., :1] if call.value.shape[-3] == 1 else weights)


# --- dropout ---


@mutant("dropout", "Each head and batch entry has a dropout mask of its own, though one for all is asked for.", row=22)
class DropoutNeverShared(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        call.broadcast_dropout = False
        return super().drop(call, weights)


@mutant("dropout", "All heads and batch entries share a dropout mask, though one for each is asked for.")
class DropoutAlwaysShared(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        call.broadcast_dropout = True
        return super().drop(call, weights)


@mutant("dropout", "All queries share a dropout mask.")
class DropoutSharedByQueries(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        return super().keep(call, (*shape[:-2], 1, shape[-1]))


@mutant("dropout", "What should be kept is dropped, and the other way round.")
class DropoutInverted(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        return ~super().keep(call, shape)


@mutant("dropout", "The rate is taken for the probability to be kept.")
class RateIsKept(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        call.dropout_rate = 1.0 - call.dropout_rate
        return super().drop(call, weights)


@mutant("dropout", "The weights that are kept are not scaled up.")
class DropoutNotScaled(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        dropped = super().drop(call, weights)
        call.multiplier = np.minimum(wide(call.multiplier), 1.0)
        return rounded(wide(weights) * call.multiplier, dropped.dtype)


@mutant("dropout", "The weights that are kept are made to sum to one.")
class DropoutRenormalised(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        dropped = wide(super().drop(call, weights))
        total = np.sum(dropped, axis=-1, keepdims=True)
        return rounded(np.where(total > 0, dropped / total, dropped), weights.dtype)


@mutant("dropout", "Logits are dropped, before the softmax, not weights.")
class DropoutOfLogits(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        return super().softmax(call, super().drop(call, logits) if steps.drops(call) else logits)

    def drop(self, call: Call, weights: Array) -> Array:
        return weights


@mutant("dropout", "Elements of the output are dropped, not weights.")
class DropoutOfTheOutput(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        return weights

    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        return super().drop(call, output) if steps.drops(call) else output


@mutant("dropout", "Weights are dropped though the call should be deterministic.")
class DeterministicIgnored(Attention):
    def run(self, call: Call) -> Call:
        call.deterministic = call.dropout_rng is None
        return super().run(call)


@mutant("dropout", "The two words of a count are swapped.", row=23)
class CountsSwapped(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        counts = steps.counts(shape)
        return steps.below(np.bitwise_xor(*threefry2x32(call.dropout_rng, counts, counts * 0)), call).reshape(shape)


@mutant("dropout", "Counts begin again at each batch entry.", row=23)
class CountsRestarted(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        return np.broadcast_to(super().keep(call, (*(1,) * (len(shape) - 3), *shape[-3:])), shape)


@mutant("dropout", "Two counts give two draws, as in JAX before 0.5, not one count one.", row=23)
class CountsInPairs(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        counts = steps.counts(shape)
        pairs = np.split(np.append(counts, np.zeros(counts.size % 2, np.uint32)), 2)
        bits = np.concatenate(threefry2x32(call.dropout_rng, *pairs))[: counts.size]
        return steps.below(bits, call).reshape(shape)


@mutant("dropout", "A draw takes 64 bits, as in JAX with x64 on.", row=23)
class WideDraws(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        counts = steps.counts(shape)
        high, low = (x.astype(np.uint64) for x in threefry2x32(call.dropout_rng, counts * 0, counts))
        return (((high << 32 | low) >> 12) * 2.0**-52 < 1.0 - call.dropout_rate).reshape(shape)


@mutant("dropout", "NumPy's generator draws.", row=23)
class AnotherGenerator(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        random = np.random.default_rng([int(word) for word in call.dropout_rng])
        return random.random(shape) < 1.0 - call.dropout_rate


@mutant("dropout", "A rate of 1 gives zero, not NaN.", row=24, contract="C2")
class RateOneIsZero(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        dropped = super().drop(call, weights)
        return rounded(wide(weights) * 0, dropped.dtype) if call.dropout_rate == 1.0 else dropped


# --- dtypes ---


@mutant("dtypes", "A softmax forced to float32 is cast back: the output has the dtype of the arrays.", row=15)
class ForcedSoftmaxCastBack(Attention):
    def combine(self, call: Call, weights: Array) -> Array:
        return rounded(super().combine(call, weights), call.dtype)


@mutant("dtypes", "The output is float32 or wider, whatever the arrays are.")
class OutputAlwaysFloat32(Attention):
    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        return rounded(output, promoted(output.dtype, FLOAT32))


@mutant("dtypes", "A wider bias widens the output.", row=16)
class BiasWidensOutput(Attention):
    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        return output if call.bias is None else rounded(output, promoted(output.dtype, np.asarray(call.bias).dtype))


@mutant("dtypes", "The bias is rounded to the dtype of the arrays.", row=16)
class BiasRounded(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        given, call.bias = call.bias, rounded(call.bias, call.dtype)
        logits = super().add_bias(call, logits)
        call.bias = given
        return logits


@mutant("dtypes", "Integers make float64, alone and beside float16, as in NumPy.", row=18)
class IntegersMakeFloat64(Attention):
    def promote(self, call: Call) -> DType:
        kinds = {np.asarray(x).dtype.kind for x in (call.query, call.key, call.value)}
        return np.dtype("float64") if call.dtype is None and kinds & {*"biu"} else super().promote(call)


@mutant("dtypes", "float16 with bfloat16 is computed in float16.", row=18)
class HalvesMakeFloat16(Attention):
    def promote(self, call: Call) -> DType:
        names = {np.asarray(x).dtype.name for x in (call.query, call.key, call.value)}
        return np.dtype("float16") if names == {"float16", "bfloat16"} else super().promote(call)


@mutant("dtypes", "float64 is computed in float32 and cast back.", row=19)
class Float64InFloat32(Attention):
    def run(self, call: Call) -> Call:
        if super().promote(call) != np.float64:
            return super().run(call)
        call.dtype = FLOAT32
        output = super().run(call).output
        call.output = rounded(output, np.float64)
        return call


@mutant("dtypes", "The dtype that is asked for is ignored.")
class DtypeIgnored(Attention):
    def promote(self, call: Call) -> DType:
        call.dtype = None
        return super().promote(call)
