"""One case in one process: every contestant is checked, then they take turns, and the median counts."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from anyattention_conformance import truth
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


class Expected(NamedTuple):
    """The truth about a few queries, or about gradients of their outputs alone, so that it needs but their logits."""

    rows: np.ndarray
    cotangent: Array  # with zeros in all other rows
    answers: dict[int, list[np.ndarray]]  # by batch entry, of its first and last head


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
    expected = expectation(side, case, inputs)
    ready: dict[str, tuple[Callable[[], Any], Figures]] = {}
    for name, function in functions.items():
        yield {"at": name}
        run, figures = checked(side, case, inputs, expected, name, function)
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
    side: Side, case: Case, inputs: dict[str, Any], expected: Expected, name: str, function: Function
) -> tuple[Callable[[], Any] | None, Figures]:
    """A contestant that is ready to be timed, and its figures so far; None in its place if it is not to be."""
    figures: Figures = {}
    if name == "Flax" and (size := flax_bytes(case)) > 0.4 * side.memory:
        return None, {"skipped": f"{size / 1e9:.3g} GB of logits"}
    try:
        if name.startswith("ours"):
            plan = explainer(case, inputs, "fused" if name == "ours, fused" else None)()
            if plan.implementation is None:
                return None, {"refused": "; ".join(plan.reasons)}
            figures = {"implementation": plan.implementation}
            figures |= {"engine": plan.engine} if plan.engine else {}
        call, peak = side.prepare(function, case, inputs)
        error = error_of(side, case, expected, call)
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


def expectation(side: Side, case: Case, inputs: dict[str, Any]) -> Expected:
    """What all contestants of a case are held to."""
    rows = np.linspace(case.q_length // 8, case.q_length - 1, QUERIES).astype(int)
    cotangent = side.at(inputs["cotangent"], rows)
    answers = {}
    for entry in sorted({0, case.batch - 1}):
        sliced = {name: side.get(some(inputs[name], entry)) for name in ("query", "key", "value")}
        sliced["cotangent"] = side.get(some(cotangent, entry))
        logits_of = {name: side.get(x) for name, x in inputs["extras"].items() if name != "bias"}
        if case.kind == "bias":
            logits_of["bias"] = side.get(inputs["extras"]["bias"][0, :: step(case.heads)][:, rows])
        answers[entry] = right(case, sliced, logits_of, entry, rows)
    return Expected(rows, cotangent, answers)


def error_of(side: Side, case: Case, expected: Expected, call: Callable[[Array], Any]) -> float:
    """How far the answer is from the truth, in eps; infinite where it is not finite."""
    results = call(expected.cotangent)
    if not all(side.finite(x) for x in results):
        return math.inf
    worst = 0.0
    for entry, answers in expected.answers.items():
        for actual, wanted in zip(results, answers, strict=True):
            found = side.get(some(actual, entry))
            found = found if case.gradient else found[expected.rows]
            worst = max(worst, root_mean_square(found - wanted) / root_mean_square(wanted))
    return worst / EPS[case.dtype]


def some(x: Array, entry: int) -> Array:
    """The first and the last head of a batch entry."""
    return x[entry, :, :: step(x.shape[2])]


def step(heads: int) -> int:
    return max(heads - 1, 1)


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def right(
    case: Case, arrays: dict[str, np.ndarray], extras: dict[str, np.ndarray], entry: int, rows: np.ndarray
) -> list[np.ndarray]:
    """The output of some queries of a batch entry, or the gradients of them by query, key and value, in float64."""
    arguments = arrays | extras | {"query": arrays["query"][rows], "mask": visible(case, extras, entry, rows)}
    if not case.gradient:
        return [truth(arguments, case.dtype)[0].output]
    gradients = truth(arguments, case.dtype, arrays["cotangent"][rows])[0].gradients
    dquery = np.zeros_like(arrays["query"])
    dquery[rows] = gradients["query"]
    return [dquery, gradients["key"], gradients["value"]]


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
