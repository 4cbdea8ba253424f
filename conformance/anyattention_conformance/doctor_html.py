"""The doctor's page: time and memory against length on this machine, and what the doctor said."""

from typing import Any, NamedTuple

from anyattention_conformance import costs
from anyattention_conformance.costs import Curve, Panel, seconds, size
from anyattention_conformance.report_html import render


class Measured(NamedTuple):
    """A library and its curves."""

    title: str
    version: str
    device: str
    curves: list[Curve]


class _Section(NamedTuple):
    title: str
    version: str
    device: str
    dtype: str
    lines: list[str]
    panels: list[Panel]
    rows: list[list[str]]
    gaps: list[str]


def to_html(measured: list[Measured], facts: list[str], text: str, verdict: str) -> str:
    """One self-contained page."""
    places: dict[str, Any] = {"width": costs.WIDTH, "height": costs.HEIGHT, "left": costs.LEFT, "right": costs.RIGHT}
    shape = {"batch": costs.BATCH, "heads": costs.HEADS, "depth": costs.DEPTH, "rounds": costs.ROUNDS}
    return render(
        "doctor.html.j2",
        verdict=verdict,
        facts=facts,
        libraries=[_section(x) for x in measured if any(curve.costs for curve in x.curves)],
        text=text,
        top=costs.TOP,
        **places,
        **shape,
    )


def _section(measured: Measured) -> _Section:
    curves = [x for x in measured.curves if x.costs]
    lengths = sorted({n for curve in curves for n in curve.costs})
    gaps = [f"{curve.line}, length {n}: {why}" for curve in measured.curves for n, why in curve.gaps.items()]
    return _Section(
        measured.title,
        measured.version,
        measured.device,
        curves[0].dtype,
        [x.line for x in curves],
        costs.panels(curves),
        [[str(n), *(text for curve in curves for text in _written(curve, n))] for n in lengths],
        gaps,
    )


def _written(curve: Curve, length: int) -> list[str]:
    cost = curve.costs.get(length)
    return ["", "", ""] if cost is None else [seconds(cost.seconds), size(cost.bytes), cost.served]
