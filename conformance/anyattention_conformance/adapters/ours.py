"""Our own attention, with its gradients for libraries that have none."""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import anyattention


def _of(implementation: Any) -> Callable[..., Any]:
    """The attention of one implementation."""
    function: Any = partial(anyattention.dot_product_attention, implementation=implementation)
    update_wrapper(function, anyattention.dot_product_attention)
    function.vjp = anyattention.dot_product_attention_vjp
    return function


exact, tiled, fused = (_of(implementation) for implementation in ("exact", "tiled", "fused"))
