"""Run every case: each contestant in a process of its own, taking turns; a table, a JSON file and a plot.

On one core (``taskset -c 0 python -m benchmarks``) times are those of the processor, which other programs on the
machine hardly change; else they are those of the clock on the wall.
"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from anyattention_conformance.workers import DiedError, Recipe, Worker
from benchmarks.cases import CASES, CONTESTANTS, Case
from benchmarks.worker import Contestant, clock, cores

HERE = Path(__file__).parent
SECONDS = 3600.0  # that a contestant may take for a case


def processor() -> str:
    """The kind of processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_gflops() -> float:
    """Of the machine's matrix product in float32."""
    x = np.ones((2048, 2048), np.float32)
    times: list[float] = []
    for _ in range(8):
        start = clock()
        x @ x
        times.append(clock() - start)
    return 2 * 2048**3 / min(times) / 1e9


def run(name: str, case: Case) -> dict[str, Any]:
    """One contestant on one case, in a fresh process, so that the peak of memory is that of the case."""
    worker = Worker(Recipe(Contestant, CONTESTANTS[name]))
    try:
        return worker.ask(case, seconds=SECONDS)
    except DiedError as error:
        return {"failed": str(error)}
    finally:
        worker.stop()


def best(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The better of two rounds; what is wrong in one is wrong."""
    if "seconds" not in new or ("seconds" in old and old["seconds"] <= new["seconds"]):
        return old if old and "seconds" in new else new
    return new


def table(results: dict[str, dict[str, Any]], peak: float) -> str:
    """A line for each contestant of each case: time, ratio to ours of its framework, GFLOP/s, share of peak, memory."""
    lines = []
    for case in CASES:
        if case.name not in results:
            continue
        lines.append(f"\n{case.name}: {case.batch}x{case.q_length}x{case.heads}x{case.depth}, {case.keys} keys")
        for name, figures in results[case.name].items():
            if "seconds" not in figures:
                note = "WRONG ANSWER, no time" if figures.get("wrong") else figures.get("failed", "")
                lines += [f"  {name:24}{note}"] if note else []
                continue
            ours = results[case.name].get(next(n for n in CONTESTANTS if CONTESTANTS[n][0] == CONTESTANTS[name][0]), {})
            ratio = f"{figures['seconds'] / ours['seconds']:6.2f}" if "seconds" in ours else ""
            rate = case.flops / figures["seconds"] / 1e9
            lines.append(
                f"  {name:24}{figures['seconds'] * 1e3:9.2f} ms  {ratio:>6} of ours  {rate:6.1f} GFLOP/s "
                f"{100 * rate / peak:4.0f} %  {figures['peak_mib']:7.0f} MiB"
            )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Time and memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name in CONTESTANTS:
        points = [
            (case.q_length, results[case.name][name])
            for case in CASES
            if case.name.startswith("length") and "seconds" in results[case.name].get(name, {})
        ]
        style = "o-" if name.startswith("anyattention") else "s--"
        for axis, of in zip(axes, (lambda x: x["seconds"] * 1e3, lambda x: max(x["peak_mib"], 1)), strict=True):
            axis.loglog([length for length, _ in points], [of(x) for _, x in points], style, label=name)
    for axis, title in zip(axes, ("milliseconds", "peak memory of the first call, MiB"), strict=True):
        axis.set(xlabel="length (1 x length x 8 x 64, float32)", title=title)
        lengths = [case.q_length for case in CASES if case.name.startswith("length")]
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns that every contestant gets (default: 3)")
    parser.add_argument("--only", default="", help="cases whose name contains this, or one of these, parted by |")
    parser.add_argument("--contestants", default="", help="contestants, likewise")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the JSON file and the plot")
    options = parser.parse_args()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    chosen = [case for case in CASES if any(part in case.name for part in options.only.split("|"))]
    contestants = [name for name in CONTESTANTS if any(part in name for part in options.contestants.split("|"))]
    results: dict[str, dict[str, Any]] = {case.name: {} for case in chosen}
    peak = peak_gflops()
    for turn in range(options.rounds):
        for case in chosen:
            of_case = results[case.name]
            for name in contestants:
                of_case[name] = best(of_case.get(name, {}), run(name, case))
            print(f"round {turn + 1}: {case.name}", file=sys.stderr, flush=True)
    print(table(results, peak), f"\n\nmatrix product of the machine: {peak:.0f} GFLOP/s")
    options.output.mkdir(exist_ok=True)
    today = date.today().isoformat()
    versions = {name: __import__(name).__version__ for name in ("numpy", "jax", "flax", "torch", "transformers")}
    machine = f"{processor()}, {cores()} core{'s' * (cores() > 1)}"
    record = {"date": today, "machine": machine, "peak_gflops": peak, "versions": versions, "results": results}
    (options.output / f"{today}.json").write_text(json.dumps(record, indent=1) + "\n")
    if not options.only:
        plot(results, options.output / f"{today}.png")


if __name__ == "__main__":
    main()
