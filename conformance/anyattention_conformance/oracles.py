"""What is right: Flax itself, called live, and Flax's formula in float64."""

from typing import Any, NamedTuple

import numpy as np

Array = Any
NAMES = ("query", "key", "value", "bias")


class Answer(NamedTuple):
    """The output and, given a cotangent, the gradients by name, as NumPy arrays."""

    output: Array
    gradients: dict[str, Array]


def flax_attention(**arguments: Any) -> Array:
    """``flax.linen.dot_product_attention`` on these arguments, eagerly; the answer as a NumPy array."""
    import flax.linen
    import jax.numpy as jnp

    placed = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    return np.asarray(flax.linen.dot_product_attention(**placed))


def flax_answer(arguments: dict[str, Any], cotangent: Array) -> Answer:
    """Flax's output and gradients."""
    import flax.linen
    import jax
    import jax.numpy as jnp

    arrays = {name: jnp.asarray(arguments[name]) for name in NAMES if name in arguments}
    rest = {name: x for name, x in arguments.items() if name not in arrays}
    output, pullback = jax.vjp(lambda arrays: flax.linen.dot_product_attention(**arrays, **rest), arrays)
    (gradients,) = pullback(jnp.asarray(cotangent).astype(output.dtype))
    return Answer(np.asarray(output), {name: np.asarray(x) for name, x in gradients.items()})


def truth(arguments: dict[str, Any], dtype: str, cotangent: Array) -> tuple[Answer, Answer]:
    """Flax's formula in float64 on the same inputs, with the fill of `dtype`; and the size of the terms of each sum.

    The second answer has, for every element, the sum of the absolute values of what was added to give it: what an
    error is to be measured against.
    """
    import jax
    import jax.numpy as jnp

    keep = 1.0
    if rate := arguments.get("dropout_rate"):
        shape = np.broadcast_shapes(*(_logits_shape(arguments), np.shape(arguments.get("bias", 0.0))))
        shape = np.broadcast_shapes(shape, np.shape(arguments.get("mask", True)))
        if arguments.get("broadcast_dropout", True):
            shape = (*(1,) * (arguments["key"].ndim - 2), *shape[-2:])
        keep = np.asarray(jax.random.bernoulli(arguments["dropout_rng"], 1.0 - rate, shape)) / (1.0 - rate)
    fill = float(jnp.finfo(dtype).min)
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(arguments[name], np.float64) for name in NAMES if name in arguments}

        def weights_of(arrays: dict[str, Array]) -> Array:
            query = arrays["query"] / max(arrays["query"].shape[-1], 1) ** 0.5
            logits = jnp.einsum("...qhd,...khd->...hqk", query, arrays["key"])
            logits = logits + arrays.get("bias", 0.0)
            if "mask" in arguments:
                logits = jnp.where(arguments["mask"], logits, fill)
            return jax.nn.softmax(logits)

        def attend(arrays: dict[str, Array]) -> Array:
            return jnp.einsum("...hqk,...khd->...qhd", weights_of(arrays) * keep, arrays["value"])

        cotangent = jnp.asarray(cotangent, np.float64)
        output, pullback = jax.vjp(attend, arrays)
        (gradients,) = pullback(cotangent)

        size = {name: jnp.abs(x) for name, x in arrays.items()}
        weights = weights_of(arrays)
        kept = weights * keep
        output_size, of_values = jax.vjp(lambda v: jnp.einsum("...hqk,...khd->...qhd", kept, v), size["value"])
        dweights = jnp.einsum("...qhd,...khd->...hqk", jnp.abs(cotangent), size["value"]) * keep
        dlogits = weights * (dweights + (weights * dweights).sum(axis=-1, keepdims=True))
        if "mask" in arguments:
            dlogits = jnp.where(arguments["mask"], dlogits, 0.0)

        def logits_of(arrays: dict[str, Array]) -> Array:
            query = arrays["query"] / max(arrays["query"].shape[-1], 1) ** 0.5
            logits = jnp.einsum("...qhd,...khd->...hqk", query, arrays["key"])
            return jnp.broadcast_to(logits + arrays.get("bias", 0.0), dlogits.shape)

        (sizes,) = jax.vjp(logits_of, size)[1](dlogits)
        sizes["value"] = of_values(jnp.abs(cotangent))[0]

        def plain(tree: Any) -> Any:
            return jax.tree.map(np.asarray, tree)

        return Answer(plain(output), plain(gradients)), Answer(plain(output_size), plain(sizes))


def _logits_shape(arguments: dict[str, Any]) -> tuple[int, ...]:
    query, key = arguments["query"].shape, arguments["key"].shape
    return (*query[:-3], query[-2], query[-3], key[-3])
