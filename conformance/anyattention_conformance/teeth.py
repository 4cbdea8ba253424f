"""Whether the suite bites: every mutant is rejected in the group that must catch it, and the right one is accepted."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from anyattention_conformance import suite, targets
from anyattention_conformance.claims import QUANTITIES, Claims
from anyattention_conformance.mutants import MUTANTS, Mutant
from anyattention_conformance.oracles import Golden, Oracle
from anyattention_conformance.reference import attention
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

    @property
    def caught(self) -> bool:
        """Whether the verdict is right: a failure in its group, though not everywhere; or none, if nothing is wrong."""
        return self.group in self.groups and self.failed < self.total if self.group else not self.failed

    def __str__(self) -> str:
        by = f"{self.failed} of {self.total} fail, in {', '.join(self.groups)}" if self.failed else "accepted"
        return f"{'ok' if self.caught else 'WRONG':5} {self.contract} {self.name:34} {by}"


def score(mutant: Mutant, oracle: Oracle | None = None) -> Score:
    """Put one mutant through the smoke tier, in this process."""
    report = _report(mutant.attention, mutant.contract, oracle)
    return _score(mutant.name, mutant.what, mutant.group, report)


def scores(progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda each, total: each) -> Iterator[Score]:
    """The scores of all mutants, and of the right attention by both contracts."""
    oracle = Golden()
    for mutant in progress(MUTANTS, len(MUTANTS)):
        yield score(mutant, oracle)
    for contract in ("C2", "C3"):
        yield _score("none", "nothing is wrong", "", _report(attention, contract, oracle))


def _report(function: Callable[..., Any], contract: str, oracle: Oracle | None) -> Report:
    target = targets.make(function, "numpy")
    return suite.certify_here(target, suite.runs("smoke", contract), claims=Claims(contract=contract), oracle=oracle)


def _score(name: str, what: str, group: str, report: Report) -> Score:
    failures = report.failures
    groups = tuple(dict.fromkeys(result.group for result in failures))
    if failures and all(result.quantity in QUANTITIES.values() for result in failures):
        groups = ("gradients", *groups)
    return Score(name, what, group, report.contract, len(report.failures), len(report.results), groups)
