"""Wrong attentions, one mistake each: a kit that lets one of them pass does not see that mistake in others.

Each is right wherever its mistake has no part, so that it takes a case of its group to catch it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyattention_conformance.reference import (
    LOWEST,
    QUERY_KEY,
    WEIGHTS_VALUE,
    Array,
    Attention,
    Call,
    DType,
    divided,
    einsum,
    promoted,
    rounded,
    visible,
    wide,
)
from anyattention_conformance.threefry import threefry2x32

FLOAT32 = np.dtype("float32")
TILE = 32  # keys that are taken together, where the mistake is one of tiles


@dataclass(frozen=True)
class Mutant:
    """A mistake, and what has to find it.

    `group` is the group of cases that does. `contract` is "C3" if the answer is too far from the truth, has another
    dtype, shape or NaN, or is given where Flax raises; "C2" if only a target that claims Flax's own steps is wrong to
    give it. `row` is the mistake's number in the table of known traps, 0 if it is not there.
    """

    name: str
    what: str
    group: str
    contract: str
    row: int
    attention: Attention


_found: list[Mutant] = []


def mutant(group: str, what: str, row: int = 0, contract: str = "C3") -> Callable[[type[Attention]], type[Attention]]:
    """Register a wrong attention, named as its class."""

    def register(attention: type[Attention]) -> type[Attention]:
        name = re.sub("(?<!^)(?=[A-Z])", "-", attention.__name__).lower()
        _found.append(Mutant(name, what, group, contract, row, attention()))
        return attention

    return register


# --- layout ---


@mutant("layout", "Heads are read as positions, and positions as heads, where there are as many of both.", row=28)
class HeadsFirst(Attention):
    def run(self, call: Call) -> Call:
        query, key = np.shape(call.query), np.shape(call.key)
        if not query[-3:-2] == query[-2:-1] == key[-3:-2]:
            return super().run(call)
        call.query, call.key, call.value = (np.swapaxes(x, -2, -3) for x in (call.query, call.key, call.value))
        output = super().run(call).output
        call.output = np.swapaxes(output, -2, -3)
        return call


@mutant("layout", "The heads of the output are brought into place by a reshape that should be a transpose.")
class HeadsReshaped(Attention):
    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        return np.swapaxes(output, -2, -3).reshape(output.shape)


@mutant("layout", "The softmax is taken over the queries.")
class SoftmaxOverQueries(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        return np.swapaxes(super().softmax(call, np.swapaxes(logits, -1, -2)), -1, -2)


@mutant("layout", "The softmax is taken over the fourth axis, whatever the rank.")
class SoftmaxOverFourthAxis(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        return np.moveaxis(super().softmax(call, np.moveaxis(logits, 3, -1)), -1, 3)


@mutant("layout", "A square mask is read as [keys, queries].")
class MaskTransposed(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        if np.ndim(call.mask) >= 2 and np.shape(call.mask)[-1] == np.shape(call.mask)[-2]:
            call.mask = np.swapaxes(call.mask, -1, -2)
        return super().fill_hidden(call, logits)


# --- lengths ---


@mutant("lengths", "No keys at all: an error, from the maximum of nothing.", row=20)
class NoKeysFail(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        np.max(wide(logits), axis=-1)
        return super().softmax(call, logits)


@mutant("lengths", "No keys at all: NaN, the mean of nothing.", row=20)
class NoKeysNan(Attention):
    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        return output if weights.shape[-1] else rounded(wide(output) * np.nan, output.dtype)


@mutant("lengths", "The last tile of keys is left out if it is not full.")
class LastTileLost(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        whole = logits.shape[-1] // TILE * TILE or TILE
        lost = np.arange(logits.shape[-1]) >= whole
        return super().softmax(call, np.where(lost, rounded(-np.inf, logits.dtype), logits))


@mutant("lengths", "The last tile of keys is filled up with logits of zero, which are given weight.")
class LastTilePadded(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        length = logits.shape[-1]
        padding = -length % TILE if length > TILE else 0
        padded = np.concatenate((logits, np.zeros((*logits.shape[:-1], padding), logits.dtype)), axis=-1)
        return super().softmax(call, padded)[..., :length]


@mutant("lengths", "What was summed so far is not scaled down when a later tile has a larger maximum.")
class MaximumStale(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        length = logits.shape[-1]
        if length <= TILE:
            return super().softmax(call, logits)
        ends = np.minimum(np.arange(length) // TILE * TILE + TILE, length) - 1
        powers = np.exp(wide(logits) - np.maximum.accumulate(wide(logits), axis=-1)[..., ends])
        return rounded(powers / np.sum(powers, axis=-1, keepdims=True), logits.dtype)


@mutant("lengths", "A single query is taken for a step of decoding, which sees every key: its mask is ignored.")
class SingleQueryUnmasked(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return logits if call.query.shape[-3] == 1 else super().fill_hidden(call, logits)


# --- depth ---


@mutant("depth", "The query is not divided by the root of the depth.")
class NoScale(Attention):
    def root(self, call: Call) -> Array:
        return rounded(1, call.dtype)


@mutant("depth", "The query is divided by the depth, not by its root.")
class ScaleByDepth(Attention):
    def root(self, call: Call) -> Array:
        return rounded(call.query.shape[-1], call.dtype)


@mutant("depth", "The query is divided by the root of the values' depth.")
class ScaleByValueDepth(Attention):
    def root(self, call: Call) -> Array:
        return rounded(np.sqrt(call.value.shape[-1]), call.dtype)


@mutant("depth", "The depth is filled up to a multiple of 8, and the root is that of the filled depth.")
class ScaleByPaddedDepth(Attention):
    def root(self, call: Call) -> Array:
        return rounded(np.sqrt(-(-call.query.shape[-1] // 8) * 8), call.dtype)


@mutant("depth", "No depth at all: an error, from the division by its root.", row=21)
class NoDepthFails(Attention):
    def scale(self, call: Call, query: Array) -> Array:
        return rounded(wide(query) * (1 / query.shape[-1] ** 0.5), call.dtype)


@mutant("depth", "No depth at all: NaN, from zero times the infinite reciprocal of its root.", row=21)
class NoDepthNan(Attention):
    def logits(self, call: Call, query: Array) -> Array:
        logits = super().logits(call, query)
        return logits if query.shape[-1] else rounded(wide(logits) * np.inf, logits.dtype)


# --- bias ---


@mutant("bias", "The bias is not added.")
class BiasDropped(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return np.broadcast_to(logits, np.broadcast_shapes(logits.shape, np.shape(call.bias)))


@mutant("bias", "The bias is added twice.")
class BiasTwice(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return super().add_bias(call, super().add_bias(call, logits))


@mutant("bias", "The bias is subtracted.")
class BiasSubtracted(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return rounded(wide(logits) - wide(call.bias), super().add_bias(call, logits).dtype)


@mutant("bias", "The bias is divided by the root of the depth, as the query is.")
class BiasScaled(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        bias = wide(call.bias) / np.sqrt(call.query.shape[-1])
        return rounded(wide(logits) + bias, super().add_bias(call, logits).dtype)


@mutant("bias", "The bias is added to the weights, after the softmax.")
class BiasAfterSoftmax(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return np.broadcast_to(logits, np.broadcast_shapes(logits.shape, np.shape(call.bias)))

    def round_weights(self, call: Call, softmax: Array) -> Array:
        return rounded(wide(softmax) + (0.0 if call.bias is None else wide(call.bias)), call.dtype)


@mutant("bias", "Every head is given the bias of the first.")
class BiasOfTheFirstHead(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        if np.ndim(call.bias) >= 3:
            call.bias = call.bias[..., :1, :, :]
        return super().add_bias(call, logits)


@mutant("bias", "A boolean bias is taken for a mask.", row=17)
class BiasIsAMask(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        if np.asarray(call.bias).dtype != np.bool_:
            return super().add_bias(call, logits)
        return rounded(np.where(call.bias, wide(logits), LOWEST[call.dtype.name]), logits.dtype)


# --- mask ---


@mutant("mask", "The mask is inverted: true hides.")
class MaskInverted(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        call.mask = ~visible(call.mask)
        return super().fill_hidden(call, logits)


@mutant("mask", "A mask of any rank but 4 is ignored.")
class MaskOfRank4Only(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return super().fill_hidden(call, logits) if np.ndim(call.mask) == 4 else logits


@mutant("mask", "A mask of zeros and ones in floating point is added to the logits.", row=3)
class MaskOfFloatsAdded(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        if np.asarray(call.mask).dtype.kind != "f":
            return super().fill_hidden(call, logits)
        return rounded(wide(logits) + wide(call.mask), logits.dtype)


@mutant("mask", "A mask is made integer, so that fractions hide.", row=3)
class MaskTruncated(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        call.mask = np.asarray(call.mask).astype(np.int32)
        return super().fill_hidden(call, logits)


@mutant("mask", "A key is visible where the mask is 1, and hidden where it is any other number.", row=3)
class MaskIsOne(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        call.mask = np.asarray(call.mask) == 1
        return super().fill_hidden(call, logits)


@mutant("mask", "A key is hidden where the mask is negative.", row=3)
class MaskIsPositive(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        call.mask = np.asarray(call.mask) > 0
        return super().fill_hidden(call, logits)


@mutant("mask", "Every head is given the mask of the first.")
class MaskOfTheFirstHead(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        if np.ndim(call.mask) >= 3:
            call.mask = call.mask[..., :1, :, :]
        return super().fill_hidden(call, logits)


@mutant("mask", "A mask of rank 3 is read as [batch, queries, keys] where its first axis could be the batch.")
class MaskOfABatch(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        if np.ndim(call.mask) == 3 and logits.ndim == 4 and np.shape(call.mask)[0] == logits.shape[0]:
            call.mask = call.mask[:, None]
        return super().fill_hidden(call, logits)


@mutant("mask", "The mask has no parameter: it goes into **kwargs, and is dropped.", row=29)
class SwallowsTheMask(Attention):
    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        return super().__call__(*args, **kwargs | {"mask": None})


# --- rows that see nothing ---


@mutant("hidden rows", "A row that sees nothing is zero.", row=1)
class HiddenRowsZero(Attention):
    def round_weights(self, call: Call, softmax: Array) -> Array:
        weights = super().round_weights(call, softmax)
        return weights if call.mask is None else np.where(_sees(call, weights), weights, rounded(0, weights.dtype))


@mutant("hidden rows", "The fill is minus infinity, so that a row that sees nothing is NaN.", row=1)
class HiddenRowsNan(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return np.where(visible(call.mask), super().fill_hidden(call, logits), rounded(-np.inf, logits.dtype))


@mutant("hidden rows", "A row that sees nothing is computed as if it saw everything.", row=1)
class HiddenRowsSeeAll(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        call.mask = visible(call.mask) | ~_sees(call, super().fill_hidden(call, logits))
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
        return np.where(_sees(call, filled), added, filled)


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
        return np.where(visible(call.mask) | ~_sees(call, filled), filled, rounded(-np.inf, filled.dtype))


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
        left = np.where(visible(call.mask) | ~_sees(call, weights), wide(weights), 0.0)
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
        return _normalised(np.exp(wide(logits)), logits.dtype)


@mutant("large logits", "One maximum, of the whole array, is subtracted from every row.")
class MaximumOfAll(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        return _normalised(np.exp(wide(logits) - np.max(wide(logits), initial=-np.inf)), logits.dtype)


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
        return _normalised(np.exp(wide(logits)), logits.dtype)


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
        return super().softmax(call, super().drop(call, logits) if _drops(call) else logits)

    def drop(self, call: Call, weights: Array) -> Array:
        return weights


@mutant("dropout", "Elements of the output are dropped, not weights.")
class DropoutOfTheOutput(Attention):
    def drop(self, call: Call, weights: Array) -> Array:
        return weights

    def combine(self, call: Call, weights: Array) -> Array:
        output = super().combine(call, weights)
        return super().drop(call, output) if _drops(call) else output


@mutant("dropout", "Weights are dropped though the call should be deterministic.")
class DeterministicIgnored(Attention):
    def run(self, call: Call) -> Call:
        call.deterministic = call.dropout_rng is None
        return super().run(call)


@mutant("dropout", "The two words of a count are swapped.", row=23)
class CountsSwapped(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        counts = _counts(shape)
        return _below(np.bitwise_xor(*threefry2x32(call.dropout_rng, counts, counts * 0)), call).reshape(shape)


@mutant("dropout", "Counts begin again at each batch entry.", row=23)
class CountsRestarted(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        return np.broadcast_to(super().keep(call, (*(1,) * (len(shape) - 3), *shape[-3:])), shape)


@mutant("dropout", "Two counts give two draws, as in JAX before 0.5, not one count one.", row=23)
class CountsInPairs(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        counts = _counts(shape)
        pairs = np.split(np.append(counts, np.zeros(counts.size % 2, np.uint32)), 2)
        bits = np.concatenate(threefry2x32(call.dropout_rng, *pairs))[: counts.size]
        return _below(bits, call).reshape(shape)


@mutant("dropout", "A draw takes 64 bits, as in JAX with x64 on.", row=23)
class WideDraws(Attention):
    def keep(self, call: Call, shape: tuple[int, ...]) -> Array:
        counts = _counts(shape)
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
        powers = wide(_powers(logits))
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
        return _truncated(wide(query) / wide(self.root(call)), call.dtype)

    def logits(self, call: Call, query: Array) -> Array:
        return _truncated(einsum(QUERY_KEY, query, call.key), call.dtype)

    def softmax(self, call: Call, logits: Array) -> Array:
        powers = wide(_truncated(np.exp(wide(logits) - _top(logits)), logits.dtype))
        total = _truncated(np.sum(powers, axis=-1, keepdims=True), logits.dtype)
        return _truncated(powers / wide(total), logits.dtype)

    def combine(self, call: Call, weights: Array) -> Array:
        return _truncated(einsum(WEIGHTS_VALUE, weights, call.value), promoted(weights.dtype, call.dtype))


@mutant("rounding", "A sum beyond float16 stays finite.", row=32, contract="C2")
class SumDoesNotOverflow(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        powers = wide(_powers(logits))
        total = np.sum(powers, axis=-1, keepdims=True)
        beyond = total > -LOWEST[logits.dtype.name]
        return np.where(beyond, rounded(powers / total, logits.dtype), super().softmax(call, logits))


@mutant("rounding", "The sum of exponentials is rounded to 16 bits at each key.")
class SumIn16Bits(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        powers = _powers(logits)
        first = np.zeros((*powers.shape[:-1], 1), powers.dtype)
        return divided(powers, np.add.accumulate(np.concatenate((first, powers), axis=-1), axis=-1)[..., -1:])


@mutant("rounding", "Products of float32 take 11 bits of each factor, as tensor cores do.")
class ProductsOf11Bits(Attention):
    def logits(self, call: Call, query: Array) -> Array:
        return rounded(einsum(QUERY_KEY, _eleven_bits(query), _eleven_bits(call.key)), call.dtype)

    def combine(self, call: Call, weights: Array) -> Array:
        product = einsum(WEIGHTS_VALUE, _eleven_bits(weights), _eleven_bits(call.value))
        return rounded(product, promoted(weights.dtype, call.dtype))


@mutant("rounding", "The exponential is right to four digits.")
class ExponentialCoarse(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        shifted = wide(logits) - _top(logits)
        return _normalised(np.exp(shifted) * (1 + 1e-4 * np.sin(1e3 * shifted)), logits.dtype)


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
        return super().add_bias(call, logits) if _fits(call.bias, logits) else logits

    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return super().fill_hidden(call, logits) if _fits(call.mask, logits) else logits


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
            count = np.where(_sees(call, call.weights), 1, call.weights.shape[-1])
            call.weights = wide(call.weights) * count
        return super().value_gradient(call, cotangent)


@mutant("gradients", "A row that sees nothing does not add to dv.", row=1)
class ValueGradientOfHiddenRowsLost(Attention):
    def value_gradient(self, call: Call, cotangent: Array) -> Array:
        if call.mask is not None:
            call.weights = np.where(_sees(call, call.weights), wide(call.weights), 0.0)
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


MUTANTS = tuple(_found)


def _sees(call: Call, logits: Array) -> Array:
    """Whether each query sees any key, ``[..., q_length, 1]``."""
    return np.any(np.broadcast_to(visible(call.mask), logits.shape), axis=-1, keepdims=True)


def _fits(x: Array, logits: Array) -> bool:
    """Whether it broadcasts with the logits."""
    return all(a == b or 1 in (a, b) for a, b in zip(np.shape(x)[::-1], logits.shape[::-1], strict=False))


def _drops(call: Call) -> bool:
    """Whether there is dropout."""
    return not call.deterministic and call.dropout_rate > 0.0


def _counts(shape: tuple[int, ...]) -> Array:
    """The low words of the counts of an array; the high ones are zero."""
    return np.arange(int(np.prod(shape)), dtype=np.uint32)


def _below(bits: Array, call: Call) -> Array:
    """True where the number that JAX makes of these 32 bits is below the probability to be kept."""
    return (bits >> 9) * np.float32(2.0**-23) < np.float32(1.0 - call.dropout_rate)


def _top(logits: Array) -> Array:
    """The largest logit of each row, in float64."""
    return np.max(wide(logits), axis=-1, keepdims=True, initial=-np.inf)


def _powers(logits: Array) -> Array:
    """The exponentials of a row, as Flax rounds them."""
    return rounded(np.exp(wide(rounded(wide(logits) - _top(logits), logits.dtype))), logits.dtype)


def _normalised(powers: Array, dtype: DType) -> Array:
    """Weights of exponentials, as Flax rounds them."""
    powers = rounded(powers, dtype)
    return divided(powers, rounded(np.sum(wide(powers), axis=-1, keepdims=True), dtype))


def _truncated(x: Array, dtype: DType) -> Array:
    """Rounded towards zero, if to bfloat16."""
    if dtype.name == "bfloat16":
        x = (rounded(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded(x, dtype)


def _eleven_bits(x: Array) -> Array:
    """With the significand of float16; 16-bit numbers are what they were."""
    fraction, exponent = np.frexp(wide(x))
    return np.ldexp(np.rint(fraction * 2**11), exponent - 11)
