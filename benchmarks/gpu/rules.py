"""Calls as they are in use, which the kit lacks: masks by rule, queries that see nothing, biases that stand for masks.

Of lengths that kernels divide into several tiles; and dropout, of depths that FlexAttention takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np

import anyattention
from anyattention.masks import CausalMask, LengthMask, LocalMask, Mask, SegmentMask
from anyattention_conformance.case import Case
from anyattention_conformance.oracles import Golden, Live
from anyattention_conformance.truth import Answer

QUERY, KEY = (2, 256, 4, 64), (2, 384, 4, 64)
LENGTHS, QUERY_LENGTHS = np.array([0, 300]), np.array([256, 7])


def segments() -> Mask:
    """Four segments of queries, the last two without keys."""
    return SegmentMask(np.tile(np.arange(256) // 64, (2, 1)), np.tile(np.arange(384) // 200, (2, 1)))


#: Each mask is made where it is used: JAX takes only those apart that are made after it was imported, which the process
#: of a framework does after it has imported this.
MASKS: dict[str, Callable[[], Mask]] = {
    "causal": CausalMask,
    "causal-offset": lambda: CausalMask(3),
    "window": lambda: LocalMask(130, 9),
    "window-left": lambda: LocalMask(200, 0),
    "lengths": lambda: LengthMask(LENGTHS),
    "lengths-of-both": lambda: LengthMask(LENGTHS, QUERY_LENGTHS),
    "causal-lengths": lambda: CausalMask() & LengthMask(LENGTHS),
    "window-lengths": lambda: LocalMask(130, 9) & LengthMask(LENGTHS),
    "segments": segments,
    "causal-segments": lambda: CausalMask() & segments(),
    "not-causal": lambda: ~CausalMask(200),
}
PADDING = ("bias", (..., slice(0, 130)), "min")  # the first tiles are hidden
PADDED_ROWS = ("bias", (0, 0, slice(5, 9)), "min")


@dataclass(frozen=True)
class Ruled(Case):
    """One case of the kit, whose mask is one by rule, or whose bias is held constant, as one that is no parameter."""

    rule: str = ""
    constant: bool = False

    def inputs(self, dtype: str = "float32", bias_dtype: str | None = None) -> dict[str, Any]:
        """The arguments; the mask as an array."""
        arguments = super().inputs(dtype, bias_dtype)
        if self.rule:
            arguments["mask"] = np.asarray(MASKS[self.rule]().to_array(self.query[-3], self.key[-3]))
        return arguments

    def given(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called so."""

        @wraps(anyattention.dot_product_attention)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.rule:
                kwargs["mask"] = MASKS[self.rule]()
            if self.constant:
                bias = kwargs["bias"]
                kwargs["bias"] = bias.detach() if hasattr(bias, "detach") else stop_gradient(bias)
            return function(*args, **kwargs)

        return call


def stop_gradient(x: Any) -> Any:
    """A JAX array as a constant."""
    import jax

    return jax.lax.stop_gradient(x)


def _cases() -> tuple[Ruled, ...]:
    common: dict[str, Any] = {"query": QUERY, "key": KEY, "v_depth": 64}
    rows, keys = {"bias": (2, 4, 256, 384)}, {"bias": (2, 1, 1, 384)}
    low: dict[str, Any] = {**common, **rows, "constant": True}
    return (
        *(Ruled(f"rule-{name}", "rules", **common, rule=name) for name in MASKS),
        Ruled("rule-causal-bias", "rules", **common, **rows, rule="causal"),
        Ruled("rule-lengths-bias", "rules", **common, **keys, rule="lengths"),
        Ruled("rule-causal-dropout", "dropout", **common, dropout=0.1, rule="causal"),
        Ruled("rule-lengths-dropout", "dropout", **common, dropout=0.5, rule="lengths-of-both"),
        Ruled("dropout-heads", "dropout", **common, dropout=0.1, broadcast_dropout=False),
        Ruled("low-bias", "low biases", **low, edits=(PADDING,)),
        Ruled("low-bias-rows", "low biases", **low, edits=(PADDING, PADDED_ROWS)),
        Ruled("low-bias-lengths", "low biases", **low, edits=(PADDING, PADDED_ROWS), rule="lengths"),
        Ruled("low-bias-everywhere", "low biases", **low | keys, edits=(("bias", ..., "min"),)),
    )


CASES = _cases()
#: In float32 and float16 too; all are in bfloat16.
IN_ALL_DTYPES = (
    "rule-causal",
    "rule-lengths",
    "rule-segments",
    "rule-causal-bias",
    "rule-lengths-dropout",
    "low-bias-rows",
    "low-bias-lengths",
)


class Answers(Golden):
    """What Flax answers: recorded, or live on the CPU where nothing is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[tuple[str, str], Answer | str] = {}

    def answer(self, case: Case, dtype: str) -> Answer | str:
        """The output and the gradients."""
        if not isinstance(case, Ruled):
            return super().answer(case, dtype)
        run = case.id, dtype
        if run not in self.answers:
            import jax

            jax.config.update("jax_platforms", "cpu")  # this process leaves the GPU to the others
            self.answers[run] = Live().answer(case, dtype)
            if case.constant and isinstance(answer := self.answers[run], Answer):
                answer.gradients.pop("bias")
        return self.answers[run]
