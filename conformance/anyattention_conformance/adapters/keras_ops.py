"""``keras.ops.dot_product_attention``. Keras has one backend in a process, chosen before it is imported."""

import importlib
import os
from collections.abc import Callable
from typing import Any

from anyattention_conformance.adapters.layouts import batches, one_batch, one_batch_of_logits

Array = Any


def on(backend: str) -> Callable[..., Array]:
    """Keras's attention on its backend numpy, jax or torch. ImportError if Keras has started on another one."""
    os.environ["KERAS_BACKEND"] = backend
    import keras

    if keras.config.backend() != backend:
        raise ImportError(f"keras runs on {keras.config.backend()} in this process, not on {backend}")
    broadcast_to = importlib.import_module("jax.numpy" if backend == "jax" else backend).broadcast_to

    def attention(
        query: Array, key: Array, value: Array, bias: Array = None, mask: Array = None, *, scale: float | None = None
    ) -> Array:
        """Attention over ``[batch..., length, heads, depth]``."""
        batch = query.shape[:-3]
        bias, mask = (one_batch_of_logits(x, batch, broadcast_to) for x in (bias, mask))
        arrays = one_batch(query, key, value)  # its attn_logits_soft_cap is for TPUs alone, and refused elsewhere
        output = keras.ops.dot_product_attention(*arrays, bias=bias, mask=mask, scale=scale)
        return batches(output, batch)

    return attention
