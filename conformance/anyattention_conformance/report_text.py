"""A report as text: for a terminal, in colour where rich is installed, and as a table for a README.

What a cell of the table says, and how a failure is shown, is decided here for every kind of report.
"""

import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple, TextIO

from anyattention_conformance.results import (
    ALL,
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
ENTRIES = 16  # of a row of numbers, in a terminal
LEGEND = (
    "✓ every result is within its budget, with the worst error over budget; BUG n of m: n of m results are not; "
    "declared: differs as the target says it does."
)
MEANINGS = {  # of the marks in Markdown
    "✓": "every result has Flax's numbers",
    "n of m": "so many have, the rest is unsupported or not run unless marked",
    "differ": "unlike Flax, as the target declares",
    "✗": "at least one fails",
    DASH: "unsupported or not run",
}
STYLES = {CONFORMS: "green", DECLARED: "blue", UNSUPPORTED: "bright_black", BUG: "bold red", NOT_RUN: "bright_black"}
ASCII: dict[int, str] = str.maketrans(
    {"✓": "ok", "✗": "x", "≠": "!=", "∞": "inf", TIMES: "x", DASH: "-", "—": "-", "·": "-", "○": "o", "…": "..."}
)

STATUS = {"good": ("✓", "bold green"), "bad": ("✗", "bold red"), "none": ("○", "bold")}

Line = list[tuple[str, str]]  # text and its style


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
        words.append(_count(len(report.problems), "problem"))
    return ", ".join(words)


def about(report: Report) -> list[str]:
    """What ran: the tier or the selection of it, the contract, the framework and why it is this one, versions."""
    found = [f"{report.tier} tier", f"contract {report.contract}", f"against {report.oracle}", report.date]
    if report.selection:
        found[0] += f", selection of {_count(report.cases, 'case')}: {', '.join(report.selection)}"
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


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# For a terminal


def to_text(report: Report, *, width: int | None = None) -> str:
    """The report as plain text, `width` characters wide where it can be; None is the width of the terminal."""
    width = width or shutil.get_terminal_size().columns
    lines = [_text(x) for x in _heading(report, width)]
    lines += _grid([[text for text, _ in row] for row in _table(report)])
    lines += [_text(x) for x in _findings(report, width)]
    return "\n".join(lines) + "\n"


def to_short(report: Report, *, width: int | None = None) -> str:
    """The verdict on one case, what explains it, and for each result that fails the row that is worst."""
    width = width or shutil.get_terminal_size().columns
    mark = STATUS[status_of(report)][0]
    cases = ", ".join(dict.fromkeys(f"{clean(x.case)} in {clean(x.dtype)}" for x in report.results))
    lines = [f"{mark} {name_of(report)}: {cases} {'conforms' if report.conforms else 'differs'}, {report.contract}"]
    lines += [_text(x) for x in _diagnoses(report, width)]
    for result in report.results:
        over = over_budget(result)
        lines.append(f"  {clean(result.quantity)}: {result.verdict}" + (f", {over}" if over else ""))
        lines += [f"    {x}" for x in clean_lines(result.message)]
        if result.rows:
            lines += [_text(x) for x in _numbers(result.rows, width, "    ")]
    if corner := next((x.corner for x in report.results), ""):
        lines.append(f"  The case is a corner: {clean(corner)}.")
    return "\n".join(lines)


def print_report(report: Report, file: TextIO | None = None) -> None:
    """Write the report to a file or the terminal: with rich if it is installed, else as plain text."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        "".join(map(chr, ASCII)).encode(encoding)
    except UnicodeEncodeError:
        text = to_text(report).translate(ASCII)
        file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        file.write(to_text(report))
        return
    console = Console(file=file, highlight=False)
    width = console.width

    def write(lines: Iterable[Line]) -> None:
        for line in lines:
            console.print(Text.assemble(*line), soft_wrap=True)

    write(_heading(report, width))
    if report.results:
        header, *body = _table(report)
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for name in header:
            table.add_column(Text(*name))
        for row in body:
            table.add_row(*(Text(*x) for x in row))
        console.width = 10_000  # wider than the terminal is better than cut off; a table is as wide as it has to be
        console.print(table)
    write(_findings(report, width))


def _heading(report: Report, width: int) -> Iterator[Line]:
    yield [(name_of(report), "bold")]
    yield from _wrapped(" · ".join(about(report)), width, "", "bright_black")
    if report.diagnosis:
        yield []
    yield from _diagnoses(report, width)
    yield []


def _diagnoses(report: Report, width: int) -> Iterator[Line]:
    for diagnosis in report.diagnosis:
        yield from _wrapped(clean(diagnosis.cause), width, "  ", STYLES[BUG], first="✗ ")
        yield from _wrapped(clean(diagnosis.mend), width, "  ", "", first="  ")


def _table(report: Report) -> list[list[tuple[str, str]]]:
    dtypes, cells = dtypes_of(report), cells_of(report)
    if not cells:
        return []
    table = [[("", ""), *((clean(x), "bold") for x in dtypes)]]
    for group in groups_of([report]):
        row = [cells.get((group, dtype), Cell()) for dtype in dtypes]
        table.append([(clean(group), ""), *((x.text, STYLES.get(x.verdict, "")) for x in row)])
    return table


def _findings(report: Report, width: int) -> Iterator[Line]:
    if report.results:
        yield []
        yield from _wrapped(LEGEND, width, "", "bright_black")
        yield []
    whole = report.scope == ALL
    for group, results in failures_of(report, None if whole else False).items():
        yield from _failure(report, group, results, width)
        yield []
    for group, results in ({} if whole else failures_of(report, True)).items():
        yield from _corner(group, results, width)
    if not whole and failures_of(report, True):
        yield []
    for problem in report.problems:
        yield from _item("✗ ", problem, width, STYLES[BUG])
    for claim in report.claims:
        yield from _item("≠ declared: ", claim, width, STYLES[DECLARED])
    if report.problems or report.claims:
        yield []
    mark, style = STATUS[status_of(report)]
    yield [(f"{mark} {headline_of(report)}", style)]
    yield [(f"  {tally(report)}", "")]


def _corner(group: str, results: list[Result], width: int) -> Iterator[Line]:
    """Of a corner, what differs most simply, and why it is a corner."""
    first, more = results[0], f", and {len(results) - 1} more" if len(results) > 1 else ""
    what = " · ".join(clean(x) for x in (first.case, first.dtype, first.quantity, over_budget(first)) if x)
    yield [("corner ", STYLES[DECLARED]), (clean(group), "bold"), (f"  {what}{more}", "")]
    text = f"{clean(first.corner)}: {'; '.join(clean_lines(first.message))}"
    yield from _wrapped(text, width, "  ", "bright_black", first="  ")


def _failure(report: Report, group: str, results: list[Result], width: int) -> Iterator[Line]:
    first, indent = results[0], "  "
    what = " · ".join(clean(x) for x in (first.case, first.dtype, first.quantity, over_budget(first)) if x)
    yield [("BUG ", STYLES[BUG]), (clean(group), "bold"), (f"  {what}", "")]
    for line in clean_lines(first.message):
        yield from _wrapped(line, width, indent, "", first=indent)
    if first.rows:
        yield from _numbers(first.rows, width, indent)
    yield [(f"{indent}seed {first.seed}, {_count(first.size, 'element')}", "bright_black")]
    yield [(indent + reproduce_line(report, first), "cyan")]
    if len(results) > 1:
        yield [(f"{indent}and {len(results) - 1} more in this group", "bright_black")]


def _numbers(rows: Rows, width: int, indent: str) -> Iterator[Line]:
    """Expected above actual, and a mark below each pair that differs."""
    label, entries = excerpt(rows, ENTRIES)
    yield [(f"{indent}row {label}", "bright_black")]
    cell = 2 + max((len(text) for x in entries for text in x[:2]), default=0)
    columns = max(1, (width - len(indent) - 8) // cell)
    for start in range(0, len(entries), columns):
        part = entries[start : start + columns]
        yield [(f"{indent}expected", "bright_black"), *((x.expected.rjust(cell), "") for x in part)]
        yield [
            (f"{indent}actual  ", "bright_black"),
            *((x.actual.rjust(cell), "bold red" if x.differs else "") for x in part),
        ]
        marks = "".join(("^" * len(x.actual) if x.differs else "").rjust(cell) for x in part)
        if marks.strip():
            yield [(f"{indent}{' ' * 8}{marks}".rstrip(), "red")]


def _item(mark: str, text: str, width: int, style: str) -> Iterator[Line]:
    for i, line in enumerate(clean_lines(text)):
        yield from _wrapped(line, width, "  ", style, first="  " if i else mark)


def _wrapped(text: str, width: int, indent: str, style: str, *, first: str = "") -> Iterator[Line]:
    for line in textwrap.wrap(text, max(width, 20), initial_indent=first, subsequent_indent=indent):
        yield [(line, style)]


def _text(line: Line) -> str:
    return "".join(text for text, _ in line)


def _grid(table: list[list[str]]) -> list[str]:
    """Rows of cells as aligned lines; a cell may have several lines."""
    rows = [[cell.split("\n") for cell in row] for row in table]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        for line in zip_longest(*row, fillvalue=""):
            padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
            lines.append("   ".join(padded).rstrip())
    return lines


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
