"""What each array library of this machine does with the usual calls: who serves them, and whether numbers are right."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from threading import Lock
from typing import Any

from anyattention_conformance.machine import Machine, Served
from anyattention_conformance.targets import TargetError
from anyattention_conformance.usual import DTYPES, USUAL, Judge, Usual
from anyattention_conformance.workers import DiedError, Recipe, Worker

TITLES = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch", "mlx": "MLX"}
SECONDS = 120.0  # that an answer may take, with compiling
DEATHS = 3  # of the process of a library, after which it is given up
#: What a library itself rounds more than Flax: library, dtype, by how many eps at most, and why. The exponential is in
#: the numerator and in the denominator.
KNOWN = {("mlx", "float32"): (16, "MLX's exponential is up to eight rounding errors off")}


@dataclass(frozen=True)
class Cell:
    """What serves one call, and what is wrong with its numbers; `ran` is False where they could not be had."""

    served: Served
    message: str = ""
    ran: bool = True
    known: bool = False  # as `KNOWN` says

    @property
    def mark(self) -> str:
        """One character."""
        return "○" if not self.ran else "≠" if self.known else "✗" if self.message else "✓"


@dataclass
class Library:
    """One library, and the cell of every call, dtype, and with or without gradient."""

    name: str
    version: str = ""
    device: str = ""
    problem: str = ""
    cells: dict[tuple[Usual, str, bool], Cell] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name as it writes it."""
        return TITLES.get(self.name, self.name)


def libraries() -> list[str]:
    """Those that are installed, of those that have a process here."""
    return [name for name in TITLES if importlib.util.find_spec(name)]


def examine(names: Sequence[str]) -> Iterator[Library]:
    """Each library in a process of its own, all at the same time; they come in this order."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX and PyTorch share the GPU
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    workers = [Worker(Recipe(Machine, (name,))) for name in names]
    try:
        with ThreadPoolExecutor(max(1, len(names))) as pool:
            yield from pool.map(_examined, names, workers)
    finally:
        for worker in workers:
            worker.stop()


def _examined(name: str, worker: Worker) -> Library:
    found = Library(name)
    try:
        about = worker.ready()
    except (DiedError, TargetError) as error:
        found.problem = f"it cannot be started: {error}"
        return found
    found.version, found.device = about["version"], about["device"]
    dtypes = [x for x in DTYPES if x != "bfloat16" or name != "numpy" or importlib.util.find_spec("ml_dtypes")]
    deaths = 0
    for dtype, call in product(dtypes, USUAL):
        try:
            for gradient, cell in _cells(found, worker, call, dtype):
                found.cells[call, dtype, gradient] = cell
        except DiedError as error:
            for gradient in (False, True):
                found.cells.setdefault((call, dtype, gradient), Cell(Served("", "", (), {}), str(error), ran=False))
            deaths += 1
            if deaths == DEATHS:
                found.problem = f"it was given up after its process ended {DEATHS} times"
                break
            worker.start()
    return found


def _cells(library: Library, worker: Worker, call: Usual, dtype: str) -> Iterator[tuple[bool, Cell]]:
    """The cells of one call in one dtype, without and with gradient."""
    forward, both = (worker.ask("served", call, dtype, gradient, seconds=SECONDS) for gradient in (False, True))
    answer = worker.ask("answer", call, dtype, True, seconds=SECONDS)
    known = KNOWN.get((library.name, dtype), (0, ""))
    yield True, _judged(both, answer, call, dtype, known)
    if library.name == "jax" and library.device == "CPU" and isinstance(answer, dict):
        answer = {"output": answer["output"]}  # of one function with and without gradient, and compiling takes seconds
    else:
        answer = worker.ask("answer", call, dtype, False, seconds=SECONDS)
    yield False, _judged(forward, answer, call, dtype, known)


def _judged(served: Served, answer: Any, call: Usual, dtype: str, known: tuple[int, str]) -> Cell:
    if isinstance(answer, str):
        return Cell(served, answer, ran=False)
    message, beyond = _judge(call, dtype).wrong(answer)
    most, why = known
    return Cell(served, f"{message} ({why})", known=True) if 0 < beyond <= most else Cell(served, message)


_LOCK = Lock()


def _judge(call: Usual, dtype: str) -> Judge:
    with _LOCK:
        return _judges(call, dtype)


@cache
def _judges(call: Usual, dtype: str) -> Judge:
    return Judge(call, dtype)
