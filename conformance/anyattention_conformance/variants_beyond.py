"""Mistakes in what Flax lacks, as ports have them: mutants of the kit, each with the small call that shows it."""

from typing import Any

from anyattention_conformance.beyond import Attention
from anyattention_conformance.case import Case
from anyattention_conformance.mutants import beyond as mutants
from anyattention_conformance.variants import HIDING, VARIANTS, Variant

SCALE = Case("probe-scale", scale=3.0, options=(("scale", 0.3),))
CAP: dict[str, Any] = {"scale": 3.0, "options": (("logits_soft_cap", 1.5),)}
SOFT_CAP = Case("probe-soft-cap", **CAP)
CAP_AND_BIAS = Case("probe-soft-cap-and-bias", bias=(2, 1, 3, 5), bias_scale=3.0, **CAP)
CAP_AND_MASK = Case("probe-soft-cap-and-mask", mask=(2, 1, 3, 5), edits=HIDING, **CAP)
SINKS = Case("probe-sinks", sinks=(2,))
GROUPED = Case("probe-grouped-heads", query=(2, 3, 4, 4))
OFFSET = Case("probe-offset", key=(2, 7, 2, 4), offset=2)  # neither the difference of the lengths, nor one off from 0
OFFSETS = Case("probe-offset-of-each-entry", offset=(3, 0))
WINDOW = Case("probe-window", window=(2, 0))
MOVED = Case("probe-window-offset", window=(1, 1), offset=2)
STAGES = ((SCALE,), (SOFT_CAP, CAP_AND_BIAS, CAP_AND_MASK), (SINKS,), (GROUPED,), (OFFSET, OFFSETS), (WINDOW, MOVED))


class OffsetIgnored(Attention):
    """Causal from the first key on."""

    def seen(self, call: Any) -> Any:
        if call.window is None:
            call.offset = 0
        return super().seen(call)


TIMES = "Multiply the query by the scale, in place of the division by the root of the depth."
ORDER = "Scale first, then cap: cap * tanh(logits / cap), then add the bias, and then hide what the mask hides."
JOIN = "Put the sinks beside the logits as one more column, take the softmax, and leave out the column's weights."
TURNS = "Repeat each key head for the query heads that follow each other: repeat, not tile."
HIDE = "Hide key j from query i where j > i + offset."
BOUNDS = "Query i sees key j where i + offset - left <= j <= i + offset + right."
VARIANTS += [
    Variant(name, case, attention, cause, mend)
    for case, mend, mistakes in (
        (
            SCALE,
            TIMES,
            {
                "scale beside the root": (mutants.ScaleBesideTheRoot, "It scales, and divides by the root as well."),
                "scale ignored": (mutants.ScaleIgnored, "It ignores the scale."),
                "divided by the scale": (mutants.ScaleDivides, "It divides by the scale."),
            },
        ),
        (
            SOFT_CAP,
            ORDER,
            {
                "cap ignored": (mutants.CapIgnored, "It ignores the soft cap."),
                "cap without division": (mutants.CapWithoutDivision, "It does not divide the logits by the soft cap."),
                "cap without product": (mutants.CapWithoutProduct, "It does not multiply by the soft cap again."),
                "capped by clipping": (mutants.CapClips, "It clips the logits to the soft cap."),
                "cap before the scale": (mutants.CapBeforeScale, "It caps the logits before it scales them."),
            },
        ),
        (CAP_AND_BIAS, ORDER, {"cap after the bias": (mutants.CapAfterBias, "It adds the bias before the soft cap.")}),
        (CAP_AND_MASK, ORDER, {"cap after the mask": (mutants.CapAfterMask, "It caps hidden logits, so they show.")}),
        (
            SINKS,
            JOIN,
            {
                "sinks ignored": (mutants.SinksIgnored, "It ignores the sinks."),
                "sink of zero": (mutants.SinkIsAKeyOfZeros, "It takes each sink for zero."),
                "sink with a value": (mutants.SinkWithAValue, "It gives the weight of the sink to the first value."),
                "sinks scaled": (mutants.SinksScaled, "It scales the sinks with the logits."),
            },
        ),
        (GROUPED, TURNS, {"groups by turns": (mutants.GroupsByTurns, "Its key heads serve the query heads by turns.")}),
        (
            OFFSET,
            HIDE,
            {
                "offset ignored": (OffsetIgnored, "It ignores the offset."),
                "offset off by one": (mutants.OffsetOffByOne, "It hides the key at a query's own position."),
                "offset from the end": (mutants.OffsetFromTheEnd, "Its last query sees all keys, whatever the offset."),
                "offset subtracted": (mutants.OffsetSubtracted, "It subtracts the offset."),
            },
        ),
        (
            OFFSETS,
            HIDE,
            {"offset of one entry": (mutants.OffsetOfTheFirstEntry, "It takes the first entry's offset for all.")},
        ),
        (
            WINDOW,
            BOUNDS,
            {
                "window one short": (mutants.WindowOneShort, "Its window has one key fewer on the left."),
                "window open": (mutants.WindowOpenOnTheRight, "Its window has no right end."),
            },
        ),
        (
            MOVED,
            BOUNDS,
            {
                "window not moved": (mutants.WindowNotMoved, "It does not move the window by the offset."),
                "window moved on one side": (
                    mutants.WindowMovedOnOneSide,
                    "It moves the right end of the window alone.",
                ),
            },
        ),
    )
    for name, (attention, cause) in mistakes.items()
]
