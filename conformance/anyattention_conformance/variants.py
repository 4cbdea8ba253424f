"""Attentions with one mistake each, as ports of Flax's have them, and the small call that shows it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from anyattention_conformance.case import ONE_HOT, Case
from anyattention_conformance.reference import Array, Attention, Call, divided, visible, wide

HIDING: tuple[Any, ...] = (
    ("mask", (..., 0), True),
    ("mask", (..., 1), False),
)  # no row is all hidden, none all visible
PLAIN = Case("probe-plain", query=(2, 4, 3, 8), key=(2, 5, 3, 8), v_depth=8)  # no two sizes are the same, save depths
SQUARE = Case("probe-square", query=(2, 3, 5, 4), key=(2, 3, 5, 4))
WEIGHTS = Case("probe-weights", v_depth=5, edits=ONE_HOT)
MASK = Case("probe-mask", mask=(2, 1, 3, 5), edits=HIDING)
FLOAT_MASK = Case("probe-float-mask", mask=(2, 1, 3, 5), mask_dtype="float32", edits=HIDING)
BIAS = Case("probe-bias", bias=(2, 1, 3, 5), edits=(("bias", (..., 1), 0.0),))  # zero hides if it is taken for a mask
CAUSAL = Case("probe-causal", options=(("is_causal", True),))


@dataclass(frozen=True)
class Variant:
    """A mistake: the attention that makes it, the case that shows it, what is wrong, and what mends it."""

    name: str
    case: Case
    attention: type[Attention]
    cause: str
    mend: str


VARIANTS: list[Variant] = []


def variant(case: Case, name: str, cause: str, mend: str) -> Any:
    """Register an attention that makes a mistake."""

    def register(attention: type[Attention]) -> type[Attention]:
        VARIANTS.append(Variant(name, case, attention, cause, mend))
        return attention

    return register


# --- the layout ---


class _Permuted(Attention):
    axes: tuple[int, int]

    def run(self, call: Call) -> Call:
        call.query, call.key, call.value = (np.swapaxes(x, *self.axes) for x in (call.query, call.key, call.value))
        output = super().run(call).output
        call.output = np.swapaxes(output, *self.axes)
        return call


@variant(
    SQUARE,
    "heads first",
    "It reads its arrays as [batch, heads, length, depth]; in Flax they are [batch, length, heads, depth].",
    "Swap the axes on the way in and out, x.swapaxes(-2, -3) for query, key, value and the output.",
)
class HeadsFirst(_Permuted):
    axes = -2, -3


@variant(
    SQUARE,
    "length first",
    "It reads its arrays as [length, batch, heads, depth]; in Flax they are [batch, length, heads, depth].",
    "Swap the first two axes on the way in and out, x.swapaxes(0, 1) for query, key, value and the output.",
)
class LengthFirst(_Permuted):
    axes = 0, 1


@variant(
    SQUARE,
    "query and key swapped",
    "It takes the query for the key, and the key for the query.",
    "Call its parameters query, key and value, or take them in this order.",
)
class QueryKeySwapped(Attention):
    def run(self, call: Call) -> Call:
        call.query, call.key = call.key, call.query
        return super().run(call)


@variant(
    PLAIN,
    "key and value swapped",
    "It takes the value for the key, and the key for the value, as layers do whose order is query, value, key.",
    "Call its parameters query, key and value, or take them in this order.",
)
class KeyValueSwapped(Attention):
    def run(self, call: Call) -> Call:
        call.key, call.value = call.value, call.key
        return super().run(call)


class _HeadsReshaped(Attention):
    """A reshape to [batch, heads, length, depth], which mixes lengths with heads, and one back."""

    way_in, way_out = True, True

    def run(self, call: Call) -> Call:
        if self.way_in:
            call.query, call.key, call.value = (_reshaped(x) for x in (call.query, call.key, call.value))
        output = super().run(call).output
        if self.way_out:
            call.output = np.swapaxes(output, -2, -3).reshape(output.shape)
        return call


def _reshaped(x: Array) -> Array:
    batch, length, heads, depth = x.shape
    return np.swapaxes(x.reshape(batch, heads, length, depth), -2, -3)


RESHAPED = "A reshape changes which number belongs to which head: transpose, x.swapaxes(-2, -3)."


@variant(PLAIN, "heads mixed on the way in", "It makes heads the second axis by a reshape.", RESHAPED)
class HeadsReshapedIn(_HeadsReshaped):
    way_out = False


@variant(PLAIN, "heads mixed on the way out", "It brings the heads of the output into place by a reshape.", RESHAPED)
class HeadsReshapedOut(_HeadsReshaped):
    way_in = False


@variant(PLAIN, "heads mixed", "It makes heads the second axis by a reshape, and back again by another.", RESHAPED)
class HeadsReshaped(_HeadsReshaped):
    pass


# --- the scale and the softmax ---

SCALE = "Divide the query, or the logits, by the root of the depth, and do so once."


@variant(PLAIN, "no scale", "It does not divide the logits by the root of the depth.", SCALE)
class NoScale(Attention):
    def scale(self, call: Call, query: Array) -> Array:
        return query


@variant(PLAIN, "scaled twice", "It divides the logits by the root of the depth twice, or once by the depth.", SCALE)
class ScaledTwice(Attention):
    def scale(self, call: Call, query: Array) -> Array:
        return divided(super().scale(call, query), self.root(call))


@variant(PLAIN, "multiplied by the root", "It multiplies the logits with the root of the depth.", SCALE)
class Multiplied(Attention):
    def scale(self, call: Call, query: Array) -> Array:
        return wide(query) * wide(self.root(call))


@variant(
    PLAIN,
    "scaled by all heads",
    "It divides the logits by the root of the depth of all heads together.",
    "Divide by the root of query.shape[-1], the depth of one head.",
)
class ScaledByWidth(Attention):
    def root(self, call: Call) -> Array:
        return np.sqrt(wide(call.query.shape[-1] * call.query.shape[-2]))


class _SoftmaxOver(Attention):
    axis: int

    def softmax(self, call: Call, logits: Array) -> Array:
        return np.swapaxes(super().softmax(call, np.swapaxes(logits, -1, self.axis)), -1, self.axis)


KEYS = "Take the softmax over the keys, the last axis of [batch, heads, q_length, kv_length]."


@variant(PLAIN, "softmax over queries", "It takes the softmax over the queries.", KEYS)
class SoftmaxOverQueries(_SoftmaxOver):
    axis = -2


@variant(PLAIN, "softmax over heads", "It takes the softmax over the heads.", KEYS)
class SoftmaxOverHeads(_SoftmaxOver):
    axis = -3


@variant(PLAIN, "softmax over the batch", "It takes the softmax over the batch.", KEYS)
class SoftmaxOverBatch(_SoftmaxOver):
    axis = -4


ALWAYS = "Flax hides nothing but what the mask hides: leave it out, or pass a causal mask in the calls that want one."


@variant(PLAIN, "always causal", "It is causal in every call, without being asked.", ALWAYS)
class AlwaysCausal(Attention):
    def softmax(self, call: Call, logits: Array) -> Array:
        rows, columns = logits.shape[-2:]
        seen = np.tri(rows, columns, self.offset(logits)) > 0
        return super().softmax(call, np.where(seen, logits, -np.inf))

    def offset(self, logits: Array) -> int:
        """How many keys the first query sees besides the first."""
        return 0


@variant(PLAIN, "always causal, from the end", "It is causal in every call, the last query at the last key.", ALWAYS)
class AlwaysCausalFromTheEnd(AlwaysCausal):
    def offset(self, logits: Array) -> int:
        return logits.shape[-1] - logits.shape[-2]


# --- the mask ---

TRUE = "In Flax's mask true, or any number but zero, means that the key is visible"


@variant(MASK, "mask inverted", "It hides the keys where the mask is true.", f"{TRUE}: use ~mask.")
class MaskInverted(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        call.mask = ~visible(call.mask)
        return super().fill_hidden(call, logits)


class _MaskAdded(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return wide(logits) + wide(call.mask)


ADD = f"{TRUE}: write where(mask, logits, a large negative number). What is to be added is Flax's bias."


@variant(MASK, "mask added", "It adds the mask to the logits, so that true adds one and hides nothing.", ADD)
class MaskAdded(_MaskAdded):
    pass


@variant(MASK, "mask ignored", "It ignores the mask.", f"{TRUE}: hide the others.")
class MaskIgnored(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return logits


@variant(MASK, "mask multiplied", "It multiplies the logits with the mask, so that hidden logits are zero.", ADD)
class MaskMultiplied(Attention):
    def fill_hidden(self, call: Call, logits: Array) -> Array:
        return wide(logits) * wide(call.mask)


@variant(
    MASK,
    "mask after the softmax",
    "It hides weights after the softmax, so that the others do not sum to one.",
    "Hide logits before the softmax, by a large negative number.",
)
class MaskAfterSoftmax(MaskIgnored):
    def softmax(self, call: Call, logits: Array) -> Array:
        return super().softmax(call, logits) * visible(True if call.mask is None else call.mask)


@variant(FLOAT_MASK, "float mask added", "It adds a mask of floating-point zeros and ones to the logits.", ADD)
class FloatMaskAdded(_MaskAdded):
    pass


@variant(FLOAT_MASK, "float mask inverted", "It hides the keys where a mask of numbers is one.", f"{TRUE}.")
class FloatMaskInverted(MaskInverted):
    pass


# --- the bias ---


@variant(
    BIAS,
    "bias before the scale",
    "It adds the bias before it divides by the root of the depth.",
    "Divide first, then add the bias.",
)
class BiasBeforeScale(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        call.bias = wide(call.bias) / wide(self.root(call))
        return super().add_bias(call, logits)


class _NoBias(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return logits


@variant(BIAS, "bias ignored", "It ignores the bias.", "Add the bias to the logits, after the division.")
class BiasIgnored(_NoBias):
    pass


@variant(BIAS, "bias subtracted", "It subtracts the bias.", "Add the bias to the logits.")
class BiasSubtracted(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return wide(logits) - wide(call.bias)


@variant(BIAS, "bias multiplied", "It multiplies the logits with the bias.", "Add the bias to the logits.")
class BiasMultiplied(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        return wide(logits) * wide(call.bias)


@variant(
    BIAS,
    "bias after the softmax",
    "It adds the bias to the weights, after the softmax.",
    "Add the bias to the logits, before the softmax.",
)
class BiasAfterSoftmax(_NoBias):
    def softmax(self, call: Call, logits: Array) -> Array:
        return super().softmax(call, logits) + wide(0.0 if call.bias is None else call.bias)


@variant(
    BIAS,
    "bias taken for a mask",
    "It takes the bias for a mask: what is not zero is visible, and zero hides.",
    "Add the bias to the logits: it holds numbers, and zero changes nothing.",
)
class BiasIsAMask(Attention):
    def add_bias(self, call: Call, logits: Array) -> Array:
        call.mask = call.bias
        return logits


# --- is_causal, for those that take it ---


@variant(
    CAUSAL,
    "causal from the end",
    "With is_causal it lets the last query see all keys; in flax.nnx the first query sees the first key alone.",
    "Build the mask with tril and no offset: query i sees key j where j <= i.",
)
class CausalFromTheEnd(AlwaysCausalFromTheEnd):
    pass


@variant(CAUSAL, "is_causal ignored", "It ignores is_causal.", "Hide the keys j > i from query i.")
class CausalIgnored(Attention):
    pass
