"""What was found, as text, as a table in Markdown, and as a plot."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from anyattention_conformance.results import CONFORMS, DECLARED, NOT_RUN
from benchmarks.gpu.cases import DEPTHS, Case
from benchmarks.gpu.correctness import REFUSED, WRONG
from benchmarks.gpu.record import Record

VERDICTS = (CONFORMS, DECLARED, REFUSED, WRONG, NOT_RUN)
TITLES = {"jax": "JAX", "torch": "PyTorch"}


def correctness(record: Record) -> Iterator[str]:
    """A line for each engine and implementation: how many runs of the kit conform; then what is wrong, then why not."""
    if not record.data["correctness"]:
        yield "the kit was not run"
        return
    yield f"{'the kit, runs that':28}" + "".join(f"{verdict:>21}" for verdict in VERDICTS)
    wrong, refused = [], []
    for framework, names in record.data["correctness"].items():
        for name, found in names.items():
            counts = Counter(x["verdict"] for x in found.values())
            title = f"{TITLES[framework]}, {name}"
            yield f"{title:28}" + "".join(f"{counts[verdict]:21}" for verdict in VERDICTS)
            wrong += [f"  {title}, {run}: {x['why']}" for run, x in found.items() if x["verdict"] == WRONG]
            reasons = Counter(x["why"] for x in found.values() if x["verdict"] in (REFUSED, CONFORMS) and x["why"])
            refused += [f"  {title}, {count} times: {why}" for why, count in reasons.most_common()]
    yield from ("\nwrong:", *wrong) if wrong else ("\nnothing is wrong",)
    yield from ("\nrefused:", *refused) if refused else ()


def choosing(record: Record) -> Iterator[str]:
    """What the choice costs; the aim is 30 microseconds."""
    for framework, costs in record.data["choosing_us"].items():
        for call, cost in costs.items():
            name = f"  {TITLES[framework]}, {call}"
            yield f"{name:32}" + (cost if isinstance(cost, str) else f"{cost:6.1f} us{' (!)' * (cost > 30)}")


def rate(figures: dict[str, Any], peak: float) -> str:
    """TFLOP/s, and their share of the card's matrix product."""
    return f"{figures['tflops']:.3g} ({100 * figures['tflops'] / peak:.0f} %)"


def note(figures: dict[str, Any]) -> str:
    """Why there is no time."""
    kinds = ("wrong", "refused", "skipped", "failed")
    titles = {"wrong": "WRONG ANSWER, no time"}
    return "; ".join(f"{titles.get(kind, kind)}: {figures[kind]}" for kind in kinds if kind in figures)


def speed(record: Record, cases: Iterable[Case]) -> Iterator[str]:
    """A line for each contestant of each case."""
    for case in cases:
        if not (found := record.data["speed"].get(case.name)):
            continue
        yield f"\n{case.name}"
        for framework, rows in found.items():
            for name, figures in rows.items():
                title = f"  {TITLES[framework]}, {name}"
                if "seconds" not in figures:
                    yield f"{title:24}{note(figures)}"
                    continue
                peak = figures["peak_mib"]
                ran = figures.get("engine", figures.get("implementation", ""))
                ratio = f"{figures['of_direct']:.2f} times {ran} called directly" if "of_direct" in figures else ran
                memory = " " * 13 if peak is None else f"{peak:9.0f} MiB"
                milliseconds = f"{figures['seconds'] * 1e3:10.3f} ms"
                yield f"{title:24}{milliseconds}{rate(figures, record.peak):>16}{memory}  {ratio}".rstrip()


def sentences(record: Record) -> Iterator[str]:
    """The card, and how far the best of ours is from what it gives at most, said both ways."""
    devices = sorted({about["device"] for about in record.data["frameworks"].values()})
    yield f"{', '.join(devices)}: a matrix product in bfloat16 runs at {record.peak:.4g} TFLOP/s, measured here."
    found = [
        (figures["tflops"], f"{name}, {TITLES[framework]}: {case}")
        for case, frameworks in record.data["speed"].items()
        for framework, rows in frameworks.items()
        for name, figures in rows.items()
        if name.startswith("ours") and "seconds" in figures
    ]
    if found:
        most, where = max(found)
        share = most / record.peak
        yield (
            f"The fastest of ours ({where}) runs at {most:.4g} TFLOP/s, which is {100 * share:.0f} % of that; or: it "
            f"takes {1 / share:.2f} times as long as a matrix product of as many operations."
        )


def markdown(record: Record, cases: Iterable[Case]) -> Iterator[str]:
    """TFLOP/s and share of the card's matrix product, a row for each case."""
    columns = [(name, row) for name, about in record.data["frameworks"].items() for row in about["rows"]]
    yield f"| batch x length x heads x depth | {' | '.join(f'{row}, {TITLES[name]}' for name, row in columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for case in cases:
        if not (found := record.data["speed"].get(case.name)):
            continue
        cells = [found.get(name, {}).get(row, {}) for name, row in columns]
        texts = [rate(x, record.peak) if "seconds" in x else short(x) for x in cells]
        yield f"| {case.name} | {' | '.join(texts)} |"


def short(figures: dict[str, Any]) -> str:
    """Why there is no time, in a cell."""
    if "skipped" in figures and "logits" in figures["skipped"]:
        return figures["skipped"]
    return next((kind for kind in ("wrong", "refused", "failed") if kind in figures), "–")


def plot(record: Record, cases: list[Case], path: Path) -> str:
    """TFLOP/s against length, in bfloat16, a panel for each depth, forward and with the gradient; where it is."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(DEPTHS), figsize=(14, 8), squeeze=False)
    contestants = [(name, row) for name, about in record.data["frameworks"].items() for row in about["rows"]]
    panels = product((False, True), sorted(DEPTHS))
    for axis, (gradient, depth) in zip(axes.flat, panels, strict=True):
        chosen = [x for x in cases if x.dtype == "bfloat16" and (x.gradient, x.depth) == (gradient, depth)]
        for number, (framework, row) in enumerate(contestants):
            for kind, style in (("full", "o-"), ("causal", "s--")):
                points = [
                    (x.q_length, figures["tflops"])
                    for x in chosen
                    if x.kind == kind
                    and "seconds" in (figures := record.data["speed"].get(x.name, {}).get(framework, {}).get(row, {}))
                ]
                label = f"{row}, {TITLES[framework]}{', causal' * (kind == 'causal')}"
                axis.plot([x for x, _ in points], [y for _, y in points], style, color=f"C{number}", label=label)
        axis.axhline(record.peak, color="gray", linewidth=1, linestyle=":")
        lengths = sorted({x.q_length for x in cases})
        axis.set(xscale="log", xlabel="length", ylabel="TFLOP/s", ylim=(0, None))
        axis.set_title(f"depth {depth}, {'forward and backward' if gradient else 'forward'}")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
    axes[0, 0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return f"plot: {path}"
