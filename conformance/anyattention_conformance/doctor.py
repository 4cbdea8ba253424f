"""What this machine has for attention: what serves the usual calls, whether the numbers are right, what is missing."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import TextIO

from anyattention_conformance import costs, doctor_html
from anyattention_conformance.examination import TITLES, Library, examine, libraries
from anyattention_conformance.machine import Served
from anyattention_conformance.report_text import ASCII
from anyattention_conformance.usual import DTYPES, USUAL, Usual, recorded

RIGHT, WRONG, NOT_RUN = 0, 1, 2  # exit status
PACKAGES = (
    *("anyattention", "numpy", "array-api-compat", "jax", "jaxlib", "flax", "torch", "mlx", "tokamax", "dask"),
    *("array-api-strict", "ndonnx", "ml_dtypes", "rich", "jinja2"),
)
CUDA_13 = 580  # the first driver that runs it


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
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # of a driver that does not answer
        return ()
    lines = [line.split(", ") for line in done.stdout.splitlines()]
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
        except PackageNotFoundError:  # also of what is on the path and was not installed
            known = _has(package.replace("-", "_"))
            (here if known else absent).append(f"{package} of unknown version" if known else package)
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
    yield "shapes are batch x length x heads x depth; the names in the tables are those of implementations and engines"
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
    if library.name == "jax" and library.device != "CPU":
        yield "  float32: with jax_default_matmul_precision = 'highest'; JAX's default rounds the factors here"


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
    """Examine this machine and say what was found; to a file, a page with time and memory against length."""
    if html:
        doctor_html.to_html([], [], "", "")  # which raises where jinja2 is missing, before a minute has gone
    said: list[str] = []

    def tell(lines: Iterable[str]) -> None:
        lines = list(lines)
        said.extend(lines)
        say(lines, sys.stdout)
        sys.stdout.flush()

    names = libraries()
    tell(header())
    _progress(f"examining {', '.join(TITLES[x] for x in names)}, which takes up to a minute")
    found = []
    for library in examine(names):
        tell(["", *table(library)])
        found.append(library)
    tell(["", *footer(found)])
    if html:
        facts = [value for _, value in machine()]
        html.write_text(doctor_html.to_html(list(_measured(found)), facts, "\n".join(said), verdict(found)), "utf-8")
        say(["", f"time and memory against length: {html}"], sys.stdout)
    return status(found)


def _measured(found: list[Library]) -> Iterator[doctor_html.Measured]:
    for library in found:
        if not library.problem:
            _progress(f"measuring {library.title}")
            curves = list(costs.measure(library.name, library.device))
            yield doctor_html.Measured(library.title, library.version, library.device, curves)


def _progress(sentence: str) -> None:
    if sys.stderr.isatty():
        say([sentence], sys.stderr)


if __name__ == "__main__":
    sys.exit(run())
