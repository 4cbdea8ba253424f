"""Our own contestants, the same for every framework."""

from collections.abc import Callable
from typing import Any

import anyattention
from anyattention.masks import CausalMask, LengthMask
from benchmarks.gpu.cases import Case

Array = Any


def arguments(case: Case, extras: dict[str, Array]) -> dict[str, Any]:
    """Bias and mask as we take them."""
    if case.kind == "causal":
        return {"mask": CausalMask()}
    if case.kind == "lengths":
        return {"mask": LengthMask(extras["lengths"])}
    return extras


def attention(case: Case, implementation: str | None) -> Callable[..., Array]:
    """A contestant."""

    def call(query: Array, key: Array, value: Array, extras: dict[str, Array]) -> Array:
        given = arguments(case, extras)
        return anyattention.dot_product_attention(query, key, value, **given, implementation=implementation)

    return call


def explainer(case: Case, inputs: dict[str, Any], implementation: str | None) -> Callable[[], anyattention.Plan]:
    """`explain` of a call, ready to be called."""
    arrays = [inputs[name] for name in ("query", "key", "value")]
    given = arguments(case, inputs["extras"])
    return lambda: anyattention.explain(*arrays, **given, implementation=implementation)
