"""What a run found: one result for each quantity of each case, and the report that holds them."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

CONFORMS = "conforms"
DECLARED = "differs as declared"
UNSUPPORTED = "unsupported"
BUG = "BUG"
NOT_RUN = "not run"
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
    size: int = 0  # elements of query, key and value: the smallest failing case is shown first
    seed: int = 0
    rows: Rows | None = None


@dataclass
class Report:
    """All results of one target. `problems` are claims that did not hold, and what else went wrong outside a case."""

    target: str
    framework: str
    contract: str  # what was asked for: C1, C2 or C3
    tier: str
    oracle: str  # which Flax, live or recorded
    date: str
    versions: dict[str, str]
    title: str = ""
    claims: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def conforms(self) -> bool:
        """Whether every result is as Flax or as declared, and every claim holds."""
        return not self.problems and not self.failures

    @property
    def compared(self) -> bool:
        """Whether any result was compared with Flax's."""
        return any(x.verdict not in (UNSUPPORTED, NOT_RUN) for x in self.results)

    @property
    def failures(self) -> list[Result]:
        """What failed, the smallest case first."""
        return sorted((x for x in self.results if x.verdict == BUG), key=lambda x: (x.size, x.case))

    def counts(self, group: str | None = None, dtype: str | None = None) -> dict[str, int]:
        """How many results have each verdict, of all or of one case group or dtype."""
        chosen = [x for x in self.results if group in (None, x.group) and dtype in (None, x.dtype)]
        return {verdict: sum(x.verdict == verdict for x in chosen) for verdict in VERDICTS}

    def to_json(self) -> str:
        """The report as JSON; numbers that JSON has no name for are strings."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote."""
        data = json.loads(text)
        data["results"] = [_result(x) for x in data["results"]]
        return cls(**data)


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
