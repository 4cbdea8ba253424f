"""Time and memory of attention against length on this machine, for the page of the doctor."""

import contextlib
import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import anyattention
from anyattention_conformance.frameworks import quiet
from anyattention_conformance.machine import Machine
from anyattention_conformance.workers import DiedError, Recipe, Worker

Array = Any
BATCH, HEADS, DEPTH = 1, 8, 64
ON_CPU = "float32", (256, 512, 1024, 2048, 4096)
ON_ACCELERATOR = "bfloat16", (512, 1024, 2048, 4096, 8192, 16384)
SECONDS, CALLS, ROUNDS = 0.3, 3, 3  # of a point: each round takes so many seconds, the first at least so many calls
LIMIT = 120.0  # seconds of a point, with the start of its process
LOGITS = 4  # arrays of all logits that exact may hold at a time
#: The two lines of a plot, by the implementation that is asked for.
LINES = {"": "anyattention", "exact": "Flax's steps, exact"}


class Cost(NamedTuple):
    """What a call took: the best of several, and what the first added to the peak of memory, where that is known."""

    seconds: float
    bytes: int | None
    served: str


@dataclass
class Curve:
    """The costs of one implementation by length; `gaps` says why points are missing."""

    library: str
    line: str
    dtype: str
    costs: dict[int, Cost]
    gaps: dict[int, str]


class Meter(Machine):
    """What the process of a library serves."""

    def cost(self, length: int, implementation: str, dtype: str, calls: int) -> Cost:
        """Of so many calls or more, compiled before on JAX."""
        with quiet():
            call, served = self._call(length, implementation or None, dtype)
            size = self._peak(call)
            times: list[float] = []
            while len(times) < calls or sum(times) < SECONDS:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return Cost(min(times), size, served)

    @cache  # noqa: B019 - as long as the process
    def _call(self, length: int, implementation: Any, dtype: str) -> tuple[Callable[[], Any], str]:
        """The call, compiled once, and what serves it."""
        random = np.random.default_rng(0)
        shape = (BATCH, length, HEADS, DEPTH)
        arrays = [self.put(random.standard_normal(shape, dtype=np.float32), dtype) for _ in range(3)]
        plan = anyattention.explain(*arrays, implementation=implementation)
        attend = partial(anyattention.dot_product_attention, implementation=implementation)
        return self._ready(attend, arrays), plan.engine or plan.implementation or ""

    def _ready(self, function: Callable[..., Array], arrays: list[Array]) -> Callable[[], Any]:
        """The call, which returns when the numbers are there; its code is loaded."""
        if self.name == "jax":
            compiled = self.module.jit(function).lower(*arrays).compile()
            self.compiled = compiled
            return lambda: self.module.block_until_ready(compiled(*arrays))
        few = [x[:, :8] for x in arrays]
        if self.name == "mlx":
            self.module.eval(function(*few))
            return lambda: self.module.eval(function(*arrays))
        function(*few)
        if self.name == "torch" and self.device != "CPU":
            function(*arrays)  # kernels of this length
            wait = getattr(self.module, self._torch_device).synchronize
            wait()
            return lambda: (function(*arrays), wait())
        return lambda: function(*arrays)

    def _peak(self, call: Callable[[], Any]) -> int | None:
        """The bytes that a call adds to the peak of memory: on the device, or of this process."""
        if self.device == "CPU":
            before = _resident(reset=True)
            call()
            return None if before is None else max(0, (_resident(reset=False) or 0) - before)
        if self.name == "jax":
            found = self.compiled.memory_analysis()
            return None if found is None else found.temp_size_in_bytes + found.output_size_in_bytes
        if self.name == "mlx":
            self.module.reset_peak_memory()
            before = self.module.get_active_memory()
            call()
            return self.module.get_peak_memory() - before
        if self._torch_device != "cuda":
            return None
        self.module.cuda.reset_peak_memory_stats()
        before = self.module.cuda.memory_allocated()
        call()
        return self.module.cuda.max_memory_allocated() - before


def _resident(reset: bool) -> int | None:
    """Bytes of this process in memory, now, with its peak set to that; or the peak since. None outside Linux."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        if reset:
            with contextlib.suppress(AttributeError):  # of a libc that keeps no memory that was freed
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines)
    return int(found["VmRSS" if reset else "VmHWM"].split()[0]) * 1024


def measure(library: str, device: str) -> Iterator[Curve]:
    """Each point in a process of its own on a CPU, so that the peak of memory is that of its call; more rounds for the
    time alone share one.
    """
    dtype, lengths = ON_CPU if device == "CPU" else ON_ACCELERATOR
    worker = Worker(Recipe(Meter, (library,)))
    try:
        for implementation, line in LINES.items():
            curve = Curve(library, line, dtype, {}, {})
            for length in lengths:
                if reason := _too_large(implementation, length, device):
                    curve.gaps[length] = reason
                    continue
                _add(curve, length, worker, (length, implementation, dtype, CALLS))
                if device == "CPU":
                    worker.stop()
                    worker.start()
            for length in list(curve.costs) * (ROUNDS - 1):
                _add(curve, length, worker, (length, implementation, dtype, 1))
            yield curve
            if {x.served for x in curve.costs.values()} <= {"exact"}:  # the other line would be the same
                return
    finally:
        worker.stop()


def _add(curve: Curve, length: int, worker: Worker, point: tuple[Any, ...]) -> None:
    """Ask for a point: the first peak of memory and the least time count."""
    try:
        found = worker.ask("cost", *point, seconds=LIMIT)
    except DiedError as error:
        worker.start()
        if length not in curve.costs:
            curve.gaps[length] = str(error)
        return
    before = curve.costs.get(length, found)
    curve.costs[length] = before._replace(seconds=min(before.seconds, found.seconds))


def _too_large(implementation: str, length: int, device: str) -> str:
    """Why exact is not tried: it holds all logits, which would make this machine swap."""
    if not implementation or device != "CPU":
        return ""
    free = _free()
    needed = LOGITS * BATCH * HEADS * length**2 * np.dtype(np.float32).itemsize
    return f"it may take {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB free" if needed > free else ""


def _free() -> float:
    """Bytes of memory that are free, as far as the system says so."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024.0 if found else math.inf


# The picture


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 470.0, 250.0, 70.0, 24.0, 10.0, 36.0


class Point(NamedTuple):
    """A place in the picture, and what is written there."""

    x: float
    y: float
    text: str = ""


class Panel(NamedTuple):
    """One plot: ticks, and the points of every line."""

    title: str
    across: list[Point]
    up: list[Point]
    lines: list[tuple[str, list[Point]]]


def panels(curves: list[Curve]) -> list[Panel]:
    """Time and memory against length, both logarithmic."""
    found = []
    for title, value, write in (
        ("time of a call", lambda x: x.seconds, seconds),
        ("peak memory of a call", lambda x: x.bytes, size),
    ):
        numbers = {curve.line: {n: value(cost) for n, cost in curve.costs.items() if value(cost)} for curve in curves}
        every = [(n, y) for points in numbers.values() for n, y in points.items()]
        if len({n for n, _ in every}) > 1:
            found.append(_panel(title, numbers, every, write))
    return found


def _panel(title: str, numbers: dict[str, dict[int, Any]], every: list[Any], write: Callable[[Any], str]) -> Panel:
    lengths = sorted({n for n, _ in every})
    low, high = (math.log10(f(y for _, y in every)) for f in (min, max))
    low, high = math.floor(low * 2) / 2, max(math.ceil(high * 2) / 2, math.floor(low * 2) / 2 + 1)

    def across(n: float) -> float:
        share = math.log(n / lengths[0]) / math.log(lengths[-1] / lengths[0])
        return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)

    def up(y: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - (math.log10(y) - low) / (high - low)), 1)

    exponents = range(math.ceil(low), math.floor(high) + 1)
    return Panel(
        title,
        [Point(across(n), HEIGHT - BOTTOM, str(n)) for n in lengths],
        [Point(LEFT, up(10.0**e), write(10.0**e)) for e in exponents],
        [(line, [Point(across(n), up(y)) for n, y in sorted(points.items())]) for line, points in numbers.items()],
    )


def seconds(x: float) -> str:
    """A time in three digits: "1.23 ms"."""
    return _scaled(x, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")))


def size(x: float | None) -> str:
    """Bytes in three digits: "12.3 MB"."""
    return "" if x is None else _scaled(x, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def _scaled(x: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, unit = next((y for y in units if x >= y[0] * 0.9995), units[-1])
    return f"{x / scale:.3g} {unit}"
