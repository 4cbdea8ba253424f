"""What each framework is asked, in processes of its own that take turns."""

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anyattention_conformance.targets import Outcome
from anyattention_conformance.workers import DiedError, Recipe, Worker
from benchmarks.scale.cases import (
    ACCELERATORS,
    BOUNDS,
    CPU,
    IN_ORDER,
    ONE,
    Case,
    Scale,
    apart,
    error,
    expected,
    sizes,
    timed,
)
from benchmarks.scale.jax_side import JAXSide
from benchmarks.scale.torch_side import Rank, joined

STEP_SECONDS = 300.0  # that one answer may take
Rows = list[dict[str, Any]]


class Budget:
    """The seconds that may be spent, the turns that each contestant gets, and what keeps a row once it is there."""

    def __init__(self, seconds: float, turns: int, keep: Callable[[], None]) -> None:
        self.end, self.turns, self.keep = time.monotonic() + seconds, turns, keep

    @property
    def spent(self) -> bool:
        return time.monotonic() > self.end


class Processes:
    """Some that answer together; started when they are first asked, and again after one has failed."""

    def __init__(self, recipes: Callable[[], list[Recipe]]) -> None:
        self.recipes, self.workers = recipes, []  # type: tuple[Any, list[Worker]]

    def about(self) -> dict[str, Any]:
        """What the first says of itself."""
        self._start()
        return self.workers[0].about

    def ask(self, *request: Any) -> list[Any]:
        """The answers to one request. DiedError if one is missing; then all are ended."""
        self._start()
        try:
            for worker in self.workers:
                worker.give(request, STEP_SECONDS)
            answers = [worker.receive() for worker in self.workers]
            for answer in answers:
                if isinstance(answer, Outcome) and answer.kind == "raised":
                    raise DiedError(answer.message)
        except DiedError:
            self.stop()
            raise
        return answers

    def _start(self) -> None:
        if not self.workers:
            self.workers = [Worker(recipe) for recipe in self.recipes()]
            try:
                for worker in self.workers:
                    worker.ready()
            except DiedError:
                self.stop()
                raise

    def stop(self) -> None:
        """End them all."""
        for worker in self.workers:
            with suppress(OSError):
                worker.stop()
        self.workers = []


def of_jax(found: dict[str, Any], scale: Scale | None, budget: Budget, most: int) -> None:
    """Programs that are compiled alone, what is computed, and times; of virtual devices at most so many."""
    here = _jax(2**20, virtual=False)
    places: dict[int, Processes] = {}
    try:
        about = here.about()
        real = about["platform"] != "cpu"
        about["virtual"] = not real
        scale = scale or (ACCELERATORS if real else CPU)
        most = about["count"] if real else most
        places = {n: _jax(n, virtual=True) for n in {1, *(n for _, n in (*scale.memory, *scale.counted)), *sizes(most)}}
        found |= {"about": about, "programs": [], "counted": [], "times": []}
        _each(found["programs"], _programs(scale), budget, lambda case: _compiled(case, places, here, about))
        _each(found["counted"], _counted(scale), budget, lambda case: _logits(case, places))

        def time_of(case: Case) -> dict[str, Any]:
            many, one = (here, here) if real else (places[case.devices], places[1])
            alone = replace(case, exchange=ONE)
            return _turns(case, {"sharded": (many, case), "one": (one, alone)}, budget.turns, _joined_of_jax)

        _each(found["times"], timed(scale, most), budget, time_of)
    finally:
        for processes in (*places.values(), here):
            processes.stop()


def of_torch(found: dict[str, Any], scale: Scale | None, budget: Budget, most: int) -> None:
    """Times of ranks, what each computes and holds, beside one process with as many threads."""
    with tempfile.TemporaryDirectory(prefix="anyattention-") as folder:
        probe = _ranks(1, folder, 1)
        about = probe.about()
        probe.stop()
        most = about["count"] or most
        scale = scale or (ACCELERATORS if about["count"] else CPU)
        found |= {"about": about, "times": []}
        for n in sizes(most)[1:]:

            def time_of(case: Case, n: int = n) -> dict[str, Any]:
                """In new processes each time, which have no memory left of another case."""
                alone = replace(case, exchange=ONE, devices=1)
                contestants = {"sharded": (_ranks(n, folder, 1), case)}
                for name in ("tiled", "sdpa"):
                    contestants[name] = _ranks(1, folder, n), replace(alone, implementation=name)
                try:
                    return _turns(case, contestants, budget.turns, joined)
                finally:
                    for processes, _ in contestants.values():
                        processes.stop()

            cases = [
                Case(scale.torch, n, kind, gradient, dtype=scale.dtype)
                for kind in ("full", "causal")
                for gradient in (False, True)
            ]
            _each(found["times"], cases, budget, time_of)


def of_dask(found: dict[str, Any], quick: bool, budget: Budget) -> None:
    """The rows of `dask_side`, whose cluster has two processes with a GiB each."""
    found["rows"] = []
    if find_spec("benchmarks.scale.dask_side") is None or find_spec("distributed") is None:
        found["not run"] = "dask and distributed are needed"
        return
    from benchmarks.scale import dask_side

    sizes = {"length": 256, "chunk": 64} if quick else {"length": 65536, "chunk": 4096}
    more = {"keys": 512, "keys_chunk": 128, "turns": 1} if quick else {"turns": budget.turns}
    for name in dict.fromkeys(case.what for case in dask_side.cases()):  # a cluster each, whose memory is new
        if budget.spent:
            found["not run"] = f"the time was up before {name}"
            return
        say(f"  {name}")
        found["rows"] += dask_side.measure(**sizes, memory="1GiB", workers=2, only=(name,), **more)
        budget.keep()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _jax(devices: int, virtual: bool) -> Processes:
    return Processes(lambda: [Recipe(JAXSide, (devices, virtual))])


def _ranks(size: int, folder: str, threads: int) -> Processes:
    """Processes that find each other by a file, a new one each time."""

    def recipes() -> list[Recipe]:
        store = str(Path(folder) / f"store-{time.monotonic_ns()}")
        return [Recipe(Rank, (rank, size, store, threads)) for rank in range(size)]

    return Processes(recipes)


def _each(rows: Rows, cases: list[Case], budget: Budget, figures: Callable[[Case], dict[str, Any]]) -> None:
    """A row for each case, with its figures or why there are none."""
    for case in cases:
        if budget.spent:
            found = {"failed": "not run: the time was up"}
        else:
            say(f"  {case}")
            try:
                found = figures(case)
            except DiedError as died:
                found = {"failed": str(died)[:300]}
        rows.append(asdict(case) | found)
        budget.keep()


def _programs(scale: Scale) -> list[Case]:
    """With gradients, of two heads as the aims have them."""
    kinds = (("ring", "full"), ("ring", "causal"), ("gather", "full"), ("", "full"))
    return [
        Case(length, n, kind, True, exchange, None if exchange else "tiled", heads=2)
        for length, n in scale.memory
        for exchange, kind in kinds
    ]


def _compiled(case: Case, places: dict[int, Processes], here: Processes, about: dict[str, Any]) -> dict[str, Any]:
    """For virtual devices, and for real ones where there are enough."""
    (found,) = places[case.devices].ask("compiled", case)
    if about["platform"] != "cpu" and about["count"] >= case.devices:
        (on_these,) = here.ask("compiled", replace(case, dtype="bfloat16"))
        found[about["platform"]] = on_these
    return found


def _counted(scale: Scale) -> list[Case]:
    kinds = ("full", "causal", IN_ORDER)
    return [Case(length, n, kind, heads=1) for length, n in scale.counted for kind in kinds]


def _logits(case: Case, places: dict[int, Processes]) -> dict[str, Any]:
    """How many each device computes, and one device alone by tiles."""
    ((logits,), (way,)) = (places[case.devices].ask(job, case) for job in ("counted", "explained"))
    (alone,) = places[1].ask("counted", replace(case, exchange=ONE, implementation="tiled"))
    return {"logits": [*logits.values()], "one": sum(alone.values()), "way": way}


def _joined_of_jax(parts: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    return parts[0]["rows"], parts[0]["columns"]


def _turns(
    case: Case, contestants: dict[str, tuple[Processes, Case]], turns: int, rows_of: Callable[[Any], Any]
) -> dict[str, Any]:
    """The least seconds of each contestant, in turns; none of one whose answer is wrong.

    Of ranks, the slowest counts.
    """
    right = expected(case)
    found: dict[str, dict[str, Any]] = {}
    columns: dict[str, list[Any]] = {}
    for turn in range(turns):
        for name, (processes, own) in contestants.items():
            figures = found.setdefault(name, {})
            if "failed" in figures:
                continue
            try:
                if not turn:
                    parts = processes.ask("prepare", own)
                    rows, columns[name] = rows_of(parts)
                    figures["error"] = error(rows, right)
                    figures |= {key: [x[key] for x in parts] for key in ("memory_mib", "logits") if key in parts[0]}
                readings = processes.ask("seconds", own)
            except DiedError as died:
                found[name] = {"failed": str(died)[:300]}
                continue
            walls = [x[0] if isinstance(x, tuple) else x for x in readings]
            if max(walls) < figures.get("seconds", float("inf")):
                figures["seconds"] = max(walls)
                if isinstance(readings[0], tuple):
                    figures["processor_seconds"] = [x[1] for x in readings]
    for processes in {id(x): x for x, _ in contestants.values()}.values():
        with suppress(DiedError):
            processes.ask("clear")
    bound = BOUNDS[case.dtype]
    for name, figures in found.items():
        if "failed" in figures:
            continue
        reference = next((x for x in ("one", "tiled") if x in columns), name)
        figures["apart"] = apart(columns[name], columns[reference])
        if not (figures["error"] <= bound and figures["apart"] <= bound):
            figures["wrong"] = f"error {figures.pop('error'):.2g}, apart {figures.pop('apart'):.2g}"
            figures.pop("seconds", None)
    return found
