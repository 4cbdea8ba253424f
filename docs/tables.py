"""Writes the tables of the documentation that come from the code: run ``python docs/tables.py`` after a change.

A page holds a table between two comments, ``<!-- NAME -->`` and ``<!-- end -->``. The script writes it into the page
itself, so that readers of the file see it too; a test compares it with the code.
"""

import json
import re
import runpy
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CPU_RUN = ROOT / "benchmarks" / "results" / "2026-11-24.json"
MODELS_RUN = ROOT / "benchmarks" / "results" / "2026-11-27.json"
GPU_RUNS = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))  # by date
NAMES = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch", "mlx": "MLX", "ndonnx": "ndonnx", "dask": "Dask"}
TABLES: dict[str, Callable[[], str]] = {}
_PLACE = re.compile(r"(<!-- ([a-z-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
Rows = Iterator[tuple[str, ...]]


def table(make: Callable[[], Rows]) -> Callable[[], Rows]:
    """Register a table by the name of the function that yields its rows, the head first."""

    def text() -> str:
        head, *rows = make()
        lines = [head, ("---",) * len(head), *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    TABLES[make.__name__.replace("_", "-")] = text
    return make


# --- what None chooses ---


@table
def rules() -> Rows:
    """The rules of None, by library and platform, in order."""
    from anyattention import RULES

    yield "library, platform", "logits, at least", "only for", "`None` picks"
    places: dict[Any, list[str]] = {}  # platforms of one library that have the same rules share their rows
    for (library, platform), found in RULES.items():
        places.setdefault((library, found), []).append(platform.upper())
    for (library, found), platforms in places.items():
        for rule in found:
            sizes = {"a head": rule.of_a_head, "a batch entry": rule.of_an_entry}
            least = [f"{size:,} in {of}" for of, size in sizes.items() if size]
            only = [f"{rule.least_queries} queries or more"] if rule.least_queries else []
            only += [f"at most {rule.most_queries} query"] if rule.most_queries == 1 else []
            only += [" and ".join(rule.dtypes)] if rule.dtypes else []
            only += ["compiled programs"] if rule.traced else []
            where = f"{NAMES[library]}, {' or '.join(platforms)}"
            yield where, ", ".join(least), ", ".join(only), f"`{rule.implementation}`"


@table
def run_on_a_device() -> Rows:
    """The engines that None may choose on an accelerator."""
    from anyattention._src.plan import RUN_ON_A_DEVICE

    yield "library", "platform", "engine", "dtypes"
    for (library, platform, engine), dtypes in RUN_ON_A_DEVICE.items():
        yield NAMES[library], platform.upper(), f"`{engine}`", ", ".join(dtypes)


# --- engines ---


def _engines() -> Iterator[tuple[Any, Any]]:
    """Every engine of the project's own, in the order of the registry's names, and its backend."""
    from anyattention._src import registry

    found = {engine.name: (engine, home) for home in map(registry.load, NAMES) for engine in home.engines}
    yield from (found[name] for name in registry.ENGINES)


def _call(backend: Any, dtype: str, mask: Any) -> Any:
    """A call of 128 queries and keys for an engine to look at."""
    from anyattention.extend import Call, Operands, Options

    xp = backend.xp
    x = backend.arrays.cast(xp.ones((1, 128, 2, 64), dtype=xp.float32), dtype)
    return Call(backend=backend, operands=Operands(x, x, x, mask=mask), options=Options(dtype=dtype))


@table
def engines() -> Rows:
    """Where each engine runs, in which dtypes, and what it serves beyond query, key and value."""
    yield "engine", "library", "platforms", "dtypes", "serves"
    for engine, backend in _engines():
        platforms = ", ".join("CUDA" if x == "cuda" else x.upper() for x in engine.platforms)
        serves = ", ".join(word if " " in word else f"`{word}`" for word in sorted(engine.serves - {"dropout_key"}))
        yield f"`{engine.name}`", NAMES[backend.name], platforms, ", ".join(engine.dtypes), serves


@table
def engine_masks() -> Rows:
    """Which masks by rule a kernel takes as they are, alone and for equal lengths, and whether it takes arrays."""
    from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask

    yield "engine", "`CausalMask()`", "`LocalMask(left, 0)`", "`LocalMask`", "`LengthMask`", "`SegmentMask`", "an array"
    for engine, backend in _engines():
        xp = backend.xp
        lengths, ids = xp.full((1,), 64, dtype=xp.int32), xp.zeros((1, 128), dtype=xp.int32)
        given = (CausalMask(), LocalMask(32, 0), LocalMask(32, 32), LengthMask(lengths), SegmentMask(ids, ids))
        cells = []
        for mask in given:
            call = _call(backend, engine.dtypes[0], mask)
            cells.append("as an array" if engine.fitted(call)[1] else "yes")
        masks = [cell if engine.dense or cell == "yes" else "no" for cell in cells]
        yield f"`{engine.name}`", *masks, "yes" if engine.dense else "no"


# --- libraries ---


@table
def requirements() -> Rows:
    """The oldest version of each library, and the extra that installs it, as in pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    titles = {"strict": "array-api-strict", "onnx": "ndonnx", **NAMES}
    yield "library", "to install it", "requires"
    for name in ("numpy", "jax", "torch", "mlx", "strict", "dask", "onnx"):
        found = [x for x in (base if name == "numpy" else extras[name]) if "darwin" not in x]
        needs = ", ".join(x.partition(";")[0].replace(">=", " ").strip() for x in found[: 2 if name == "onnx" else 1])
        extra = "`anyattention`" if name == "numpy" else f"`anyattention[{name}]`"
        yield titles[name], extra, f"{needs} or later"


@table
def kit() -> Rows:
    """The kit's committed results of our own attention."""
    from anyattention_conformance import Report

    yield "library", "versions", "contract", "results that conform", "differ as declared", "unsupported"
    for library in ("jax", "numpy", "torch"):
        report = Report.from_json((ROOT / "conformance" / "results" / f"anyattention-{library}.json").read_text())
        counts = report.counts()
        conform = f"{counts['conforms']} of {len(report.results)}"
        others = (str(counts["differs as declared"]), str(counts["unsupported"]))
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        yield NAMES[library], versions, report.contract, conform, *others


# --- speed ---

CASES = {
    "prefill 4096": "1x4096x8x64",
    "prefill 4096, causal": "1x4096x8x64, causal",
    "prefill 2048, depth 128": "1x2048x8x128",
    "batch of 512": "8x512x8x64",
    "batch of 512, padded": "8x512x8x64, a quarter padding",
    "bfloat16 1024": "2x1024x8x64, bfloat16",
    "dropout 1024": "2x1024x8x64, dropout",
    "decode over 4096": "16x1x8x64, one query over 4096 keys",
    "training 4096": "1x4096x4x64, with its gradient",
    "length 8192": "1x8192x8x64",
}
CONTESTANTS = {
    "anyattention, NumPy": "NumPy",
    "np.einsum": "`np.einsum` written out",
    "anyattention, JAX": "JAX",
    "flax.linen": "flax.linen",
    "anyattention, PyTorch": "PyTorch",
    "torch SDPA": "torch SDPA",
}


def _on_cpu(show: Callable[[dict[str, Any]], str]) -> Rows:
    results = json.loads(CPU_RUN.read_text())["results"]
    yield "batch x length x heads x depth", *CONTESTANTS.values()
    for case, title in CASES.items():
        yield title, *(show(results[case].get(name, {})) for name in CONTESTANTS)


def _milliseconds(figures: dict[str, Any], digits: int = 0) -> str:
    return f"{figures['seconds'] * 1e3:,.{digits}f}" if "seconds" in figures else "–"


@table
def speed_on_cpu() -> Rows:
    """Milliseconds of the committed run on CPU."""
    yield from _on_cpu(_milliseconds)


@table
def memory_on_cpu() -> Rows:
    """Peak memory of the committed run on CPU, in MiB."""
    yield from _on_cpu(lambda figures: f"{figures['peak_mib']:,.0f}" if "seconds" in figures else "–")


@table
def speed_of_models() -> Rows:
    """Milliseconds and MiB of the attention of today's models, beside Transformers' own."""
    names = [name for name in CONTESTANTS if name.startswith("anyattention")] + ["Transformers eager"]
    titles = [CONTESTANTS.get(name, "`eager`") for name in names]
    yield "model, length", *titles, *(f"{title}, MiB" for title in titles[-2:])
    for case, results in json.loads(MODELS_RUN.read_text())["results"].items():
        found = [results[name] for name in names]
        yield case, *map(_milliseconds, found), *(f"{figures['peak_mib']:,.0f}" for figures in found[-2:])


def _on_gpu(only: str) -> Rows:
    """Milliseconds on a GPU, of shapes that begin so, in the newest run that has the call; of our own calls None's."""
    columns = [("jax", "Flax"), ("jax", "ours"), ("jax", "cudnn"), ("torch", "ours"), ("torch", "sdpa")]
    yield "batch x length x heads x depth", "Flax", "JAX", "cuDNN itself", "PyTorch", "torch SDPA itself", "measured"
    newest: dict[tuple[Any, ...], Any] = {}
    kinds = ("full", "causal", "lengths", "keys", "bias")
    for run in map(json.loads, map(Path.read_text, GPU_RUNS)):
        for case, found in run["speed"].items():
            shape, kind, *gradient = case.removeprefix("bfloat16 ").split()
            if len(found) == 2:  # both libraries
                newest[bool(gradient), int(shape.split("x")[1]), kinds.index(kind)] = found, run["date"], shape, kind
    for (gradient, *_), (found, date, shape, kind) in sorted(newest.items(), key=lambda item: item[0]):
        if not shape.startswith(only):
            continue
        kind = {"full": "", "keys": ", mask array", "lengths": ", `LengthMask`"}.get(kind, f", {kind}")
        title = f"{shape}{kind}{', with its gradient' if gradient else ''}"
        yield title, *(_milliseconds(found[library].get(row, {}), 2) for library, row in columns), date


@table
def speed_on_gpu() -> Rows:
    """All of the committed run."""
    yield from _on_gpu("")


@table
def speed_at_one_size() -> Rows:
    """The calls of 4096 tokens."""
    yield from _on_gpu("4x4096")


@table
def kit_on_gpu() -> Rows:
    """How many runs of the kit have each verdict, in the committed runs on a GPU."""
    verdicts = ("conforms", "differs as declared", "refused", "wrong")
    yield "date", "engine", *verdicts
    for run in map(json.loads, map(Path.read_text, GPU_RUNS)):
        for library, engines in run["correctness"].items():
            for engine, runs in engines.items():
                counts = Counter(found["verdict"] for found in runs.values())
                yield run["date"], f"`{engine}` ({NAMES[library]})", *(str(counts[verdict]) for verdict in verdicts)


# --- pages ---


TABLES |= runpy.run_path(str(Path(__file__).with_name("corners.py")))["TABLES"]


def filled(text: str) -> str:
    """The text of a page with its tables made anew."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for path in Path(__file__).parent.rglob("*.md"):
        path.write_text(filled(path.read_text()))
