"""Reports as one HTML page, which needs no network and no scripts."""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import NamedTuple

from anyattention_conformance.budgets import EPS
from anyattention_conformance.report_text import (
    DASH,
    DTYPES,
    STATUS,
    TIMES,
    Cell,
    Excerpt,
    cells_of,
    clean,
    clean_lines,
    dtypes_of,
    excerpt,
    failures_of,
    groups_of,
    name_of,
    over_budget,
    ratio_of,
    reproduce_line,
    short,
    status_of,
    tally,
    verdict_of,
)
from anyattention_conformance.results import BUG, CONFORMS, DECLARED, NOT_RUN, UNSUPPORTED, VERDICTS, Report, Result

STEPS = (0.1, 0.25, 0.5, 0.8, 1.0, 2.0, 10.0, math.inf)  # a colour for each, up to this much of the budget
ENTRIES = 64  # of a row of numbers
SLUGS = {CONFORMS: "ok", DECLARED: "declared", UNSUPPORTED: "unsupported", BUG: "bug", NOT_RUN: "notrun"}
MARKS = {CONFORMS: "", DECLARED: "≠", UNSUPPORTED: DASH, BUG: "✗", NOT_RUN: "○"}
WORDS = {CONFORMS: "conform", DECLARED: "differ as declared", BUG: "fail"}
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
ROOM = 8  # columns of dtypes for which full names have room


def to_html(reports: list[Report]) -> str:
    """One self-contained page about these reports, side by side."""
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise RuntimeError('the HTML report needs jinja2: pip install "anyattention[conform]"') from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def breakable(name: str) -> str:
        """A name that may be broken where its parts meet."""
        return markupsafe.Markup(re.sub(r"([._/])(?=.)", r"\1<wbr>", str(markupsafe.escape(name))))

    environment.filters |= {"clean": clean, "clean_lines": _clean_lines, "breakable": breakable}
    source = resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    panels = _panels(reports)
    columns = sum(len(dtypes_of(x)) for x in reports)
    shared = _shared(reports)
    return environment.from_string(source).render(
        headline=_headline(reports),
        shared=shared,
        targets=[_target(i, x, shared) for i, x in enumerate(reports)],
        heat=_heat(reports),
        roomy=columns <= ROOM,
        short_names=SHORT if columns > ROOM else {},
        legend=_legend(),
        panels=panels,
        clipped=_clipped(panels),
        **{"left": LEFT, "top": TOP, "size": SIZE, "lane": LANE},
    )


def _headline(reports: list[Report]) -> str:
    if len(reports) == 1:
        return f"{name_of(reports[0])} {verdict_of(reports[0])}"
    good = sum(status_of(x) == "good" for x in reports)
    return f"{good} of {len(reports)} targets conform{'s' if good == 1 else ''}"


# The targets


@dataclass(frozen=True)
class _Target:
    """What the page says of one target."""

    id: str
    name: str
    report: Report
    status: str  # good, bad or none: a class of the style sheet
    mark: str
    verdict: str
    tally: str
    shares: list[tuple[str, int]]  # of the bar: class and number of results
    facts: list[tuple[str, str]]
    dtypes: list[str]
    failures: list["_Group"]

    @property
    def details(self) -> bool:
        """Whether there is more to say than the verdict."""
        return bool(self.failures or self.report.claims or self.report.problems)


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
    numbers: Excerpt | None


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = [("contract", report.contract), ("cases", report.tier), ("reference", report.oracle)]
    facts += [("date", report.date), ("took", f"{report.seconds:.0f} s" if report.seconds else "")]
    facts += report.versions.items()
    return [(clean(name), clean(value)) for name, value in facts if value]


def _shared(reports: list[Report]) -> list[tuple[str, str]]:
    """The facts that are the same for all of several targets: they are said once."""
    if len(reports) < 2:
        return []
    return [x for x in _facts(reports[0]) if all(x in _facts(other) for other in reports)]


def _target(index: int, report: Report, shared: list[tuple[str, str]]) -> _Target:
    counts, status = report.counts(), status_of(report)
    groups = groups_of([report])
    return _Target(
        id=f"t{index}",
        name=name_of(report),
        report=report,
        status=status,
        mark=STATUS[status][0],
        verdict=verdict_of(report),
        tally=tally(report),
        shares=[(SLUGS[x], counts[x]) for x in VERDICTS if counts[x]],
        facts=[x for x in _facts(report) if x not in shared],
        dtypes=[clean(x) for x in dtypes_of(report)],
        failures=[
            _Group(_anchor(index, groups, group), clean(group), *_split(report, results))
            for group, results in failures_of(report).items()
        ],
    )


def _split(report: Report, results: list[Result]) -> tuple[_Failure, list[_Failure]]:
    first, *rest = (_failure(report, x) for x in results)
    return first, rest


def _failure(report: Report, result: Result) -> _Failure:
    numbers = excerpt(result.rows, ENTRIES) if result.rows else None
    return _Failure(result, _clean_lines(result.message), over_budget(result), reproduce_line(report, result), numbers)


def _clean_lines(text: str) -> str:
    return "\n".join(clean_lines(text))


def _anchor(index: int, groups: list[str], group: str) -> str:
    return f"t{index}-g{groups.index(group)}"  # numbers only: nothing that a target may choose


# The table


@dataclass(frozen=True)
class _HeatCell:
    """A cell of the table: its colour, what it shows, what it says aloud and on hovering, where it leads."""

    shade: str
    starts: bool  # whether the cell is the first of its target
    mark: str = ""
    text: str = ""
    spoken: str = ""
    notes: str = ""
    title: str = ""
    link: str = ""


def _heat(reports: list[Report]) -> list[tuple[str, list[_HeatCell]]]:
    targets = [(x, cells_of(x), dtypes_of(x), groups_of([x])) for x in reports]
    return [
        (
            clean(group),
            [
                _heat_cell(
                    cells.get((group, dtype), Cell()),
                    name_of(report),
                    _anchor(i, groups, group) if group in groups else "",
                    starts=dtype == dtypes[0],
                )
                for i, (report, cells, dtypes, groups) in enumerate(targets)
                for dtype in dtypes
            ],
        )
        for group in groups_of(reports)
    ]


def _heat_cell(cell: Cell, target: str, link: str, *, starts: bool) -> _HeatCell:
    if not cell.worst:
        return _HeatCell("empty", starts)
    shade = _shade(cell)
    return _HeatCell(
        shade=shade,
        starts=starts,
        mark=MARKS[cell.verdict],
        text=_cell_text(cell, shade),
        spoken=cell.verdict,
        notes=" ".join(f"{MARKS[x]}{n}" for x, n in cell.others.items() if x != CONFORMS),
        title=_title(cell, cell.worst, target),
        link=link if cell.verdict == BUG else "",
    )


def _shade(cell: Cell) -> str:
    """The class of a cell: a step of the scale where an error was measured and decides, else its verdict."""
    if cell.verdict == CONFORMS and cell.ratio is not None:
        return f"s{min(bisect_left(STEPS, cell.ratio), STEPS.index(1.0))}"
    if cell.verdict == BUG and cell.ratio is not None and cell.ratio > 1:
        return f"s{bisect_left(STEPS, cell.ratio)}"
    return SLUGS[cell.verdict]


def _cell_text(cell: Cell, shade: str) -> str:
    if shade in ("ok", "bug"):  # nothing measured that decides: how many conform
        return f"{cell.counts[CONFORMS]}/{cell.total}"
    if cell.ratio is None or cell.verdict not in (CONFORMS, BUG):
        return ""
    return short(cell.ratio) + (TIMES if cell.verdict == BUG and math.isfinite(cell.ratio) else "")


def _title(cell: Cell, worst: Result, target: str) -> str:
    measured = over_budget(worst)
    lines = [
        f"{target} · {clean(worst.dtype)} · {clean(worst.group)}",
        ", ".join(f"{n} {WORDS.get(x, x)}" for x, n in cell.counts.items() if n),
        f"worst: {clean(worst.case)}, {clean(worst.quantity)}" + (f", {measured}" if measured else ""),
        _clean_lines(worst.message),
    ]
    return "\n".join(x for x in lines if x)


def _legend() -> list[list[tuple[str, str]]]:
    """The steps of the scale, class and label: those within the budget, and those over it."""
    labels = [f"≤ {STEPS[0]:g}", *(f"{a:g}{DASH}{b:g}" for a, b in pairwise(STEPS[:-1])), f"> {STEPS[-2]:g}"]
    steps = [(f"s{i}", label if STEPS[i] <= 1 else label + TIMES) for i, label in enumerate(labels)]
    within = STEPS.index(1.0) + 1
    return [steps[:within], steps[within:]]


# The plot of errors


SIZE = 400.0  # of the square of a plot, in its own units
LEFT, TOP = 66.0, 8.0
LANE = 16.0  # beside the axes, for what they cannot show


class _Point(NamedTuple):
    x: float
    y: float
    title: str


class _Tick(NamedTuple):
    at: float
    label: str


@dataclass(frozen=True)
class _Panel:
    """The plot of one dtype, in the units of its view box."""

    dtype: str
    across: list[_Tick]
    up: list[_Tick]
    same: str  # the points of a line
    budget: str
    points: list[tuple[str, str, list[_Point]]]  # classes of the verdict and of the target, points
    clipped: set[str]  # the edges on which something lies: low, high
    count: int


class _Axis:
    """Where a number lies between 0 and `SIZE`, on a logarithmic scale between two lanes for what is off it."""

    def __init__(self, numbers: Iterable[float], eps: float) -> None:
        inside = [x for x in numbers if 0 < x < math.inf]
        # What is far below the dtype's precision, or beyond any sum, would leave no room for the rest.
        low = min([eps / 4, *(x for x in inside if x > eps * 1e-4)])
        high = max([eps * 16, *(x for x in inside if x < 100)])
        self.low, self.high = math.floor(math.log10(low)), math.ceil(math.log10(high))

    def __call__(self, x: float) -> float:
        if x < 10.0**self.low:
            return LANE / 2
        if not x <= 10.0**self.high:  # NaN too
            return SIZE - LANE / 2
        return LANE + (SIZE - 2 * LANE) * (math.log10(x) - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[_Tick]:
        step = 1 + (self.high - self.low) // 8
        return [_Tick(self(10.0**n), _power(n)) for n in range(self.low, self.high + 1, step)]


def _curve(across: _Axis, up: _Axis, slope: float, constant: float) -> str:
    """The line y = slope x + constant, as far as it is on both scales."""
    exponents = (across.low + (across.high - across.low) * i / 200 for i in range(201))
    curve = [(10.0**n, slope * 10.0**n + constant) for n in exponents]
    places = [(across(x), up(y)) for x, y in curve if 10.0**up.low <= y <= 10.0**up.high]
    if constant and places:
        places.insert(0, (0.0, places[0][1]))  # over the lane of zeros too
    return " ".join(f"{LEFT + x:.1f},{TOP + SIZE - y:.1f}" for x, y in places)


def _power(n: int) -> str:
    return "10" + str(n).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _panels(reports: list[Report]) -> list[_Panel]:
    found: dict[str, list[tuple[int, Result]]] = {}
    for i, report in enumerate(reports):
        for result in report.results:
            if result.error is not None and result.flax_error is not None:
                found.setdefault(result.dtype, []).append((i, result))
    known = [x for x in DTYPES if x in found]
    return [_panel(x, found[x], reports) for x in known + [x for x in found if x not in known]]


def _panel(dtype: str, results: list[tuple[int, Result]], reports: list[Report]) -> _Panel:
    eps = EPS.get(dtype, EPS["float32"])
    pairs = [(x.flax_error, x.error) for _, x in results if x.flax_error is not None and x.error is not None]
    across, up = _Axis((x for x, _ in pairs), eps), _Axis((y for _, y in pairs), eps)
    places = {place for x, y in pairs for place in (across(x), up(y))}
    return _Panel(
        dtype=dtype,
        across=across.ticks,
        up=up.ticks,
        same=_curve(across, up, 1.0, 0.0),
        budget=_curve(across, up, 2.0, 4 * eps) if dtype in EPS else "",
        points=_points(across, up, results, reports),
        clipped={edge for edge, place in (("low", LANE / 2), ("high", SIZE - LANE / 2)) if place in places},
        count=len(results),
    )


def _clipped(panels: list[_Panel]) -> str:
    """What the lanes beside the axes hold."""
    edges = set().union(*(x.clipped for x in panels))
    low = "On the left and lower edge: errors of zero, or too small for the axes." if "low" in edges else ""
    high = "On the right and upper edge: errors too large for the axes, or not finite." if "high" in edges else ""
    return f"{low} {high}".strip()


def _points(
    across: _Axis, up: _Axis, results: list[tuple[int, Result]], reports: list[Report]
) -> list[tuple[str, str, list[_Point]]]:
    """Points by verdict and target, those that fail on top; where several coincide, one point tells of all."""
    found: dict[tuple[str, int], dict[tuple[float, float], list[Result]]] = {}
    for i, result in results:
        if result.flax_error is None or result.error is None:
            continue
        place = (round(LEFT + across(result.flax_error), 1), round(TOP + SIZE - up(result.error), 1))
        found.setdefault((result.verdict, i), {}).setdefault(place, []).append(result)
    order = (CONFORMS, NOT_RUN, UNSUPPORTED, DECLARED, BUG)
    return [
        (
            SLUGS[verdict],
            f"t{i}",
            [_Point(x, y, _point_title(reports[i], same)) for (x, y), same in found[verdict, i].items()],
        )
        for verdict, i in sorted(found, key=lambda x: (order.index(x[0]), x[1]))
    ]


def _point_title(report: Report, results: list[Result]) -> str:
    worst = max(results, key=lambda x: ratio_of(x) or 0.0)
    lines = [
        f"{name_of(report)} · {clean(worst.dtype)} · {clean(worst.case)}, {clean(worst.quantity)}",
        ", ".join(x for x in (worst.verdict, over_budget(worst)) if x),
        f"error {worst.error:.2g}, Flax's {worst.flax_error:.2g}",
    ]
    if len(results) > 1:
        lines.append(f"and {len(results) - 1} more here")
    return "\n".join(lines)
