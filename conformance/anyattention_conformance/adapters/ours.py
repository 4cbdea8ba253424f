"""Our own attention, with its gradients for libraries that have none. An offset and a window become masks by rule."""

from collections.abc import Callable
from functools import partial
from typing import Any

import anyattention

Array = Any


def _of(implementation: Any) -> Callable[..., Any]:
    """The attention of one implementation."""
    function: Any = partial(_with_rules, partial(anyattention.dot_product_attention, implementation=implementation))
    function.vjp = partial(_with_rules, anyattention.dot_product_attention_vjp)
    return function


def _with_rules(
    function: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    mask: Array = None,
    *,
    offset: Any = None,
    window: tuple[int, int] | None = None,
    **options: Any,
) -> Any:
    if window is not None:
        mask = anyattention.masks.LocalMask(*window, 0 if offset is None else offset) & mask
    elif offset is not None:
        mask = anyattention.masks.CausalMask(offset) & mask
    return function(query, key, value, bias, mask, **options)


exact, tiled, fused = (_of(implementation) for implementation in ("exact", "tiled", "fused"))
