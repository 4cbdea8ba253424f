"""Known mistakes of ports, each found by one small call: which wrong attention, in float64, gives just this answer.

A probe is a case in float32. Where a target's answer is not Flax's, it is compared with those of `VARIANTS`: attentions
with one mistake. The first that gives the same answer is the diagnosis, and the later probes take it for granted, so
that a second mistake is found as well.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from anyattention_conformance import beyond, variants_beyond
from anyattention_conformance.budgets import EPS
from anyattention_conformance.case import Case
from anyattention_conformance.reference import Array, Attention, wide
from anyattention_conformance.results import Diagnosis
from anyattention_conformance.targets import Outcome
from anyattention_conformance.truth import NAMES
from anyattention_conformance.variants import (
    BIAS,
    CAUSAL,
    FLOAT_MASK,
    MASK,
    PLAIN,
    SQUARE,
    VARIANTS,
    WEIGHTS,
    AlwaysCausal,
    Variant,
)

# The cases in the order of the diagnosis. Of each row the first that is explained ends it.
STAGES = ((PLAIN, SQUARE), (MASK, FLOAT_MASK), (BIAS,), (CAUSAL,))
CALLS = (PLAIN, *(case for stage in STAGES for case in stage), WEIGHTS)  # the first twice: is there one answer?
BEYOND_CALLS = tuple(case for stage in variants_beyond.STAGES for case in stage)
RIGHT = {CAUSAL.id: (AlwaysCausal,)}
RANDOM = Diagnosis(
    "random",
    "It gives another answer each time, for the same arguments and without a dropout rate.",
    "Turn dropout off where no dropout_rate is given: call .eval() on a module of PyTorch, or pass a rate of zero.",
)
DROPS = Diagnosis(
    "always drops",
    "It drops weights and scales up the others, without being asked.",
    "Turn dropout off where no dropout_rate is given, or where deterministic is true.",
)


def calls(supports: frozenset[str]) -> tuple[Case, ...]:
    """What is asked, of Flax's words and of those that the target supports beside them."""
    return (*CALLS, *(case for case in BEYOND_CALLS if case.beyond <= supports))


def diagnose(answers: Mapping[str, list[Outcome]]) -> list[Diagnosis]:
    """What explains the answers to `calls`, given by case id; nothing if they are right, or wrong in unknown ways."""
    outputs = {name: [x.output for x in outcomes if x.kind == "answer"] for name, outcomes in answers.items()}
    if len(plain := outputs.get(PLAIN.id, [])) == 2 and not (_same(*plain) or _near(*plain)):
        return [RANDOM]
    found: list[Variant] = []
    for stage in (*STAGES, *variants_beyond.STAGES):
        for case in stage:
            if outputs.get(case.id) and (more := _explained(case, outputs[case.id][0], found)):
                found += more
                break
    dropped = [DROPS] if not found and any(map(_drops, outputs.get(WEIGHTS.id, []))) else []
    return [*(Diagnosis(x.name, x.cause, x.mend) for x in found), *dropped, *_of_parameters(answers)]


def _explained(case: Case, actual: Array, found: list[Variant]) -> list[Variant]:
    """The mistakes that, with those that were found, give this answer: one, or two where the first hides the second."""
    base = [x.attention for x in found]
    if _near(actual, _answer(case, [*RIGHT.get(case.id, ()), *base])):
        return []
    own = [[x] for x in VARIANTS if x.case is case]
    if case is SQUARE:
        own += [[x, y] for (x,) in own for y in VARIANTS if y.case is PLAIN]
    return next((x for x in own if _near(actual, _answer(case, [*(y.attention for y in x), *base]))), [])


def _answer(case: Case, mistakes: Iterable[type[Attention]]) -> Array | None:
    """What attention with these mistakes answers in float64; None if it cannot."""
    arguments = case.inputs()
    arguments |= {name: wide(arguments[name]) for name in NAMES if name in arguments}
    arguments.pop("is_causal", None)
    kinds = tuple(dict.fromkeys(mistakes))
    kinds = tuple(x for x in kinds if not any(issubclass(y, x) for y in kinds if y is not x))
    base = beyond.Attention if case.beyond else Attention
    try:
        return type("Wrong", (*kinds, base), {})()(**arguments)
    except (AssertionError, ValueError):  # shapes that do not fit, read in this way
        return None


def _near(actual: Array, expected: Array | None) -> bool:
    """Whether half the digits of float32 agree: far more than by chance, and more than any order of sums costs."""
    if expected is None or actual.shape != expected.shape:
        return False
    with np.errstate(all="ignore"):  # infinities are not near
        gap: float = np.max(np.abs(wide(actual) - wide(expected)), initial=0.0)
    return bool(gap <= EPS["float32"] ** 0.5 * max(1.0, np.max(np.abs(wide(expected)), initial=0.0)))


def _same(x: Array, y: Array) -> bool:
    return np.array_equal(wide(x), wide(y), equal_nan=True)


def _drops(weights: Array) -> bool:
    """Whether these are the right weights, but that some are zero and the others too large by one factor."""
    right = _answer(WEIGHTS, ())
    if right is None or weights.shape != right.shape:
        return False
    kept = weights != 0
    if not np.isfinite(weights).all():
        return False
    factors = (wide(weights) / right)[kept]
    same = factors.size > 0 and bool(np.ptp(factors) <= EPS["float32"] ** 0.5 * np.abs(factors).max())
    return same and not kept.all() and bool(factors.min() >= 1)


def _of_parameters(answers: Mapping[str, list[Outcome]]) -> Iterator[Diagnosis]:
    """What is to be said of names, from calls that a target did not take."""
    advice = dict.fromkeys(x.advice for outcomes in answers.values() for x in outcomes if x.advice)
    yield from (Diagnosis("parameter names", *x) for x in advice)
