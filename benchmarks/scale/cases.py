"""What is measured: the lengths, on how many devices, and by which exchange."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from anyattention_conformance import truth

ROWS = 6  # that are checked
#: Of an error, see `error`.
BOUNDS = {"float32": 2e-5, "bfloat16": 3e-2}
ONE = "one"  # in place of an exchange: one process, and all of its cores
IN_ORDER = "causal, in order"  # a window as long as the sequence, which is spread as it lies and not in zigzag


@dataclass(frozen=True)
class Case:
    """One call of ``[batch, length, heads, depth]``."""

    length: int
    devices: int
    kind: str = "full"  # or causal; or IN_ORDER
    gradient: bool = False
    exchange: str = "ring"  # or gather; "", without sequence_axis; ONE
    implementation: str | None = None  # where there is no exchange
    heads: int = 4
    depth: int = 64
    dtype: str = "float32"

    def __str__(self) -> str:
        exchange = self.exchange or self.implementation
        return f"{self.length} on {self.devices}, {self.kind}{', with gradient' * self.gradient}: {exchange}"

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, self.length, self.heads, self.depth


class Scale(NamedTuple):
    """How large everything is."""

    each: int  # of the length on a device, where both grow
    strong: int  # the length that is cut into ever more parts
    torch: int  # the length over ranks
    memory: tuple[tuple[int, int], ...]  # lengths and devices of programs that are compiled and not run
    counted: tuple[tuple[int, int], ...]  # lengths and devices of programs that count what they compute
    dtype: str


CPU = Scale(2048, 8192, 8192, ((16384, 4), (32768, 8), (131072, 8), (262144, 16)), ((4096, 4), (8192, 8)), "float32")
ACCELERATORS = CPU._replace(each=16384, strong=65536, torch=65536, dtype="bfloat16")
QUICK = Scale(64, 128, 128, ((512, 4),), ((256, 4),), "float32")


def sizes(most: int) -> list[int]:
    """The powers of two up to a number of devices."""
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def timed(scale: Scale, most: int) -> list[Case]:
    """Weak scaling, where the length grows with the devices, and strong scaling, where it does not."""
    lengths = [(scale.each * n, n) for n in sizes(most)[1:]] + [(scale.strong, n) for n in sizes(most)[1:]]
    return [
        Case(length, devices, kind, gradient, dtype=scale.dtype)
        for length, devices in dict.fromkeys(lengths)
        for kind in ("full", "causal")
        for gradient in (False, True)
    ]


def asked(case: Case) -> dict[str, Any]:
    """The arguments beside arrays and what says how they are spread."""
    if case.kind == IN_ORDER:
        from anyattention import masks

        return {"mask": masks.LocalMask(case.length, 0)}
    return {"is_causal": case.kind == "causal"}


def inputs(case: Case) -> list[np.ndarray]:
    """Query, key and value, in float32."""
    random = np.random.default_rng(0)
    return [random.standard_normal(case.shape, dtype=np.float32) for _ in range(3)]


def rows(case: Case) -> np.ndarray:
    """The queries that are checked, the first and the last among them."""
    return np.linspace(0, case.length - 1, ROWS).astype(int)


def expected(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """The output of these in float64, and of the sum of its squares the gradient by them.

    With each number the sum of the absolute values of what was added to give it, to which rounding is proportional.
    """
    import ml_dtypes

    chosen, dtype = rows(case), np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    query, key, value = (x.astype(dtype).astype(np.float64) for x in inputs(case))
    given = {"query": query[:, chosen], "key": key, "value": value}
    if case.kind != "full":
        given["mask"] = (np.arange(case.length) <= chosen[:, None])[None, None]
    output = truth(given, "float64")[0].output
    right, size = truth(given, "float64", 2 * output if case.gradient else None)
    found = [(right.output, size.output)]
    return [*found, (right.gradients["query"], size.gradients["query"])] if case.gradient else found


def error(found: list[np.ndarray], right: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The largest, relative to what was added; infinity where something is not finite."""
    pairs = zip(found, right, strict=True)
    return max(float(np.max(np.abs(x - y) / size)) if np.isfinite(x).all() else float("inf") for x, (y, size) in pairs)


def apart(found: list[np.ndarray], other: list[np.ndarray]) -> float:
    """How far two have the gradients of keys and values from each other, relative to the largest number."""
    pairs = zip(found, other, strict=True)
    return max((float(np.max(np.abs(x - y)) / np.max(np.abs(y))) for x, y in pairs), default=0.0)
