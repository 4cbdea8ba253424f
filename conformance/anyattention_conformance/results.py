"""What a run found: one result for each quantity of each case, and the report that holds them.

There are two verdicts, on the calls that ordinary models make and on corners (`Case.corner` says why a case is one).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

CONFORMS = "conforms"
DECLARED = "differs as declared"
UNSUPPORTED = "unsupported"
BUG = "BUG"
NOT_RUN = "not run"
ORDINARY, ALL = SCOPES = ("ordinary", "all")
FAR = 10.0  # times the budget
VERDICTS = (CONFORMS, DECLARED, UNSUPPORTED, BUG, NOT_RUN)


@dataclass(frozen=True)
class Rows:
    """The row in which an answer is furthest from what was expected."""

    index: tuple[int, ...]
    expected: tuple[float, ...]
    actual: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """The verdict on one quantity (the output, a gradient, an error) of one case in one dtype.

    `ratio` is error over budget, `error` and `flax_error` are the target's and Flax's own, against the truth in
    float64, in units of what was summed; all three are None where nothing was compared. `contract` is the strictest
    contract that the numbers meet: C1, C2, C3, or the empty string.
    """

    case: str
    group: str
    dtype: str
    quantity: str
    verdict: str
    message: str = ""
    contract: str = ""
    ratio: float | None = None
    error: float | None = None
    flax_error: float | None = None
    size: int = 0  # elements of query, key and value
    seed: int = 0
    rows: Rows | None = None
    corner: str = ""  # why the case is a corner; empty if ordinary models make such calls
    kind: str = "answer"  # what the target did with the case: the kind of its `Outcome`

    @property
    def weight(self) -> int:
        """How bad a failure is: 3 without a number, 2 far off, 1 less far, 0 for lack of a parameter."""
        if self.kind == "missing":
            return 0
        if self.ratio is None or not self.ratio < math.inf:
            return 3
        return 2 if self.ratio > FAR else 1


@dataclass(frozen=True)
class Diagnosis:
    """A mistake that explains the answers of a target: what it does wrong, and what mends it."""

    probe: str  # the name of the mistake
    cause: str
    mend: str


@dataclass(frozen=True)
class Part:
    """What the results of ordinary calls, or those of corners, come to."""

    counts: dict[str, int]

    @property
    def total(self) -> int:
        """How many results there are."""
        return sum(self.counts.values())

    @property
    def compared(self) -> bool:
        """Whether any result was compared with Flax's."""
        return any(n for verdict, n in self.counts.items() if verdict not in (UNSUPPORTED, NOT_RUN))

    @property
    def failed(self) -> int:
        """How many results fail."""
        return self.counts[BUG]

    @property
    def conforms(self) -> bool:
        """Whether something was compared, and nothing failed."""
        return self.compared and not self.failed


@dataclass
class Report:
    """All results of one target.

    `selection` is what was chosen of a tier: such a report says nothing of the rest, and never that the target
    conforms. `scope` says which failures count: those of "ordinary" calls, or "all". `problems` are claims that did not
    come true; they count always.
    """

    target: str
    framework: str
    contract: str  # what was asked for: C1, C2 or C3
    tier: str  # the tier that ran
    oracle: str  # which Flax, live or recorded
    date: str
    versions: dict[str, str]
    title: str = ""
    claims: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    selection: list[str] = field(default_factory=list)  # patterns, groups and dtypes; empty if the whole tier ran
    scope: str = ALL
    inferred: str = ""  # why this framework; empty if it was asked for
    diagnosis: list[Diagnosis] = field(default_factory=list)  # the surest first
    supports: list[str] = field(default_factory=list)  # words for what Flax lacks, and the target was asked for
    offers: list[str] = field(default_factory=list)  # those that its parameters show

    @property
    def ordinary(self) -> Part:
        """What the calls that ordinary models make come to."""
        return Part(count(x for x in self.results if not x.corner))

    @property
    def corners(self) -> Part:
        """What all other calls come to."""
        return Part(count(x for x in self.results if x.corner))

    @property
    def _counting(self) -> Part:
        return self.ordinary if self.scope == ORDINARY else Part(self.counts())

    @property
    def conforms(self) -> bool:
        """Whether every result is as Flax or as declared, and every claim holds."""
        return not self.problems and not self.failures

    @property
    def passes(self) -> bool:
        """Whether nothing fails that counts by the scope; the exit status is 0."""
        return self.compared and not self.problems and not self._counting.failed

    @property
    def compared(self) -> bool:
        """Whether anything that counts by the scope was compared with Flax's."""
        return self._counting.compared

    @property
    def exit_status(self) -> int:
        """0 if the target passes, 1 if it does not, 2 if nothing was compared."""
        return 0 if self.passes else 1 if self.compared or self.problems else 2

    @property
    def cases(self) -> int:
        """The number of cases."""
        return len({x.case for x in self.results})

    @property
    def verdict(self) -> str:
        """The verdict in a sentence, to follow the target's name."""
        if not self.compared and not self.problems:
            return "was not compared with anything"
        if self.selection:
            noun = "case" if self.cases == 1 else "cases"
            return f"selection of {self.cases} {noun} {'passes' if self.passes else 'fails'}"
        if self.conforms:
            return f"conforms to {self.contract}"
        ordinary, corners, problems = self.ordinary, self.corners, len(self.problems)
        differ = f"corners: {corners.failed} of {corners.total} differ" if corners.failed else ""
        if self.passes:
            return f"ordinary calls conform to {self.contract}; {differ}"
        found = [
            f"ordinary calls: {ordinary.failed} of {ordinary.total} results fail" if ordinary.failed else "",
            "ordinary calls conform" if ordinary.conforms else "",
            differ,
            f"{problems} {'claim' if problems == 1 else 'claims'} did not come true" if problems else "",
        ]
        return f"does not conform to {self.contract}: {'; '.join(filter(None, found))}"

    @property
    def failures(self) -> list[Result]:
        """What failed: ordinary calls first, of them the worst group, or else the simplest; in it the smallest case."""
        failed = [x for x in self.results if x.verdict == BUG]
        worst: dict[tuple[bool, str], int] = {}  # groups come in the order of the suite, the simplest first
        for x in failed:
            place = bool(x.corner), x.group
            worst[place] = max(worst.get(place, 0), x.weight)
        order = sorted(worst, key=lambda place: (place[0], -worst[place]))
        return sorted(failed, key=lambda x: (order.index((bool(x.corner), x.group)), not x.weight, x.size, x.case))

    def counts(self, group: str | None = None, dtype: str | None = None) -> dict[str, int]:
        """How many results have each verdict, of all or of one case group or dtype."""
        return count(x for x in self.results if group in (None, x.group) and dtype in (None, x.dtype))

    def to_json(self) -> str:
        """The report as JSON, with the verdict; numbers that JSON has no name for are strings."""
        verdict = {"sentence": self.verdict, "passes": self.passes, "exit_status": self.exit_status}
        verdict |= {"ordinary": self.ordinary.counts, "corners": self.corners.counts}
        return json.dumps(_plain({"verdict": verdict} | asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote."""
        data = json.loads(text)
        data.pop("verdict", None)
        data["results"] = [_result(x) for x in data["results"]]
        data["diagnosis"] = [Diagnosis(**x) for x in data.get("diagnosis", [])]
        return cls(**data)


def count(results: Iterable[Result]) -> dict[str, int]:
    """How many results have each verdict."""
    found = Counter(x.verdict for x in results)
    return {verdict: found[verdict] for verdict in VERDICTS}


def _result(data: dict[str, Any]) -> Result:
    for name in ("ratio", "error", "flax_error"):
        data[name] = None if data[name] is None else float(data[name])
    if data["rows"]:
        rows = data["rows"]
        numbers = {name: tuple(float(x) for x in rows[name]) for name in ("expected", "actual")}
        data["rows"] = Rows(index=tuple(rows["index"]), **numbers)
    return Result(**data)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not abs(x) < float("inf"):
        return str(x)
    return x
