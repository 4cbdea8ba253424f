"""The plot of a report: each result's error against Flax's own, in the units of an SVG."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from anyattention_conformance.budgets import EPS
from anyattention_conformance.report_text import DTYPES, clean, name_of, over_budget, ratio_of
from anyattention_conformance.results import BUG, CONFORMS, DECLARED, NOT_RUN, UNSUPPORTED, Report, Result

SLUGS = {CONFORMS: "ok", DECLARED: "declared", UNSUPPORTED: "unsupported", BUG: "bug", NOT_RUN: "notrun"}
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
class Panel:
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


def panels(reports: list[Report]) -> list[Panel]:
    found: dict[str, list[tuple[int, Result]]] = {}
    for i, report in enumerate(reports):
        for result in report.results:
            if result.error is not None and result.flax_error is not None:
                found.setdefault(result.dtype, []).append((i, result))
    known = [x for x in DTYPES if x in found]
    return [_panel(x, found[x], reports) for x in known + [x for x in found if x not in known]]


def _panel(dtype: str, results: list[tuple[int, Result]], reports: list[Report]) -> Panel:
    eps = EPS.get(dtype, EPS["float32"])
    pairs = [(x.flax_error, x.error) for _, x in results if x.flax_error is not None and x.error is not None]
    across, up = _Axis((x for x, _ in pairs), eps), _Axis((y for _, y in pairs), eps)
    places = {place for x, y in pairs for place in (across(x), up(y))}
    return Panel(
        dtype=dtype,
        across=across.ticks,
        up=up.ticks,
        same=_curve(across, up, 1.0, 0.0),
        budget=_curve(across, up, 2.0, 4 * eps) if dtype in EPS else "",
        points=_points(across, up, results, reports),
        clipped={edge for edge, place in (("low", LANE / 2), ("high", SIZE - LANE / 2)) if place in places},
        count=len(results),
    )


def clipped(panels: list[Panel]) -> str:
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
