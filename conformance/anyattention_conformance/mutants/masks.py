"""Wrong attentions: mistakes in layout, lengths, depth, bias and mask."""

from typing import Any

import numpy as np

from anyattention_conformance.mutants.register import mutant
from anyattention_conformance.reference import LOWEST, Array, Attention, Call, rounded, visible, wide

TILE = 32  # keys that are taken together, where the mistake is one of tiles

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
