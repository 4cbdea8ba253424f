"""The command line: correctness, then speed, as far as the time goes; results are added to one JSON file."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from anyattention_conformance.workers import DiedError, Recipe, Worker
from benchmarks.gpu import correctness, report
from benchmarks.gpu.cases import CARD, PRETEND, Case, every
from benchmarks.gpu.record import OtherMachineError, Record
from benchmarks.gpu.worker import STEP_SECONDS, Server, figures

FRAMEWORKS = ("jax", "torch")
NO_GPU = 2  # exit status
RESULTS = Path(__file__).parents[1] / "results"


class Budget:
    """The seconds that may be spent."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        return time.monotonic() > self.end


def check(record: Record, processes: dict[str, Worker], options: argparse.Namespace, budget: Budget) -> None:
    """The kit's verdicts that are still missing. Quick: all engines share a process, to save its start."""
    for framework, process in processes.items():
        names = [*process.about["engines"], "tiled", "exact"]
        for group in [names] if options.quick else [[name] for name in names]:
            todo = [task for name in group for task in correctness.tasks(name, options.quick)]
            done = {name: record.verdicts(framework, name) for name in group}
            todo = [x for x in todo if options.again or f"{x.case.id} {x.dtype}" not in done[x.name]]
            if not todo:
                continue
            say(f"{framework}: {', '.join(group)}: {len(todo)} runs")
            for task, verdict in correctness.verdicts(framework, todo, options.pretend, options.jobs):
                done[task.name][f"{task.case.id} {task.dtype}"] = verdict
                record.save(at_once=False)
                if budget.spent:
                    return
            record.save()


def time_all(
    record: Record, processes: dict[str, Worker], cases: list[Case], options: argparse.Namespace, budget: Budget
) -> None:
    """The peak, the cost of choosing, and the cases that are still missing; frameworks take turns."""
    for framework, process in processes.items():
        try:
            peak, costs = (process.ask(job, seconds=STEP_SECONDS) for job in ("peak", "choosing"))
        except DiedError as error:
            say(f"{framework}: neither the peak nor the cost of choosing could be measured: {error}")
            process.start()
            continue
        peaks = record.data["peak_tflops"]
        peaks[framework] = max(peak, peaks.get(framework, 0.0))
        record.data["choosing_us"][framework] = costs
        record.save()
    for case in cases:
        for framework, process in processes.items():
            found = record.figures(case.name)
            if framework in found and not options.again:
                continue
            if budget.spent:
                return
            say(f"{framework}: {case.name}")
            found[framework] = figures(process, case)
            record.save(at_once=False)


def start(options: argparse.Namespace) -> tuple[dict[str, Worker], list[str]]:
    """The processes of frameworks that have a GPU, or pretend to; and what is missing of others."""
    processes, missing = {}, []
    for framework in [options.framework] if options.framework else FRAMEWORKS:
        process = Worker(Recipe(Server, (framework, options.pretend)))
        try:
            usable = process.about["gpu"] or options.pretend
        except DiedError as error:
            missing.append(f"{framework} cannot be started ({error})")
            continue
        if usable:
            processes[framework] = process
        else:
            process.stop()
            missing.append(f"{framework} finds no NVIDIA GPU")
    return processes, missing


def show(record: Record, cases: list[Case]) -> None:
    """Print everything that was found so far."""
    print("\n".join(report.correctness(record)))
    if not record.peak:
        return
    print("\ncost of choosing, anyattention.explain:", *report.choosing(record), sep="\n")
    print(*report.speed(record, cases), sep="\n")
    print("", *report.sentences(record), sep="\n")
    print(f"\n{report.plot(record, cases, record.path.with_suffix('.png'))}\n")
    print(
        "TFLOP/s, and their share of the card's matrix product in bfloat16:\n",
        *report.markdown(record, cases),
        sep="\n",
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    found.add_argument("--part", choices=("all", "correctness", "speed", "report"), default="all")
    found.add_argument("--framework", choices=FRAMEWORKS, help="default: both")
    found.add_argument("--quick", action="store_true", help="a few cases of each part")
    found.add_argument("--only", default="", metavar="TEXT", help="speed: cases whose name contains this")
    found.add_argument("--seconds", type=float, default=540.0, metavar="N", help="to end after (default: 540)")
    found.add_argument("--again", action="store_true", help="measure anew what the results already hold")
    found.add_argument(
        "--jobs", type=int, default=min(8, (os.cpu_count() or 2) // 2), metavar="N", help="processes of the kit"
    )
    found.add_argument("--results", type=Path, metavar="FILE", help="the JSON file to add to, the plot beside it")
    found.add_argument("--pretend", action="store_true", help="tiny shapes on the CPU, to try the program")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 where there is nothing to measure on, or to report."""
    options = parser().parse_args(arguments)
    if options.part == "report":
        return run(options, {}, Budget(0.0))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was found is saved
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}  # processes share the card
    budget = Budget(options.seconds)
    processes, missing = start(options)
    if not processes:
        say(f"benchmarks.gpu: there is no NVIDIA GPU to measure on, since {' and '.join(missing)}; try --pretend")
        return NO_GPU
    for sentence in missing:
        say(f"benchmarks.gpu: left out, since {sentence}")
    try:
        return run(options, processes, budget)
    finally:
        for process in processes.values():
            process.stop()


def run(options: argparse.Namespace, processes: dict[str, Worker], budget: Budget) -> int:
    """All parts, whose results are saved however this ends."""
    folder = Path(tempfile.gettempdir()) if options.pretend else RESULTS
    path = options.results or folder / f"gpu-{date.today().isoformat()}.json"
    if not processes and not path.exists():
        say(f"benchmarks.gpu: there are no results in {path}")
        return NO_GPU
    about: dict[str, Any] = {name: process.about for name, process in processes.items()}
    try:
        record = Record(path, about, options.pretend)
    except OtherMachineError as error:
        say(f"benchmarks.gpu: {error}")
        return NO_GPU
    scale = PRETEND if options.pretend else CARD
    cases = [case for case in every(scale, options.quick) if options.only in case.name]
    try:
        if options.part in ("all", "correctness"):
            check(record, processes, options, budget)
        if options.part in ("all", "speed") and not budget.spent:
            time_all(record, processes, cases, options, budget)
    finally:
        record.save()
    show(record, list(every(scale, quick=False)))
    if processes and budget.spent:
        say("the time is up: the same command goes on from here")
    print(f"\nresults: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
