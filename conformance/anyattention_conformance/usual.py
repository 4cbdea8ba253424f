"""The usual calls of attention, their answers in float64, and how far from these Flax is.

Flax's own errors are recorded, so that its yardstick is there without JAX: ``python -m anyattention_conformance.usual``
records them again.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import anyattention
from anyattention_conformance.budgets import EPS, Comparison, Errors, by_errors, errors, errors_of, unit_of
from anyattention_conformance.oracles import flax_answer
from anyattention_conformance.truth import NAMES, Answer, truth

Array = Any
BATCH, HEADS, DEPTH = 2, 8, 64
SHOWN = (0, HEADS - 1)  # the heads that are compared with the truth, which takes a quarter of the time of all
RATE = 0.1  # of dropout
SHARP = 3  # times the query: means of hundreds of random values are near zero, beside which no error would show
VISIBLE = 0.75  # of the keys, in the batch entry that is padded
DTYPES = ("float32", "bfloat16")
RECORDED = Path(__file__).parent / "golden" / "flax-errors.json"


@dataclass(frozen=True)
class Usual:
    """A call as models make it, ``[2, length, 8, 64]``, with inputs from a seed."""

    name: str
    queries: int = 512
    keys: int = 512
    kind: str = ""  # "causal", "lengths", "bias" or "dropout"

    @property
    def shape(self) -> str:
        """The shape of the query, and the number of keys where it is another."""
        keys = f", {self.keys} keys" if self.keys != self.queries else ""
        return f"{BATCH}x{self.queries}x{HEADS}x{DEPTH}{keys}"

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """Query, key, value, cotangent, and bias if there is one: numbers of bfloat16, in float32."""
        random = np.random.default_rng(0)
        query, key = ((BATCH, length, HEADS, DEPTH) for length in (self.queries, self.keys))
        shapes = {"query": query, "key": key, "value": key, "cotangent": query}
        if self.kind == "bias":
            shapes["bias"] = (1, HEADS, self.queries, self.keys)
        found = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        found["query"] *= SHARP
        return {name: (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for name, x in found.items()}

    @property
    def lengths(self) -> Array:
        """Visible keys of each batch entry."""
        return np.array([int(VISIBLE * self.keys), self.keys], np.int32)

    def options(self) -> dict[str, Any]:
        """The other arguments, as a user of anyattention writes them."""
        if self.kind == "causal":
            return {"is_causal": True}
        if self.kind == "lengths":
            return {"mask": anyattention.masks.LengthMask(self.lengths)}
        if self.kind == "dropout":
            return {"dropout_rate": RATE, "dropout_rng": anyattention.random.key(0)}
        return {}

    def for_flax(self) -> dict[str, Any]:
        """The arguments as Flax takes them, of the heads that are compared."""
        found = {name: heads(name, x) for name, x in self.arrays.items() if name != "cotangent"}
        if self.kind == "causal":
            found["mask"] = np.tri(self.queries, self.keys, dtype=bool)
        if self.kind == "lengths":
            found["mask"] = (np.arange(self.keys) < self.lengths[:, None])[:, None, None]
        if self.kind == "dropout":  # which Flax broadcasts over heads
            found |= {"dropout_rate": RATE, "dropout_rng": np.array([0, 0], np.uint32)}
        return found


USUAL = (
    Usual("self-attention"),
    Usual("causal", kind="causal"),
    Usual("padding", kind="lengths"),
    Usual("bias", kind="bias"),
    Usual("dropout", kind="dropout"),
    Usual("decoding", queries=1, keys=4096, kind="lengths"),
)


def heads(name: str, x: Array) -> Array:
    """The heads of an array that are compared."""
    return x[:, SHOWN, :, :] if name == "bias" else x[:, :, SHOWN, :]


class Judge:
    """Compares answers with the truth, by contract C3, in a dtype: with Flax's own error as the yardstick."""

    def __init__(self, call: Usual, dtype: str) -> None:
        self.dtype = dtype
        self.truth, self.size = truth(call.for_flax(), dtype, heads("cotangent", call.arrays["cotangent"]))
        self.flax = {name: Errors(*x) for name, x in recorded()["errors"][f"{call.name} {dtype}"].items()}

    def wrong(self, answers: dict[str, Array]) -> tuple[str, float]:
        """What is most wrong with answers by name, "output" or the array whose gradient it is, and by how many eps
        beyond what the contract allows; an empty text if nothing.
        """
        worst = "", 0.0
        for name, x in answers.items():
            if not np.isfinite(x).all():
                return f"{of(name)} is not finite", math.inf
            found = self.compared(name, heads(name, x))
            if found.message and found.error is not None and found.flax_error is not None:
                beyond = (found.error - 2 * found.flax_error) / EPS[self.dtype] - 4
                worst = max(worst, (f"{of(name)}: {found.message}", beyond), key=lambda x: x[1])
        return worst

    def compared(self, name: str, x: Array) -> Comparison:
        """How one answer compares."""
        right, size = (numbers(answer, name) for answer in (self.truth, self.size))
        return by_errors(errors(x, right, unit_of(size, self.dtype)), self.flax[name], self.dtype)


def of(name: str) -> str:
    """What an answer is, in words."""
    return name if name == "output" else f"the gradient of {name}"


def numbers(answer: Answer, name: str) -> Array:
    """The output or a gradient."""
    return answer.output if name == "output" else answer.gradients[name]


def recorded() -> dict[str, Any]:
    """Flax's errors, and of which versions they are."""
    return json.loads(RECORDED.read_text())


def flax_errors(call: Usual, dtype: str) -> dict[str, Errors]:
    """How far the installed Flax is from the truth, on JAX's default device."""
    import jax.numpy as jnp

    arguments, cotangent = call.for_flax(), heads("cotangent", call.arrays["cotangent"])
    right, size = truth(arguments, dtype, cotangent)
    placed = {name: np.asarray(jnp.asarray(x, dtype)) if name in NAMES else x for name, x in arguments.items()}
    answer = flax_answer(placed, cotangent)
    names = ("output", *answer.gradients)
    return {
        name: errors_of(numbers(answer, name), numbers(right, name), unit_of(numbers(size, name), dtype))
        for name in names
    }


def record(path: Path = RECORDED) -> None:
    """Write the errors of the installed Flax to a file."""
    import flax
    import jax

    found = {
        f"{call.name} {dtype}": {
            name: [float(f"{x:.4g}") for x in pair] for name, pair in flax_errors(call, dtype).items()
        }
        for call in USUAL
        for dtype in DTYPES
    }
    about = {"flax": flax.__version__, "jax": jax.__version__, "errors": found}
    path.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    record()
