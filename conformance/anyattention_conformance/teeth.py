"""Whether the suite bites: every mutant is rejected in the group that must catch it, and the right one is accepted."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from anyattention_conformance import beyond, reference, suite, targets
from anyattention_conformance.case import BEYOND
from anyattention_conformance.claims import QUANTITIES, Claims
from anyattention_conformance.mutants import MUTANTS, Mutant
from anyattention_conformance.oracles import Golden, Oracle
from anyattention_conformance.results import Report


@dataclass(frozen=True)
class Score:
    """What the smoke tier said of one attention."""

    name: str
    what: str
    group: str  # that must catch it; empty for the right attention
    contract: str
    failed: int
    total: int
    groups: tuple[str, ...]  # in which results fail
    case: str = ""  # that must catch it, where one is named
    cases: frozenset[str] = frozenset()  # whose results fail

    @property
    def caught(self) -> bool:
        """Whether the verdict is right: a failure in its group, though not everywhere; or none, if nothing is wrong."""
        if not self.group:
            return not self.failed
        return self.group in self.groups and self.failed < self.total and (not self.case or self.case in self.cases)

    def __str__(self) -> str:
        by = f"{self.failed} of {self.total} fail, in {', '.join(self.groups)}" if self.failed else "accepted"
        by += f"; {self.case} {'is' if self.case in self.cases else 'is not'} among them" if self.case else ""
        return f"{'ok' if self.caught else 'WRONG':5} {self.contract} {self.name:34} {by}"


def score(mutant: Mutant, oracle: Oracle | None = None) -> Score:
    """Put one mutant through the smoke tier, in this process."""
    report = _report(mutant.attention, mutant.contract, oracle)
    return replace(_score(mutant.name, mutant.what, mutant.group, report), case=mutant.case)


def scores(progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda each, total: each) -> Iterator[Score]:
    """The scores of all mutants, and of the right attention by both contracts."""
    oracle = Golden()
    for mutant in progress(MUTANTS, len(MUTANTS)):
        yield score(mutant, oracle)
    for contract in ("C2", "C3"):
        for right in (reference.attention, beyond.attention):
            yield _score("none", "nothing is wrong", "", _report(right, contract, oracle))


def _report(function: Callable[..., Any], contract: str, oracle: Oracle | None) -> Report:
    target = targets.make(function, "numpy")
    claims = Claims(contract=contract, supports=BEYOND if isinstance(function, beyond.Attention) else frozenset())
    chosen = suite.runs("smoke", contract, supports=claims.supports)
    if claims.supports:  # on all other calls it is the reference
        chosen = [run for run in chosen if run.case.beyond]
    return suite.certify_here(target, chosen, claims=claims, oracle=oracle)


def _score(name: str, what: str, group: str, report: Report) -> Score:
    failures = report.failures
    groups = tuple(dict.fromkeys(result.group for result in failures))
    if failures and all(result.quantity in QUANTITIES.values() for result in failures):
        groups = ("gradients", *groups)
    cases = frozenset(result.case for result in failures)
    return Score(name, what, group, report.contract, len(failures), len(report.results), groups, cases=cases)
