"""Reports as one HTML page, which needs no network, and no script but to copy lines."""

import base64
import hashlib
import math
import re
from bisect import bisect_left
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Any, NamedTuple

from anyattention_conformance import report_plot
from anyattention_conformance.report_plot import SLUGS
from anyattention_conformance.report_text import (
    DASH,
    STATUS,
    TIMES,
    Cell,
    Excerpt,
    about,
    cells_of,
    clean,
    clean_lines,
    dtypes_of,
    excerpt,
    failures_of,
    groups_of,
    headline_of,
    name_of,
    over_budget,
    reproduce_line,
    short,
    status_of,
    tally,
)
from anyattention_conformance.results import (
    BUG,
    CONFORMS,
    DECLARED,
    NOT_RUN,
    UNSUPPORTED,
    VERDICTS,
    Part,
    Report,
    Result,
)

STEPS = (0.5, 1.0, 2.0, 10.0, math.inf)  # a colour for each, up to this much of the budget
MOST = 1000.0  # of an error over budget that is written out
ENTRIES = 64  # of a row of numbers
MARKS = {CONFORMS: "✓", DECLARED: "≠", UNSUPPORTED: DASH, BUG: "✗", NOT_RUN: "○"}
WORDS = {CONFORMS: "conform", DECLARED: "differ as declared", BUG: "fail"}
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
ROOM = 8  # columns of dtypes for which full names have room
NARROW, WIDE = 3, 16  # columns beyond which the table scrolls on a phone, and everywhere
PART = "◐"  # the mark of a selection that passes
CONTRACTS = {
    "C1": "the operations of Flax and no others; output and gradients equal bit for bit",
    "C2": "Flax's steps in the same order and dtypes; each row within eps (1 + κ) max Σ w |v| of Flax, κ the size of "
    "the logits' terms",
    "C3": "against the same formula in float64, maximum and rms error of output and gradients are at most twice Flax's "
    "own, plus 4 eps",
}


def to_html(reports: list[Report]) -> str:
    """One self-contained page about these reports, side by side."""
    reports = sorted(reports, key=_weight)
    columns = sum(len(dtypes_of(x)) for x in reports)
    shared = _shared(reports)
    panels = report_plot.panels(reports)
    return render(
        "report.html.j2",
        title=_title(reports),
        contracts={x: CONTRACTS[x] for x in sorted({x.contract for x in reports}) if x in CONTRACTS},
        all_contracts=CONTRACTS,
        shared=shared,
        targets=[_target(i, x, shared) for i, x in enumerate(reports)],
        heat=_heat(reports),
        roomy=columns <= ROOM,
        scrolls=" wide wider" if columns > WIDE else " wide" if columns > NARROW else "",
        short_names=SHORT if columns > ROOM else {},
        legend=_legend(),
        panels=panels,
        clipped=report_plot.clipped(panels),
        left=report_plot.LEFT,
        top=report_plot.TOP,
        size=report_plot.SIZE,
        lane=report_plot.LANE,
    )


def render(template: str, **values: Any) -> str:
    """A page of the kit: a template of this package, with its style sheet and its script."""
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise RuntimeError('the HTML report needs jinja2: pip install "anyattention[conform]"') from error

    def read(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text("utf-8")

    def breakable(name: str) -> str:
        """A name that may be broken where its parts meet."""
        return markupsafe.Markup(re.sub(r"([._/:])(?=.)", r"\1<wbr>", str(markupsafe.escape(name))))

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": clean, "clean_lines": _clean_lines, "breakable": breakable}
    script = read("report.js").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = {"style": markupsafe.Markup(read("report.css")), "script": markupsafe.Markup(script), "digest": digest}
    return environment.get_template(template).render(**page, **values)


def _weight(report: Report) -> tuple[int, int]:
    """Where a target stands among others: what fails comes first, of that what fails in most ordinary calls."""
    return ("bad", "none", "good").index(status_of(report)), -report.ordinary.failed


def _title(reports: list[Report]) -> str:
    if len(reports) == 1:
        return headline_of(reports[0])
    whole = [x for x in reports if not x.selection]
    good, chosen = sum(x.passes for x in whole), len(reports) - len(whole)
    text = f"{good} of {len(whole)} targets conform{'s' if good == 1 else ''}"
    return f"{text}, beside {chosen} selection{'' if chosen == 1 else 's'} of cases" if chosen else text


# The targets


@dataclass(frozen=True)
class _Target:
    """What the page says of one target."""

    id: str
    name: str
    report: Report
    status: str  # good, part, bad or none: a class of the style sheet
    mark: str
    verdict: str
    but: str  # what is beside the verdict: unsupported results and claims
    tally: str
    ring: str  # the shares of verdicts, as a gradient
    parts: list["_Part"]
    facts: list[str]
    dtypes: list[str]
    ordinary: list["_Group"]
    corners: list["_Group"]
    worst: list["_Worst"]

    @property
    def headline(self) -> str:
        """The verdict, to follow the name."""
        return (
            f" {self.verdict}" if self.verdict.startswith(("conforms", "does not", "was not")) else f": {self.verdict}"
        )

    @property
    def failures(self) -> list["_Group"]:
        """All groups that fail, ordinary calls first."""
        return self.ordinary + self.corners


class _Part(NamedTuple):
    """Ordinary calls or corners: their number, and the shares of verdicts, as class, number and words."""

    name: str
    total: int
    shares: list[tuple[str, int, str]]


class _Group(NamedTuple):
    """The failures of one case group."""

    id: str
    name: str
    first: "_Failure"
    rest: list["_Failure"]


class _Failure(NamedTuple):
    """One failure, in words."""

    result: Result
    message: str
    over: str
    reproduce: str
    numbers: "_Numbers | None"


class _Numbers(NamedTuple):
    """A row of numbers, and which of them stand out."""

    excerpt: Excerpt
    stands_out: list[bool]


class _Worst(NamedTuple):
    """What is behind a cell of the table."""

    group: str
    dtype: str
    counts: str
    result: Result
    over: str


def _shared(reports: list[Report]) -> list[str]:
    """What is the same for all of several targets: it is said once."""
    return [x for x in about(reports[0]) if all(x in about(other) for other in reports)] if len(reports) > 1 else []


def _target(index: int, report: Report, shared: list[str]) -> _Target:
    counts, status = report.counts(), status_of(report)
    groups = groups_of([report])
    return _Target(
        id=f"t{index}",
        name=name_of(report),
        report=report,
        status="part" if status == "good" and report.selection else status,
        mark=PART if status == "good" and report.selection else STATUS[status][0],
        verdict=clean(re.split(r": |; ", report.verdict, maxsplit=1)[0]),
        but=_but(report, counts),
        tally=tally(report),
        ring="var(--line)" if status == "good" and report.selection else _ring(counts),
        parts=[_part(*x) for x in (("ordinary calls", report.ordinary), ("corners", report.corners)) if x[1].total],
        facts=[x for x in about(report) if x not in shared],
        dtypes=[clean(x) for x in dtypes_of(report)],
        ordinary=_groups(index, report, groups, False),
        corners=_groups(index, report, groups, True),
        worst=_behind(report),
    )


def _but(report: Report, counts: dict[str, int]) -> str:
    """What takes from a verdict: "60 of 145 results unsupported, 2 declared differences"."""
    corners = report.corners
    found = [f"{corners.failed} of {corners.total} corners differing"] if report.passes and corners.failed else []
    found += [f"{counts[UNSUPPORTED]} of {len(report.results)} results unsupported"] if counts[UNSUPPORTED] else []
    found += [f"{counts[NOT_RUN]} not run"] if counts[NOT_RUN] else []
    claims = [x for x in report.claims if not x.startswith("unsupported: ")]
    found += [f"{len(claims)} declared difference{'' if len(claims) == 1 else 's'}"] if claims else []
    return ", ".join(found)


def _ring(counts: dict[str, int]) -> str:
    """A conic gradient of the shares, each at least as wide as can be seen."""
    order = [x for x in (CONFORMS, DECLARED, UNSUPPORTED, NOT_RUN, BUG) if counts[x]]
    total, at, stops = sum(counts.values()), 0.0, []
    for verdict in order:
        end = at + 100 * counts[verdict] / total
        stops.append(f"var(--{SLUGS[verdict]}) {at:.1f}% {end:.1f}%")
        at = end
    return f"conic-gradient({', '.join(stops)})" if stops else "var(--line)"


def _part(name: str, part: Part) -> _Part:
    shares = [(SLUGS[x], part.counts[x], f"{part.counts[x]} {WORDS.get(x, x)}") for x in VERDICTS if part.counts[x]]
    return _Part(name, part.total, shares)


def _groups(index: int, report: Report, groups: list[str], corners: bool) -> list[_Group]:
    kind = "c" if corners else "g"
    return [
        _Group(_anchor(index, groups, group, kind), clean(group), *_split(report, results))
        for group, results in failures_of(report, corners).items()
    ]


def _split(report: Report, results: list[Result]) -> tuple[_Failure, list[_Failure]]:
    first, *rest = (_failure(report, x) for x in results)
    return first, rest


def _failure(report: Report, result: Result) -> _Failure:
    numbers = _numbers(excerpt(result.rows, ENTRIES)) if result.rows else None
    over = over_budget(result) if result.ratio is not None and result.ratio < math.inf else ""
    return _Failure(result, _clean_lines(result.message), over, reproduce_line(report, result), numbers)


def _numbers(found: Excerpt) -> _Numbers:
    """The worst of the numbers stand out, unless it is as bad with most of them."""
    gaps = [_gap(x.expected, x.actual) if x.differs else 0.0 for x in found.entries]
    most = max(gaps, default=0.0)
    out = [gap > 0 and gap >= most / 2 for gap in gaps]
    return _Numbers(found, out if 2 * sum(out) <= len(out) else [False] * len(out))


def _gap(expected: str, actual: str) -> float:
    try:
        gap = abs(float(expected) - float(actual))
    except ValueError:  # one of them is not there
        return math.inf
    return math.inf if math.isnan(gap) else gap


def _behind(report: Report) -> list[_Worst]:
    return [
        _Worst(clean(group), clean(dtype), _in_words(cell), cell.worst, over_budget(cell.worst))
        for (group, dtype), cell in sorted(cells_of(report).items(), key=lambda x: groups_of([report]).index(x[0][0]))
        if cell.worst
    ]


def _in_words(cell: Cell) -> str:
    return ", ".join(f"{n} {WORDS.get(x, x)}" for x, n in cell.counts.items() if n)


def _clean_lines(text: str) -> str:
    return "\n".join(clean_lines(text))


def _anchor(index: int, groups: list[str], group: str, kind: str) -> str:
    return f"t{index}-{kind}{groups.index(group)}"  # numbers only: nothing that a target may choose


# The table


@dataclass(frozen=True)
class _HeatCell:
    """A cell of the table: its colour, what it shows, what it says aloud, where it leads."""

    shade: str
    starts: bool  # whether the cell is the first of its target
    text: str = ""
    spoken: str = ""
    notes: tuple[str, ...] = ()
    link: str = ""


def _heat(reports: list[Report]) -> list[tuple[str, list[_HeatCell]]]:
    targets = [(i, x, cells_of(x), dtypes_of(x), groups_of([x])) for i, x in enumerate(reports)]
    return [
        (
            clean(group),
            [
                _heat_cell(cells.get((group, dtype), Cell()), i, groups, group, starts=dtype == dtypes[0])
                for i, _, cells, dtypes, groups in targets
                for dtype in dtypes
            ],
        )
        for group in groups_of(reports)
    ]


def _heat_cell(cell: Cell, index: int, groups: list[str], group: str, *, starts: bool) -> _HeatCell:
    if not cell.worst:
        return _HeatCell("empty", starts)
    shade = _shade(cell)
    kind = "c" if cell.worst.corner else "g"
    return _HeatCell(
        shade=shade,
        starts=starts,
        text=_written(cell.ratio) if shade.startswith("s") and cell.ratio is not None else MARKS[cell.verdict],
        spoken=cell.verdict,
        notes=tuple(f"{MARKS[x]}{n}" for x, n in cell.others.items() if x != CONFORMS),
        link=_anchor(index, groups, group, kind) if cell.verdict == BUG else "",
    )


def _shade(cell: Cell) -> str:
    """The class of a cell: a step of the scale where an error was measured and decides, else its verdict."""
    ratio = cell.ratio
    if cell.verdict == CONFORMS and ratio is not None and ratio < math.inf:
        return f"s{min(bisect_left(STEPS, ratio), STEPS.index(1.0))}"
    if cell.verdict == BUG and ratio is not None and 1 < ratio < math.inf:
        return f"s{bisect_left(STEPS, ratio)}"
    return SLUGS[cell.verdict]


def _written(ratio: float) -> str:
    """An error over budget, in few characters; over the budget as a multiple of it."""
    if ratio > MOST:
        return f">{MOST:.0f}{TIMES}"
    return short(ratio) + (TIMES if ratio > 1 else "")


def _legend() -> list[tuple[str, str]]:
    """The steps of the scale, class and label."""
    labels = [f"≤ {STEPS[0]:g}", *(f"{a:g}{DASH}{b:g}" for a, b in pairwise(STEPS[:-1])), f"> {STEPS[-2]:g}"]
    return [(f"s{i}", label if STEPS[i] <= 1 else label + TIMES) for i, label in enumerate(labels)]
