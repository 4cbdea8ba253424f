"""The suite: every case through a target, each answer against the oracle, by contract and claims."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import date
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from anyattention_conformance import budgets, probes
from anyattention_conformance.budgets import Comparison, c2, c3, other_meaning
from anyattention_conformance.case import ARGUMENTS, Case
from anyattention_conformance.cases import CASES
from anyattention_conformance.claims import QUANTITIES, Claims
from anyattention_conformance.frameworks import quiet
from anyattention_conformance.oracles import Golden, Live, Oracle
from anyattention_conformance.results import (
    ALL,
    BUG,
    CONFORMS,
    DECLARED,
    NOT_RUN,
    UNSUPPORTED,
    Diagnosis,
    Report,
    Result,
    Rows,
)
from anyattention_conformance.targets import Outcome, Target
from anyattention_conformance.truth import FLAX, Answer, truth

Array = Any
NO_VJP = "no attribute `vjp`"
TIERS = ("smoke", "full")
CONTRACTS = ("C1", "C2", "C3")


class Run(NamedTuple):
    """One case in one dtype, with or without its gradients."""

    case: Case
    dtype: str
    gradients: bool


class Expected(NamedTuple):
    """Flax's answer; the truth with the size of its sums, in the declared meaning, and in Flax's if that is another."""

    flax: Answer
    truth: Answer
    size: Answer
    usual: tuple[Answer, Answer] | None


def probing(supports: frozenset[str]) -> list[Run]:
    """The runs that show known mistakes."""
    return [Run(case, "float32", False) for case in probes.calls(supports)]


def runs(
    tier: str,
    contract: str = "C3",
    only: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    supports: Iterable[str] = (),
) -> list[Run]:
    """What a tier asks for; `only` are patterns of case ids or names of groups, which it then does not limit.

    What Flax lacks is asked for where `supports` has all words that a case needs of it.
    """
    only, dtypes, supports = tuple(only), tuple(dtypes), frozenset(supports)
    return [
        Run(case, dtype, gradients)
        for case in CASES
        if not only or any(fnmatchcase(case.id, x) or case.group == x for x in only)
        for dtype, gradients in case.runs("full" if only else tier)
        if (not dtypes or dtype in dtypes) and (not case.moot or contract != "C3") and case.beyond <= supports
    ]


def oracle_for(contract: str, name: str = "auto") -> Oracle:
    """The oracle of this name: "golden", "live", or "auto", live where bits are compared. OracleError without Flax."""
    if name == "golden" or (name == "auto" and contract != "C1"):
        return Golden()
    live = Live()
    live.name  # noqa: B018  it imports Flax
    return live


class Judge:
    """Compares outcomes with what is expected, by the contract and the claims of one target."""

    def __init__(self, oracle: Oracle, claims: Claims) -> None:
        self.oracle, self.claims = oracle, claims
        self.lacking: set[str] = set()  # words for what the target has no parameter for, and does not declare
        self._occurred: set[str] = set()
        self._exercised: set[str] = set()

    def results(self, run: Run, outcome: Outcome) -> list[Result]:
        """The verdict on every quantity of one run."""
        with quiet():
            found = [_of_whom(run, self._answered(run, x)) for x in self._results(run, outcome)]
        self._watch(run, found)
        return found

    def _answered(self, run: Run, result: Result) -> Result:
        """A result, with advice if it answers wrongly what it declares that it does not."""
        words = self.claims.refused(run.case, run.dtype)
        if result.verdict != BUG or result.kind != "answer" or not words:
            return result
        names = ", ".join(sorted(words))
        advice = f"{names} is declared unsupported, so it should raise: declare another answer under [[differs]]"
        return replace(result, message=f"{result.message}; {advice}")

    def _results(self, run: Run, outcome: Outcome) -> Iterator[Result]:
        case, dtype, gradients = run
        if not case.available(dtype):
            why = "NumPy has no bfloat16: pip install ml_dtypes"
            yield self._result(run, outcome, NOT_RUN, why)
            return
        result = self._result(run, outcome, BUG, outcome.message)
        flax = self.oracle.answer(case, dtype)
        if isinstance(flax, str):
            yield self._refusal(replace(result, quantity="error"), run, flax, outcome)
            return
        if outcome.kind == "impossible":
            yield replace(result, verdict=NOT_RUN)
            return
        if outcome.kind != "answer":
            refused = self.claims.refused(case, dtype) and outcome.kind in ("missing", "raised")
            if refused:
                yield replace(result, verdict=UNSUPPORTED)
            else:
                if outcome.kind == "missing":
                    flax_has = [name for name in outcome.names if name not in ARGUMENTS]
                    if not case.corner or self.claims.scope == ALL:
                        self.lacking |= set(map(_word, flax_has))
                    why = "and does not declare it unsupported" if flax_has else "which it is declared to support"
                    result = replace(result, message=f"{outcome.message}, {why}")
                yield self._declared(result, run)
            return
        expected = self._expected(run, flax, gradients and outcome.gradients is not None)
        yield self._judged(result, run, outcome.output, expected, "output")
        if not gradients:
            return
        if outcome.gradients is None:
            declared = "gradients" in self.claims.unsupported or NO_VJP in outcome.no_gradients
            verdict = UNSUPPORTED if declared or self.claims.refused(case, dtype) else BUG
            result = replace(result, quantity="dq", verdict=verdict, message=outcome.no_gradients)
            yield self._declared(result, run)
            return
        for name in expected.flax.gradients:
            quantity = replace(result, quantity=QUANTITIES[name])
            gradient = outcome.gradients.get(name)
            if gradient is None:
                yield self._declared(replace(quantity, message=f"no gradient of {name}"), run)
            else:
                yield self._judged(quantity, run, gradient, expected, name)

    @staticmethod
    def _result(run: Run, outcome: Outcome, verdict: str, message: str) -> Result:
        case = run.case
        about: dict[str, Any] = {"size": case.size, "seed": case.seed, "corner": case.corner, "kind": outcome.kind}
        return Result(case.id, case.group, run.dtype, "output", verdict, message, **about)

    def _refusal(self, result: Result, run: Run, error: str, outcome: Outcome) -> Result:
        """The verdict where Flax raises: so must the target; by contracts C1 and C2, the same class."""
        if outcome.kind == "answer":
            shape = outcome.output.shape
            result = replace(result, message=f"returned {shape} where Flax raises {error}")
        elif outcome.kind == "missing" and self.claims.refused(run.case, run.dtype):
            return replace(result, verdict=UNSUPPORTED, message=outcome.message)
        elif outcome.kind == "raised" and (self.claims.contract == "C3" or error in outcome.raised):
            return replace(result, verdict=CONFORMS, message="", contract="C2" if error in outcome.raised else "C3")
        elif outcome.kind == "raised":
            result = replace(result, message=f"{outcome.message}, where Flax raises {error}")
        return self._declared(result, run)

    def _expected(self, run: Run, flax: Answer, gradients: bool) -> Expected:
        arguments, dtype = run.case.inputs(run.dtype), run.case.compute_dtype(run.dtype)
        cotangent = run.case.cotangent(flax.output.shape, flax.output.dtype) if gradients else None
        usual = truth(arguments, dtype, cotangent)
        flax = flax if gradients else Answer(flax.output, {})
        if self.claims.meaning == FLAX:
            return Expected(flax, *usual, None)
        return Expected(flax, *truth(arguments, dtype, cotangent, self.claims.meaning), usual)

    def _judged(self, result: Result, run: Run, actual: Array, expected: Expected, name: str) -> Result:
        """The verdict on one array."""

        def of(answer: Answer) -> Array:
            return answer.output if name == "output" else answer.gradients[name]

        flax, right, size = (of(answer) for answer in expected[:3])
        usual = expected.usual and (of(expected.usual[0]), of(expected.usual[1]))
        changed = other_meaning(right, usual[0]) if usual else np.asarray(False)
        dtype = run.case.compute_dtype(run.dtype)
        if (actual.dtype, actual.shape) != (flax.dtype, flax.shape):
            message = f"{actual.dtype}{actual.shape} instead of {flax.dtype}{flax.shape}"
            return self._declared(replace(result, message=message, ratio=float("inf")), run)
        wanted = np.where(changed, right, flax.astype(np.float64)).astype(flax.dtype) if changed.any() else flax
        by = {"C3": c3(actual, flax, right, size, dtype, usual), "C1": budgets.same_bits(actual, wanted)}
        if name == "output" and run.case.exact and dtype in ("bfloat16", "float16"):
            by["C2"] = by["C1"]
        elif name == "output":
            by["C2"] = c2(actual, wanted, run.case.inputs(run.dtype), dtype)
        else:
            by["C2"] = budgets.same_nan(actual, wanted) or by["C3"]
        if run.case.beyond:  # Flax has no bits here
            by["C1"] = by["C2"]
        comparison = by[self.claims.contract]
        if not comparison.message and run.case.shows_weights and name == "output":
            comparison = _same_zeros(actual, flax) or comparison
        met = next((contract for contract in CONTRACTS[bool(run.case.beyond) :] if not by[contract].message), "")
        result = replace(
            result,
            verdict=CONFORMS if not comparison.message else BUG,
            message=comparison.message,
            contract=met if not comparison.message else "",
            ratio=comparison.ratio,
            error=by["C3"].error,
            flax_error=by["C3"].flax_error,
            rows=_rows(actual, wanted, comparison.worst) if comparison.message else None,
        )
        if result.verdict == BUG:
            return self._declared(result, run)
        if changed.any():
            self._occurred.add("meaning")
            return replace(result, verdict=DECLARED, message="; ".join(self.claims.sentences[:2]))
        return result

    def _declared(self, result: Result, run: Run) -> Result:
        """A result that is not Flax's: a bug, unless it is declared."""
        difference = self.claims.difference(run.case, run.dtype, result.quantity)
        if difference is None or result.verdict != BUG:
            return result
        self._occurred |= difference.claims(run.case)
        return replace(result, verdict=DECLARED, message=f"{difference.because} ({result.message})", rows=None)

    def _watch(self, run: Run, results: list[Result]) -> None:
        """Note which claims were put to the test, and which occurred.

        A word of `unsupported` is put to the test where nothing else that the case needs is unsupported.
        """
        refused = self.claims.refused(run.case, run.dtype)
        for result in results:
            if difference := self.claims.difference(run.case, run.dtype, result.quantity):
                self._exercised |= difference.claims(run.case)
            if NO_VJP in result.message:  # which says nothing of what the case needs
                continue
            of_output = result.quantity in ("output", "error")
            words = refused if of_output else refused | (self.claims.unsupported & {"gradients"})
            if result.verdict == UNSUPPORTED and len(words) == 1:
                self._occurred |= words
            if result.verdict != NOT_RUN and result.quantity != "error" and len(words) == 1:
                self._exercised |= words

    @property
    def never(self) -> list[str]:
        """Claims that did not come true, though they could have."""
        return sorted(self._exercised - self._occurred)

    @property
    def problems(self) -> list[str]:
        """The same in words."""
        raises = " (the target does not raise: drop the word, or declare another answer under [[differs]])"
        advice = dict.fromkeys(self.claims.unsupported, raises)
        return [f"declared, but did not occur: {x}{advice.get(x, '')}" for x in self.never]


def certify(
    name: str,
    framework: str,
    outcomes: Iterable[tuple[Run, Outcome]],
    chosen: list[Run],
    *,
    claims: Claims | None = None,
    oracle: Oracle | None = None,
    tier: str = "smoke",
    selection: Iterable[str] = (),
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda each, total: each,
) -> Report:
    """Judge the outcomes of the chosen runs, those of `selection`; `progress` wraps what is iterated over."""
    claims = claims or Claims()
    oracle = oracle or oracle_for(claims.contract)
    judge, found, start = Judge(oracle, claims), {}, time.perf_counter()
    probed: dict[str, list[Outcome]] = {}
    for run, outcome in progress(outcomes, len(chosen)):
        if run.case in (*probes.CALLS, *probes.BEYOND_CALLS):
            probed.setdefault(run.case.id, []).append(outcome)
        else:
            found[run.case.id, run.dtype] = judge.results(run, outcome)
    return Report(
        target=name,
        title=claims.title,
        framework=framework,
        contract=claims.contract,
        tier=tier,
        selection=list(selection),
        supports=sorted(claims.supports),
        scope=claims.scope,
        oracle=oracle.name,
        date=date.today().isoformat(),
        versions={},
        claims=claims.sentences,
        problems=judge.problems,
        diagnosis=[*probes.diagnose(probed), *_undeclared(judge.lacking)],
        results=[result for run in chosen for result in found[run.case.id, run.dtype]],
        seconds=time.perf_counter() - start,
    )


def certify_here(target: Target, chosen: list[Run], **options: Any) -> Report:
    """Certify a target in this process, with the options of `certify`."""
    supports = (options.get("claims") or Claims()).supports
    outcomes = ((run, target.run(*run)) for run in (*probing(supports), *chosen))
    report = certify(target.name, target.framework.name, outcomes, chosen, **options)
    return replace(report, **target.about)


def _undeclared(words: set[str]) -> list[Diagnosis]:
    """What is to be said of parameters that a target neither has nor declares."""
    if not words:
        return []
    cause = f"It has no parameter for {' and '.join(sorted(words))}, and does not declare so."
    return [Diagnosis("undeclared", cause, f"If this is meant, declare it: --unsupported {','.join(sorted(words))}")]


def _word(name: str) -> str:
    """The word of a claim for a parameter."""
    return "dropout" if "dropout" in name or name == "deterministic" else name


def _of_whom(run: Run, result: Result) -> Result:
    """A result whose message names the reference where this stands for Flax."""
    if not run.case.beyond:
        return result
    return replace(result, message=re.sub(r"\bFlax\b", "the reference", result.message))


def _same_zeros(actual: Array, flax: Array) -> Comparison | None:
    """Contract C4, where the output is the weights: zeros in the same places."""
    other = (actual == 0) != (flax == 0)
    if not other.any():
        return None
    at = tuple(int(i) for i in np.argwhere(other)[0])
    return Comparison(f"another dropout mask: {int(other.sum())} of {other.size} differ", float("inf"), worst=at)


def _rows(actual: Array, expected: Array, worst: tuple[int, ...] | None) -> Rows | None:
    if not worst:
        return None
    index = worst[:-1]
    return Rows(index, *(tuple(float(x) for x in np.ravel(array[index])) for array in (expected, actual)))
