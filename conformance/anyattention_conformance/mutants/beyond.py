"""Wrong attentions: mistakes in what Flax lacks, that is scale, soft cap, sinks, grouped heads, offsets and windows."""

from typing import Any

import numpy as np

from anyattention_conformance import positions
from anyattention_conformance.beyond import Attention
from anyattention_conformance.mutants import steps
from anyattention_conformance.mutants.register import mutant
from anyattention_conformance.reference import Array, promoted, rounded, wide

# --- scale ---


@mutant("scale", "The scale is multiplied beside the division by the root of the depth.", case="scale")
class ScaleBesideTheRoot(Attention):
    def factor(self, call: Any) -> Array:
        return super().factor(call) / wide(self.root(call))


@mutant("scale", "The scale is ignored.", case="scale")
class ScaleIgnored(Attention):
    def factor(self, call: Any) -> Array:
        return 1.0 / wide(self.root(call))


@mutant("scale", "The query is divided by the scale, as by a temperature.", case="scale")
class ScaleDivides(Attention):
    def factor(self, call: Any) -> Array:
        return 1.0 / super().factor(call)


@mutant("scale", "A scale of zero is taken for none.", case="scale-0")
class ScaleOfZeroIsNone(Attention):
    def run(self, call: Any) -> Any:
        call.scale = call.scale or None
        return super().run(call)


@mutant(
    "scale", "Query and key are each multiplied by the root of the scale: NaN if it is negative.", case="scale-negative"
)
class ScaleByRoots(Attention):
    def factor(self, call: Any) -> Array:
        return super().factor(call) if call.scale is None else np.sqrt(np.float64(call.scale)) ** 2


@mutant(
    "scale",
    "The product is multiplied by the scale after it was rounded, not the query: it overflows float16.",
    case="scale-before-the-product",
)
class ScaleAfterRounding(Attention):
    def scale(self, call: Any, query: Array) -> Array:
        return super().scale(call, query) if call.scale is None else query

    def logits(self, call: Any, query: Array) -> Array:
        cap, call.logits_soft_cap = call.logits_soft_cap, None
        logits = super().logits(call, query)
        logits = logits if call.scale is None else rounded(wide(logits) * self.factor(call), logits.dtype)
        call.logits_soft_cap = cap
        return logits if cap is None else self.cap(call, logits)


@mutant("scale", "The scale is not rounded to 16 bits.", contract="C2", case="scale-weights")
class ScaleNotRounded(Attention):
    def factor(self, call: Any) -> Array:
        return super().factor(call) if call.scale is None else np.asarray(call.scale)


@mutant("gradients", "dq is divided by the root of the depth, where there is a scale too.", case="scale")
class QueryGradientByTheRoot(Attention):
    def query_gradient(self, call: Any, dlogits: Array) -> Array:
        scale, call.scale = call.scale, None
        found = super().query_gradient(call, dlogits)
        call.scale = scale
        return found


# --- soft cap ---


class _CapLater(Attention):
    """The cap at another step."""

    def logits(self, call: Any, query: Array) -> Array:
        cap, call.logits_soft_cap = call.logits_soft_cap, None
        logits = super().logits(call, query)
        call.logits_soft_cap = cap
        return logits if cap is None or self.later(call) else self.cap(call, logits)

    def later(self, call: Any) -> bool:
        return False

    def capped(self, call: Any, logits: Array) -> Array:
        return logits if call.logits_soft_cap is None else self.cap(call, logits)


@mutant("soft cap", "The cap comes after the bias.", case="soft-cap-and-bias")
class CapAfterBias(_CapLater):
    def later(self, call: Any) -> bool:
        return call.bias is not None

    def add_bias(self, call: Any, logits: Array) -> Array:
        return self.capped(call, super().add_bias(call, logits))


@mutant("soft cap", "The cap comes after the mask, so that a hidden key has minus the cap.", case="soft-cap-and-mask")
class CapAfterMask(_CapLater):
    def later(self, call: Any) -> bool:
        return call.mask is not None

    def fill_hidden(self, call: Any, logits: Array) -> Array:
        return self.capped(call, super().fill_hidden(call, logits))


@mutant("soft cap", "The logits are not divided by the cap: cap * tanh(logits).", case="soft-cap")
class CapWithoutDivision(Attention):
    def cap(self, call: Any, logits: Array) -> Array:
        call.bent = rounded(np.tanh(wide(logits)), logits.dtype)
        return rounded(call.logits_soft_cap * wide(call.bent), logits.dtype)


@mutant("soft cap", "The logits are not multiplied by the cap again: tanh(logits / cap).", case="soft-cap-50")
class CapWithoutProduct(Attention):
    def cap(self, call: Any, logits: Array) -> Array:
        super().cap(call, logits)
        return call.bent


@mutant("soft cap", "The logits are clipped to the cap.", case="soft-cap")
class CapClips(Attention):
    def cap(self, call: Any, logits: Array) -> Array:
        cap = call.logits_soft_cap
        return rounded(np.clip(wide(logits), -cap, cap), logits.dtype)


@mutant("soft cap", "The cap is ignored.", case="soft-cap")
class CapIgnored(Attention):
    def cap(self, call: Any, logits: Array) -> Array:
        return logits


@mutant("soft cap", "The products are capped before they are scaled.", case="soft-cap-and-scale")
class CapBeforeScale(Attention):
    def cap(self, call: Any, logits: Array) -> Array:
        factor = self.factor(call)
        return rounded(wide(super().cap(call, rounded(wide(logits) / factor, logits.dtype))) * factor, logits.dtype)


@mutant("gradients", "The gradient does not know of the cap.", case="soft-cap")
class CapGradientMissing(Attention):
    def cap_gradient(self, call: Any, dlogits: Array) -> Array:
        return dlogits


# --- sinks ---


@mutant("sinks", "The sinks are ignored.", case="sinks")
class SinksIgnored(Attention):
    def column(self, call: Any) -> Array:
        return np.full_like(super().column(call), -np.inf)


@mutant("sinks", "The weight of the sink goes to the first value.", case="sinks")
class SinkWithAValue(Attention):
    def combine(self, call: Any, weights: Array) -> Array:
        if call.sinks is None or not weights.shape[-1]:
            return super().combine(call, weights)
        first = np.arange(weights.shape[-1]) == 0
        return super().combine(call, rounded(wide(weights) + wide(call.sink_weights) * first, weights.dtype))


@mutant("sinks", "The sink is a key of zeros, whose logit is zero.", case="sinks")
class SinkIsAKeyOfZeros(Attention):
    def column(self, call: Any) -> Array:
        return np.zeros_like(super().column(call))


@mutant("sinks", "The sinks are scaled, as a key that is put beside the others.", case="sinks")
class SinksScaled(Attention):
    def column(self, call: Any) -> Array:
        return rounded(wide(super().column(call)) * self.factor(call), call.dtype)


@mutant("sinks", "The sinks are capped with the logits.", case="sinks-cap-and-scale")
class SinksCapped(Attention):
    def column(self, call: Any) -> Array:
        column, cap = super().column(call), call.logits_soft_cap
        return column if cap is None else rounded(cap * np.tanh(wide(column) / cap), column.dtype)


@mutant("grouped heads", "The sinks are in the order of heads that take turns.", case="grouped-sinks")
class SinksByTurns(Attention):
    def column(self, call: Any) -> Array:
        if call.group == 1:
            return super().column(call)
        call.sinks = call.sinks.reshape((-1, call.group)).T.reshape(-1)
        return super().column(call)


@mutant("sinks", "The largest logit is subtracted from the logits, and not from the sink.", case="sinks")
class SinkNotShifted(Attention):
    def softmax(self, call: Any, logits: Array) -> Array:
        if call.sinks is None:
            return super().softmax(call, logits)
        sinks = rounded(self.column(call), promoted(logits.dtype, call.sinks.dtype))
        powers, sink = steps.powers(rounded(logits, sinks.dtype)), np.exp(wide(sinks))
        total = np.sum(wide(powers), axis=-1, keepdims=True) + sink
        call.sink_weights = sink / total
        return rounded(wide(powers) / total, sinks.dtype)


@mutant("sinks", "The maximum is that of the logits alone, so that a large sink overflows.", case="sinks-of-all-sizes")
class SinkBesideTheMaximum(Attention):
    def softmax(self, call: Any, logits: Array) -> Array:
        if call.sinks is None:
            return super().softmax(call, logits)
        dtype = promoted(logits.dtype, call.sinks.dtype)
        sink = rounded(np.exp(wide(rounded(wide(self.column(call)) - steps.top(logits), dtype))), dtype)
        powers = steps.powers(rounded(logits, dtype))
        total = wide(rounded(np.sum(wide(powers), axis=-1, keepdims=True) + wide(sink), dtype))
        call.sink_weights = rounded(wide(sink) / total, dtype)
        return rounded(wide(powers) / total, dtype)


@mutant("sinks", "All queries have the sink of the first.", case="sinks-of-each-query")
class SinkOfTheFirstQuery(Attention):
    def column(self, call: Any) -> Array:
        return super().column(call)[..., :1, :]


@mutant("sinks", "A row that sees nothing has the mean of all values, as without sinks.", case="sinks-hidden-row")
class HiddenRowsMeanBesideSinks(Attention):
    def softmax(self, call: Any, logits: Array) -> Array:
        weights = super().softmax(call, logits)
        if call.sinks is None or call.mask is None:
            return weights
        return np.where(steps.sees(call, weights), weights, rounded(1 / weights.shape[-1], weights.dtype))


@mutant("sinks", "The weights that are left beside the sink are made to sum to one.", case="sinks")
class SinkRenormalised(Attention):
    def softmax(self, call: Any, logits: Array) -> Array:
        weights = super().softmax(call, logits)
        total = np.sum(wide(weights), axis=-1, keepdims=True)
        return weights if call.sinks is None else rounded(wide(weights) / np.where(total > 0, total, 1), weights.dtype)


@mutant("gradients", "dsinks is zero.", case="sinks")
class SinkGradientMissing(Attention):
    def softmax_gradient(self, call: Any, dweights: Array) -> Array:
        found = super().softmax_gradient(call, dweights)
        call.dsinks = call.dsinks * 0
        return found


@mutant("gradients", "dsinks has the sign of the weights that the sink gains.", case="sinks")
class SinkGradientNegated(Attention):
    def softmax_gradient(self, call: Any, dweights: Array) -> Array:
        found = super().softmax_gradient(call, dweights)
        call.dsinks = -call.dsinks
        return found


# --- grouped heads ---


@mutant("grouped heads", "The key heads serve by turns, not each several query heads in a row.", case="grouped-heads")
class GroupsByTurns(Attention):
    def spread(self, call: Any, x: Array) -> Array:
        return np.concatenate([x] * call.group, axis=-2)

    def gathered(self, call: Any, x: Array) -> Array:
        *lead, heads, depth = x.shape
        return x.reshape((*lead, call.group, heads // call.group, depth)).sum(axis=-3)


@mutant("gradients", "dk and dv are those of the first query head of each group.", case="grouped-heads")
class GroupGradientOfTheFirstHead(Attention):
    def gathered(self, call: Any, x: Array) -> Array:
        return x[..., :: call.group, :]


# --- offsets and windows ---


@mutant("offsets", "The key at a query's own position is hidden: j < i + offset.", case="offset")
class OffsetOffByOne(Attention):
    def seen(self, call: Any) -> Array:
        return super().seen(call) if call.offset is None else _seen(call, np.asarray(call.offset) - 1)


@mutant("offsets", "The last query sees all keys, whatever the offset.", case="offset")
class OffsetFromTheEnd(Attention):
    def seen(self, call: Any) -> Array:
        return super().seen(call) if call.offset is None else _seen(call, call.key.shape[-3] - call.query.shape[-3])


@mutant("offsets", "The offset is subtracted.", case="offset")
class OffsetSubtracted(Attention):
    def seen(self, call: Any) -> Array:
        return super().seen(call) if call.offset is None else _seen(call, -np.asarray(call.offset))


@mutant("offsets", "All batch entries have the offset of the first.", case="offset-of-each-entry")
class OffsetOfTheFirstEntry(Attention):
    def seen(self, call: Any) -> Array:
        return super().seen(call) if call.offset is None else _seen(call, np.asarray(call.offset).reshape(-1)[0])


@mutant("offsets", "A single query is taken to see every key of the cache.", case="offset-decode")
class SingleQuerySeesAll(Attention):
    def seen(self, call: Any) -> Array:
        found = super().seen(call)
        return found if found.shape[-2] > 1 else np.ones_like(found)


@mutant("offsets", "An offset below zero is taken for zero.", case="offset-negative")
class OffsetNotNegative(Attention):
    def seen(self, call: Any) -> Array:
        return super().seen(call) if call.offset is None else _seen(call, np.maximum(call.offset, 0))


@mutant("offsets", "The offset moves the right end of the window alone.", case="window-offset-both-sides")
class WindowMovedOnOneSide(Attention):
    def seen(self, call: Any) -> Array:
        if call.window is None or call.offset is None:
            return super().seen(call)
        left, right = call.window
        lengths = call.query.shape[-3], call.key.shape[-3]
        far = lengths[1] + lengths[0] + int(np.abs(call.offset).max())
        return positions.seen(0, (left, far), *lengths) & positions.seen(call.offset, (far, right), *lengths)


@mutant("offsets", "The offset does not move the window.", case="window-offset")
class WindowNotMoved(Attention):
    def seen(self, call: Any) -> Array:
        return super().seen(call) if call.window is None else _seen(call, 0)


@mutant("offsets", "The window has its own key among those on the left: one fewer is seen.", case="window-left")
class WindowOneShort(Attention):
    def seen(self, call: Any) -> Array:
        if call.window is not None:
            call.window = max(call.window[0] - 1, 0), call.window[1]
        return super().seen(call)


@mutant("offsets", "The window has no right end.", case="window")
class WindowOpenOnTheRight(Attention):
    def seen(self, call: Any) -> Array:
        if call.window is not None:
            call.window = call.window[0], call.key.shape[-3]
        return super().seen(call)


def _seen(call: Any, offset: Any) -> Array:
    """What another offset leaves visible."""
    return positions.seen(offset, call.window, call.query.shape[-3], call.key.shape[-3])
