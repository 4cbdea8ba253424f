"""A report for a terminal: in colour where rich is installed, else as plain text."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import TextIO

from anyattention_conformance.report_text import (
    ASCII,
    STATUS,
    Cell,
    about,
    cells_of,
    clean,
    clean_lines,
    count_of,
    dtypes_of,
    excerpt,
    failures_of,
    groups_of,
    headline_of,
    name_of,
    over_budget,
    reproduce_line,
    status_of,
    tally,
)
from anyattention_conformance.results import ALL, BUG, CONFORMS, DECLARED, NOT_RUN, UNSUPPORTED, Report, Result, Rows

ENTRIES = 16  # of a row of numbers
STYLES = {CONFORMS: "green", DECLARED: "blue", UNSUPPORTED: "bright_black", BUG: "bold red", NOT_RUN: "bright_black"}
LEGEND = (
    "✓ every result is within its budget, with the worst error over budget; BUG n of m: n of m results are not; "
    "declared: differs as the target says it does."
)

Line = list[tuple[str, str]]  # text and its style


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
    yield [(f"{indent}seed {first.seed}, {count_of(first.size, 'element')}", "bright_black")]
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
