"""What this machine has for attention: what serves the usual calls, whether the numbers are right, what is missing."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

from anyattention_conformance.machine import Machine, Served
from anyattention_conformance.report_text import ASCII
from anyattention_conformance.targets import TargetError
from anyattention_conformance.usual import DTYPES, USUAL, Judge, Usual, recorded
from anyattention_conformance.workers import DiedError, Recipe, Worker

RIGHT, WRONG, NOT_RUN = 0, 1, 2  # exit status
TITLES = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch", "mlx": "MLX"}
PACKAGES = (
    *("anyattention", "numpy", "array-api-compat", "jax", "jaxlib", "flax", "torch", "mlx", "tokamax", "dask"),
    *("array-api-strict", "ndonnx", "ml_dtypes", "rich", "jinja2"),
)
SECONDS = 120.0  # that an answer may take, with compiling
DEATHS = 3  # of the process of a library, after which it is given up
#: What a library itself rounds more than Flax: library, dtype, by how many eps at most, and why. The exponential is in
#: the numerator and in the denominator.
KNOWN = {("mlx", "float32"): (16, "MLX's exponential is up to eight rounding errors off")}
CUDA_13 = 580  # the first driver that runs it


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
    dtypes = [x for x in DTYPES if x != "bfloat16" or name != "numpy" or _has("ml_dtypes")]
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


# What is here


def machine() -> list[tuple[str, str]]:
    """The machine, as name and value."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("processor", f"{processor()}, {cores} core{'' if cores == 1 else 's'}"),
    ]
    return found + [("GPU", gpu) for gpu in nvidia()]


def processor() -> str:
    """The kind of processor."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


@cache
def nvidia() -> tuple[str, ...]:
    """NVIDIA's GPUs as their driver names them: name, driver, memory."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return tuple(f"{x[0]}, driver {x[1]}, {x[2]}" for x in lines if len(x) == 3)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def packages() -> tuple[list[str], list[str]]:
    """Those that are installed, with versions, and those that are not."""
    here: list[str] = []
    absent: list[str] = []
    for package in PACKAGES:
        try:
            here.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            (here if package == "anyattention" else absent).append(
                f"{package} from a checkout" if package == "anyattention" else package
            )
    return here, absent


# What is missing


def advice(found: list[Library]) -> Iterator[str]:
    """What would make calls faster, or would let them run, and how to get it."""
    devices = {x.name: x.device for x in found}
    gpus = nvidia()
    for name in ("jax", "torch"):
        if name not in devices:
            yield f'{TITLES[name]} is not installed: pip install "anyattention[{name}]"'
    if gpus and devices.get("jax") == "CPU":
        driver = re.search(r"driver (\d+)", gpus[0])
        cuda = 13 if driver and int(driver[1]) >= CUDA_13 else 12
        yield f'JAX does not use the GPU: pip install "jax[cuda{cuda}]"'
    if gpus and devices.get("torch") == "CPU":
        yield "PyTorch does not use the GPU: install a wheel with CUDA, see https://pytorch.org/get-started/locally"
    if sys.platform == "darwin" and platform.machine() == "arm64" and "mlx" not in devices:
        yield 'MLX is not installed: pip install "anyattention[mlx]"'
    if not _has("ml_dtypes"):
        yield "NumPy has no bfloat16: pip install ml_dtypes"
    for library in found:
        reasons = (x for cell in library.cells.values() for x in cell.served.engines.values())
        yield from dict.fromkeys(
            f"{library.title}: {x}" for reason in reasons for x in reason.split(", ") if "install" in x
        )


# As text


def header() -> Iterator[str]:
    """The machine and what is installed."""
    here, absent = packages()
    rows = [*machine(), ("installed", ", ".join(here)), ("not installed", ", ".join(absent) or "nothing of interest")]
    yield from aligned(rows)


def footer(found: list[Library]) -> Iterator[str]:
    """The legend, what is missing, and the verdict."""
    flax = recorded()["flax"]
    yield f"✓ right by contract C3: the error against float64 is at most twice that of Flax {flax}, plus 4 eps"
    yield "✗ wrong   ○ could not be run   ≠ wrong as this library is known to be"
    yield ""
    if wanted := list(dict.fromkeys(advice(found))):
        yield "For more, or for faster calls:"
        yield from (f"  {x}" for x in wanted)
        yield ""
    yield verdict(found)


def table(library: Library) -> Iterator[str]:
    """What serves the usual calls, what is wrong, and why engines do not serve."""
    if library.problem and not library.cells:
        yield f"✗ {library.title}: {library.problem}"
        return
    where = "the CPU" if library.device == "CPU" else library.device
    yield f"{library.title} {library.version} on {where}{', within jax.jit' if library.name == 'jax' else ''}"
    dtypes = [x for x in DTYPES if any(dtype == x for _, dtype, _ in library.cells)]
    columns = list(product(dtypes, (False, True)))
    yield f"  {'':39}{''.join(x.ljust(22) for x in dtypes)}".rstrip()
    yield f"  {'':39}{''.join(('gradient' if y else 'output').ljust(11) for _, y in columns)}".rstrip()
    for call in USUAL:
        cells = [library.cells.get((call, *x)) for x in columns]
        shown = "".join((f"{x.mark} {x.served.name}" if x else "").ljust(11) for x in cells)
        yield f"  {call.name:15} {call.shape:22} {shown}".rstrip()
    for (call, dtype, gradient), cell in library.cells.items():
        if cell.message:
            what = f"{call.name}, {dtype}, {'gradient' if gradient else 'output'}, {cell.served.name}"
            yield f"  {cell.mark} {what}: {cell.message}"
    yield from (f"  {x}" for x in refusals(library))
    if library.problem:
        yield f"  ✗ {library.problem}"


def refusals(library: Library) -> Iterator[str]:
    """Why engines do not serve, and which calls; also why None does not pick one that could."""
    asked = [place for place, cell in library.cells.items() if cell.served.engines]
    engines = dict.fromkeys(name for cell in library.cells.values() for name in cell.served.engines)
    found: dict[str, list[str]] = {}
    for name in engines:
        places: dict[str, list[tuple[Usual, str, bool]]] = {}
        for place in asked:
            served = library.cells[place].served
            if reason := served.engines[name] or _passed_over(served, name):
                other_place = re.search(r"it runs on [^,]+, not on [^,]+$", reason)
                places.setdefault(other_place[0] if other_place else reason, []).append(place)
        for reason, which in places.items():
            where = "" if len(which) == len(asked) else f"{_which(which, asked)}: "
            found.setdefault(where + reason, []).append(name)
    width = max((len(", ".join(names)) for names in found.values()), default=0)
    yield from (f"not {', '.join(names):{width}}  {reason}" for reason, names in found.items())


def _passed_over(served: Served, engine: str) -> str:
    """Why None does not pick an engine that can serve the call."""
    start = f"not fused: {engine}: "
    return next((x.removeprefix(start) for x in served.reasons if x.startswith(start)), "")


def _which(some: Iterable[tuple[Usual, str, bool]], asked: list[tuple[Usual, str, bool]]) -> str:
    """Calls in as few words as name them: "dropout", "float32", "bias in float32 with its gradient"."""
    some = set(some)
    for dtypes in ({x} for x in DTYPES):
        if some == {x for x in asked if x[1] in dtypes}:
            return next(iter(dtypes))
    words = []
    for call in USUAL:
        mine, all_ = {x for x in some if x[0] == call}, {x for x in asked if x[0] == call}
        if not mine:
            continue
        word = call.name
        if mine != all_ and mine == {x for x in all_ if x[2]}:
            word += " with its gradient"
        elif mine != all_ and len({x[1] for x in mine}) == 1:
            word += f" in {next(iter(mine))[1]}"
        words.append(word)
    return ", ".join(words)


def verdict(found: list[Library]) -> str:
    """The last line."""
    marks = [cell.mark for library in found for cell in library.cells.values()]
    counts = {mark: f"{marks.count(mark)} of {len(marks)}" for mark in set(marks)}
    broken = [x.title for x in found if x.problem]
    parts = [f"{counts['✗']} calls have wrong numbers"] if "✗" in counts else []
    parts += [f"{counts['○']} calls could not be run"] if "○" in counts else []
    parts += [f"{' and '.join(broken)} could not be examined"] if broken else []
    known = f", {counts['≠']} are wrong as known" if "≠" in counts else ""
    return (
        f"✗ {'; '.join(parts)}{known}" if parts else f"✓ {counts.get('✓', 'none')} calls have the right numbers{known}"
    )


def status(found: list[Library]) -> int:
    """The exit status."""
    cells = [cell for library in found for cell in library.cells.values()]
    if any(x.mark == "✗" for x in cells):
        return WRONG
    return NOT_RUN if any(x.problem for x in found) or not all(x.ran for x in cells) else RIGHT


def aligned(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Names and values in two columns, long values broken at commas."""
    for name, value in rows:
        line = f"{name:15}"
        for i, part in enumerate(value.split(", ")):
            if i and len(line) + len(part) > 110:
                yield f"{line.rstrip()},"
                line = " " * 15 + part
            else:
                line += f", {part}" if i else part
        yield line


def say(lines: Iterable[str], file: TextIO) -> None:
    """Write lines, in ASCII where the file has no more."""
    for line in lines:
        try:
            line.encode(getattr(file, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            line = line.translate(ASCII).encode("ascii", "backslashreplace").decode()
        file.write(line + "\n")


def run(html: Path | None = None) -> int:
    """Examine this machine and say what was found."""
    names = libraries()
    say(header(), sys.stdout)
    if sys.stderr.isatty():
        say([f"\nexamining {', '.join(TITLES[x] for x in names)}, which takes up to a minute"], sys.stderr)
    found = []
    for library in examine(names):
        say(["", *table(library)], sys.stdout)
        sys.stdout.flush()
        found.append(library)
    say(["", *footer(found)], sys.stdout)
    return status(found)


if __name__ == "__main__":
    sys.exit(run())
