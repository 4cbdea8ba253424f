"""What every kind of report says of results: cells, failures, numbers, names; and a table in Markdown.

What a cell of the table says, and how a failure is shown, is decided here for every kind of report.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from anyattention_conformance.results import (
    BUG,
    CONFORMS,
    DECLARED,
    NOT_RUN,
    UNSUPPORTED,
    VERDICTS,
    Report,
    Result,
    Rows,
)

PRECEDENCE = (BUG, CONFORMS, DECLARED, UNSUPPORTED, NOT_RUN)  # which verdict a cell is named after
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
DTYPES = ("float32", "bfloat16", "float16", "float64")
MEANINGS = {  # of the marks in Markdown
    "✓": "every result has Flax's numbers",
    "n of m": "so many have, the rest is unsupported or not run unless marked",
    "differ": "unlike Flax, as the target declares",
    "✗": "at least one fails",
    DASH: "unsupported or not run",
}
ASCII: dict[int, str] = str.maketrans(
    {"✓": "ok", "✗": "x", "≠": "!=", "∞": "inf", TIMES: "x", DASH: "-", "—": "-", "·": "-", "○": "o", "…": "..."}
)

STATUS = {"good": ("✓", "bold green"), "bad": ("✗", "bold red"), "none": ("○", "bold")}


# What a report comes to


@dataclass(frozen=True)
class Cell:
    """What the results of one case group come to: the verdict that counts, and the result that is worst in it."""

    verdict: str = ""
    worst: Result | None = None
    ratio: float | None = None
    total: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS, 0))

    @property
    def others(self) -> dict[str, int]:
        """How many results have another verdict."""
        return {x: n for x, n in self.counts.items() if n and x != self.verdict}

    @property
    def text(self) -> str:
        """The cell of a table: the verdict, and below it how many results have another."""
        if not self.worst:
            return ""
        worst = "" if self.ratio is None else f" {short(self.ratio)}"
        names = {CONFORMS: f"✓{worst}", DECLARED: "declared", BUG: f"BUG {self.counts[BUG]} of {self.total}"}
        others = [f"{n} {names.get(x, x)}" for x, n in self.others.items() if x != CONFORMS]
        return "\n".join([names.get(self.verdict, self.verdict), *others])


def ratio_of(result: Result) -> float | None:
    """Error over budget, or None where there is no such number."""
    return None if result.ratio is None or math.isnan(result.ratio) else result.ratio


def summarize(results: Iterable[Result]) -> Cell:
    """One cell for these results."""
    results = list(results)
    counts = {verdict: sum(x.verdict == verdict for x in results) for verdict in VERDICTS}
    verdict = next((x for x in PRECEDENCE if counts[x]), "")
    if not verdict:
        return Cell()

    def badness(result: Result) -> tuple[float, int]:
        ratio = ratio_of(result)
        return (-1.0 if ratio is None else ratio, -result.size)

    worst = max((x for x in results if x.verdict == verdict), key=badness)
    return Cell(verdict, worst, ratio_of(worst), len(results), counts)


def groups_of(reports: Iterable[Report]) -> list[str]:
    """The case groups, in the order in which they first appear."""
    return list(dict.fromkeys(x.group for report in reports for x in report.results))


def dtypes_of(report: Report) -> list[str]:
    """The dtypes of a report, those that everyone knows first."""
    found = dict.fromkeys(x.dtype for x in report.results)
    return sorted(found, key=lambda x: DTYPES.index(x) if x in DTYPES else len(DTYPES))


def cells_of(report: Report) -> dict[tuple[str, str], Cell]:
    """The cell of every case group and dtype that has results."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in report.results:
        found.setdefault((result.group, result.dtype), []).append(result)
    return {place: summarize(results) for place, results in found.items()}


def failures_of(report: Report, corners: bool | None = None) -> dict[str, list[Result]]:
    """What failed, by case group, in the order of `Report.failures`; of ordinary calls or of corners alone if asked."""
    found: dict[str, list[Result]] = {}
    for result in report.failures:
        if corners in (None, bool(result.corner)):
            found.setdefault(result.group, []).append(result)
    return found


def name_of(report: Report) -> str:
    """What the target is called."""
    return clean(report.title or report.target)


def status_of(report: Report) -> str:
    """Good, bad, or none: where nothing was compared, nothing is good."""
    return ("good", "bad", "none")[report.exit_status]


def verdict_of(report: Report) -> str:
    """The verdict in a few words, to follow the target's name."""
    return clean(report.verdict)


def headline_of(report: Report) -> str:
    """The target's name and the verdict, as one sentence."""
    verdict = verdict_of(report)
    joint = " " if verdict.startswith(("conforms", "does not", "was not")) else ": "
    return f"{name_of(report)}{joint}{verdict}"


def tally(report: Report) -> str:
    """How many results have each verdict, in words."""
    counts = report.counts()
    words = [f"{counts[CONFORMS]} of {len(report.results)} results conform"]
    for verdict, word in ((BUG, "fail"), (DECLARED, "differ as declared"), (UNSUPPORTED, ""), (NOT_RUN, "")):
        if counts[verdict]:
            words.append(f"{counts[verdict]} {word or verdict}")
    if report.problems:
        words.append(count_of(len(report.problems), "problem"))
    return ", ".join(words)


def about(report: Report) -> list[str]:
    """What ran: the tier or the selection of it, the contract, the framework and why it is this one, versions."""
    found = [f"{report.tier} tier", f"contract {report.contract}", f"against {report.oracle}", report.date]
    if report.selection:
        found[0] += f", selection of {count_of(report.cases, 'case')}: {', '.join(report.selection)}"
    if report.supports:
        found.append(f"beyond Flax: {', '.join(report.supports)}")
    if more := [x for x in report.offers if x not in report.supports]:
        found.append(f"not asked: {', '.join(more)}, which --supports asks for")
    if report.inferred:
        found.append(f"framework {report.framework}, inferred: {report.inferred}")
    found += [f"{name} {version}" for name, version in report.versions.items()]
    return [clean(x) for x in found if x]


# Numbers and names


class Entry(NamedTuple):
    """One number of a row, expected and actual, and whether they differ."""

    expected: str
    actual: str
    differs: bool


class Excerpt(NamedTuple):
    """The part of a row around its worst number."""

    label: str
    entries: list[Entry]


def short(ratio: float) -> str:
    """Error over budget in at most five characters."""
    if math.isinf(ratio):
        return "∞"
    if ratio >= 9999.5:
        return re.sub(r"e\+0*", "e", f"{ratio:.0e}")
    if ratio >= 9.95:
        return f"{ratio:.0f}"
    if ratio >= 0.995:
        return f"{ratio:.1f}"
    return "<.01" if 0 < ratio < 0.005 else f"{ratio:.2f}"


def over_budget(result: Result) -> str:
    """The error of a result in units of its budget, in words; empty where nothing was measured."""
    ratio = ratio_of(result)
    return "" if ratio is None else f"{short(ratio)} {TIMES} budget"


def excerpt(rows: Rows, limit: int) -> Excerpt:
    """At most `limit` numbers of a row, with as many digits as it takes to see a difference."""
    pairs = list(zip_longest(rows.expected, rows.actual))
    worst = max(range(len(pairs)), key=lambda i: _gap(*pairs[i]), default=0)
    start = max(0, min(worst - limit // 2, len(pairs) - limit))
    shown = pairs[start : start + limit]
    entries: list[Entry] = []
    for digits in (4, 6, 9, 17):
        texts = [(_number(a, digits), _number(b, digits)) for a, b in shown]
        entries = [Entry(a, b, a != b) for a, b in texts]
        if any(x.differs for x in entries):
            break
    label = f"[{', '.join([*map(str, rows.index), ':'])}]"
    if len(shown) < len(pairs):
        label += f", entries {start} to {start + len(shown) - 1} of {len(pairs)}"
    return Excerpt(label, entries)


def reproduce_line(report: Report, result: Result) -> str:
    """One line of Python that runs the case again."""
    case = ", ".join(_literal(x) for x in (report.target, result.case, result.dtype))
    contract = "" if report.contract == "C3" else f", contract={_literal(report.contract)}"
    call = f"reproduce({case}, framework={_literal(report.framework)}{contract})"
    return f"from anyattention_conformance import reproduce; {call}"


def clean(text: str) -> str:
    """One line of text from a target, with what could steer a terminal or deceive the eye written as escapes."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def clean_lines(text: str) -> list[str]:
    """The lines of a longer text from a target, each as `clean` has it."""
    return [clean(line) for line in text.splitlines()]


def _literal(text: str) -> str:
    return clean(json.dumps(text, ensure_ascii=False))


def _number(x: float | None, digits: int) -> str:
    if x is None:
        return ""
    return "NaN" if math.isnan(x) else f"{x:.{digits}g}"


def _gap(expected: float | None, actual: float | None) -> float:
    if expected is None or actual is None or math.isnan(expected) != math.isnan(actual):
        return math.inf
    if expected == actual or math.isnan(expected):
        return 0.0
    return abs(expected - actual)


def count_of(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# For a README


def to_markdown(reports: list[Report]) -> str:
    """The reports as one table in Markdown, case groups down and targets across, with what its marks mean."""
    rows = [["", *(_escaped(name_of(x)) for x in reports)], ["---"] * (len(reports) + 1)]
    for group in groups_of(reports):
        cells = (summarize(x for x in report.results if x.group == group) for report in reports)
        rows.append([_escaped(clean(group)), *map(_mark, cells)])
    used = "\n".join(text for row in rows[2:] for text in row[1:])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if used.strip():
        lines += ["", f"{'; '.join(f'{mark}: {x}' for mark, x in MEANINGS.items() if _uses(used, mark))}."]
    return "\n".join(lines) + "\n"


def _mark(cell: Cell) -> str:
    conform, declared = cell.counts[CONFORMS], cell.counts[DECLARED]
    if not cell.total:
        return ""
    if cell.verdict == BUG:
        return f"✗ {conform} of {cell.total}"
    if conform == cell.total:
        return "✓"
    if conform:
        return f"{conform} of {cell.total}" + (f", {declared} differ" if declared else "")
    return "differs" if declared else DASH


def _uses(text: str, mark: str) -> bool:
    return mark.replace("n of m", " of ") in text


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))
