"""One case in one process: every contestant is checked, then they take turns, and the median counts."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from benchmarks.gpu.cases import Case
from benchmarks.gpu.ours import explainer

Array = Any
Figures = dict[str, Any]
Function = Callable[[Array, Array, Array, dict[str, Array]], Array]

REFUSAL = "cannot serve this call: "
EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
#: Times eps: the root mean square of an error, relative to that of the truth. Weights and logits rounded to 16 bits
#: make it about 1; another mask, scale or bias makes it hundreds in float16, and tens in bfloat16.
TOLERANCE = 8
QUERIES = 8  # that are checked, in the first and the last batch entry, of the first and the last head
ROUNDS, LIMIT = 9, 4.0  # readings of each contestant; seconds of them all


class Side(Protocol):
    """A framework on a device."""

    name: str
    memory: int  # bytes of the device

    def inputs(self, case: Case) -> dict[str, Any]:
        """Arrays "query", "key", "value" and "cotangent", and "extras": the mask, lengths or bias."""

    def functions(self, case: Case) -> dict[str, Function]:
        """The contestants, ours first; an engine called directly is named as the engine."""

    def prepare(self, function: Function, case: Case, inputs: dict[str, Any]) -> tuple[Callable[[Array], Any], Any]:
        """What turns a cotangent into the output or the three gradients, and the bytes it takes at most, or None."""

    def at(self, x: Array, rows: np.ndarray) -> Array:
        """A cotangent with zeros in all rows but these."""

    def get(self, x: Array) -> np.ndarray:
        """The numbers in float64."""

    def finite(self, x: Array) -> bool:
        """Whether all numbers are."""

    def wait(self, x: Any) -> None:
        """Until the device has computed it."""


def measure(side: Side, case: Case, functions: dict[str, Function], chunk: float) -> Iterator[dict[str, Any]]:
    """Messages: ``{"at": name}`` before a contestant is tried, ``{"row": name, "figures": ...}`` when it is done.

    A reading takes `chunk` seconds.
    """
    inputs = side.inputs(case)
    ready: dict[str, tuple[Callable[[], Any], Figures]] = {}
    for name, function in functions.items():
        yield {"at": name}
        run, figures = checked(side, case, inputs, name, function)
        if run is None:
            yield {"row": name, "figures": figures}
        else:
            ready[name] = run, figures
    yield {"at": ""}
    readings = take_turns(side, {name: run for name, (run, _) in ready.items()}, chunk)
    for name, (_, figures) in ready.items():
        direct = readings.get(figures.get("engine", ""))
        seconds = statistics.median(readings[name])
        figures |= {"seconds": seconds, "readings": len(readings[name]), "tflops": case.flops / seconds / 1e12}
        if direct and name != figures["engine"]:
            figures["of_direct"] = seconds / statistics.median(direct)
        yield {"row": name, "figures": figures}


def checked(
    side: Side, case: Case, inputs: dict[str, Any], name: str, function: Function
) -> tuple[Callable[[], Any] | None, Figures]:
    """A contestant that is ready to be timed, and its figures so far; None in its place if it is not to be."""
    figures: Figures = {}
    if name == "Flax" and (size := flax_bytes(case)) > 0.4 * side.memory:
        return None, {"skipped": f"{size / 1e9:.3g} GB of logits"}
    try:
        if name.startswith("ours"):
            plan = explainer(case, inputs, "fused" if name == "ours, fused" else None)()
            figures = {"implementation": plan.implementation}
            figures |= {"engine": plan.engine.name} if plan.engine else {}
        call, peak = side.prepare(function, case, inputs)
        error = error_of(side, case, inputs, call)
    except ImportError as error_:
        return None, {"skipped": str(error_)}
    except Exception as error_:
        text = f"{type(error_).__name__}: {error_}".strip().splitlines()[0]
        if isinstance(error_, NotImplementedError) and REFUSAL in text:
            return None, {"refused": reasons(text)}
        return None, figures | {"failed": text[:300]}
    figures |= {"peak_mib": None if peak is None else peak / 2**20}
    if not math.isfinite(error):
        return None, figures | {"wrong": "it is not finite"}
    figures["error_eps"] = error
    if error > TOLERANCE:
        return None, figures | {"wrong": f"off by {error:.3g} eps, more than {TOLERANCE}"}
    return lambda: call(inputs["cotangent"]), figures


def reasons(message: str) -> str:
    """Why a call is refused, from the message of the error."""
    return message.partition(REFUSAL)[2].partition(". Pass None")[0]


def flax_bytes(case: Case) -> int:
    """What Flax keeps of logits and weights: two arrays of 16-bit numbers forward, four with the gradient."""
    return case.logits * 2 * (4 if case.gradient else 2)


def error_of(side: Side, case: Case, inputs: dict[str, Any], call: Callable[[Array], Any]) -> float:
    """How far the answer is from the truth, in eps; infinite where it is not finite.

    A gradient is taken of a few queries' outputs, so that the truth needs only their logits.
    """
    rows = np.linspace(case.q_length // 8, case.q_length - 1, QUERIES).astype(int)
    cotangent = side.at(inputs["cotangent"], rows)
    results = call(cotangent)
    if not all(side.finite(x) for x in results):
        return math.inf
    worst = 0.0
    for entry in sorted({0, case.batch - 1}):
        sliced = {name: side.get(some(inputs[name], entry)) for name in ("query", "key", "value")}
        sliced["cotangent"] = side.get(some(cotangent, entry))
        logits_of = {name: side.get(x) for name, x in inputs["extras"].items() if name != "bias"}
        if case.kind == "bias":
            logits_of["bias"] = side.get(inputs["extras"]["bias"][0, :: step(case.heads)][:, rows])
        expected = truth(case, sliced, logits_of, entry, rows)
        for actual, right in zip(results, expected, strict=True):
            found = side.get(some(actual, entry))
            found = found if case.gradient else found[rows]
            worst = max(worst, root_mean_square(found - right) / root_mean_square(right))
    return worst / EPS[case.dtype]


def some(x: Array, entry: int) -> Array:
    """The first and the last head of a batch entry."""
    return x[entry, :, :: step(x.shape[2])]


def step(heads: int) -> int:
    return max(heads - 1, 1)


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def truth(
    case: Case, arrays: dict[str, np.ndarray], extras: dict[str, np.ndarray], entry: int, rows: np.ndarray
) -> list[np.ndarray]:
    """The output of some queries of a batch entry, or the gradients of them by query, key and value, in float64."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    logits = np.einsum("qhd,khd->hqk", query[rows], key, optimize=True) / case.depth**0.5
    logits = logits + extras.get("bias", 0.0)
    logits = np.where(visible(case, extras, entry, rows), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    if not case.gradient:
        return [np.einsum("hqk,khd->qhd", weights, value, optimize=True)]
    cotangent = arrays["cotangent"][rows]
    dweights = np.einsum("qhd,khd->hqk", cotangent, value, optimize=True)
    dlogits = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True)) / case.depth**0.5
    dquery = np.zeros_like(query)
    dquery[rows] = np.einsum("hqk,khd->qhd", dlogits, key, optimize=True)
    dkey = np.einsum("hqk,qhd->khd", dlogits, query[rows], optimize=True)
    return [dquery, dkey, np.einsum("hqk,qhd->khd", weights, cotangent, optimize=True)]


def visible(case: Case, extras: dict[str, np.ndarray], entry: int, rows: np.ndarray) -> np.ndarray:
    """Where the checked queries of a batch entry see a key."""
    keys = np.arange(case.keys)
    if case.kind == "causal":
        return keys <= rows[:, None]
    if case.kind == "lengths":
        return keys < extras["lengths"][entry]
    if case.kind == "keys":
        return extras["mask"][entry, 0] != 0
    return np.ones(1, bool)


def key_lengths(case: Case) -> np.ndarray:
    """How many keys each batch entry has where some are padding: from a half to all."""
    return (np.linspace(0.5, 1, case.batch) * case.keys).astype(np.int32)


def take_turns(side: Side, calls: dict[str, Callable[[], Any]], chunk: float) -> dict[str, list[float]]:
    """Seconds of a call, several readings of each; one after another, so that all meet the same clocks."""
    readings: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: max(1, min(200, round(chunk / reading(side, call, 1)))) for name, call in calls.items()}
    start = time.perf_counter()
    for turn in range(ROUNDS):
        if turn and time.perf_counter() - start > LIMIT:
            break
        for name, call in calls.items():
            readings[name].append(reading(side, call, counts[name]))
    return readings


def reading(side: Side, call: Callable[[], Any], count: int) -> float:
    """Seconds of a call, the mean of so many that are given to the device in one go."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    side.wait(result)
    return (time.perf_counter() - start) / count


def matrix_product(side: Side, product: Callable[[], Any], size: int) -> float:
    """TFLOP/s of a product of square matrices."""
    reading(side, product, 3)
    return 2 * size**3 / statistics.median(reading(side, product, 10) for _ in range(5)) / 1e12


def choosing(explain: Callable[[], Any]) -> float:
    """Microseconds of one `explain`."""
    explain()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(100):
            explain()
        times.append((time.perf_counter() - start) / 100)
    return statistics.median(times) * 1e6
