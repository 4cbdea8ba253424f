"""JAX: the steps are Flax's own calls, so that the traced program, and with it every bit, is Flax's."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anyattention.backend import Backend

Array = Any


class JAXBackend(Backend):
    """Overrides for JAX arrays and tracers."""

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """Reason: bits. Placement is left to JAX, which moves guests to where they are used."""
        return jnp.asarray(guest)

    def check_array(self, x: Array) -> Array:
        """Reason: missing. Flax variables and the like turn into arrays by ``__jax_array__``."""
        return jnp.asarray(x)

    def key_data(self, key: Any) -> Any:
        """Reason: missing. A typed key hides its words; only threefry's can be drawn from elsewhere."""
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if str(jax.random.key_impl(key)) != "threefry2x32":
                raise TypeError(
                    f"keys of kind {jax.random.key_impl(key)} can be used with JAX arrays only: make the key with "
                    "jax.random.key(seed, impl='threefry2x32') or anyattention.random.key(seed)"
                )
            key = jax.random.key_data(key)
        return np.asarray(key)

    def adopt_key(self, words: Any) -> Any:
        """Reason: bits. JAX reads raw words itself."""
        return words

    def cast(self, x: Array, name: str) -> Array:
        """Reason: bits. ``astype`` is Flax's cast."""
        return x if x.dtype.name == name and not x.weak_type else x.astype(name)

    def promote(self, arrays: Sequence[Array], dtype: Any = None) -> tuple[list[Array], str]:
        """Reason: bits. JAX's flags and weak types decide here, as in Flax."""
        if dtype is None:
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.result_type(*arrays)
                if not jnp.issubdtype(dtype, jnp.inexact):
                    dtype = jnp.promote_types(jnp.float32, dtype)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"Dtype must be inexact: {dtype!r}; pass a floating or complex dtype, or None to infer it")
        arrays = [jnp.asarray(x, dtype) for x in arrays]
        return arrays, arrays[0].dtype.name

    def join(self, x: Array, y: Any) -> tuple[Array, Any]:
        """Reason: bits. JAX promotes weakly typed values too; ranks are made equal here, casts explicit."""
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(x, y)
        y = jnp.asarray(y)
        x, y = (z if z.dtype == dtype else z.astype(dtype) for z in (x, y))
        if 0 < y.ndim < x.ndim:
            y = jnp.expand_dims(y, tuple(range(x.ndim - y.ndim)))
        elif x.ndim < y.ndim:
            x = jnp.expand_dims(x, tuple(range(y.ndim - x.ndim)))
        return x, y

    def scale(self, query: Array, depth: int, dtype: str) -> Array:
        """Reason: bits. XLA sees the root as Flax writes it."""
        return query / jnp.sqrt(depth).astype(query.dtype)

    def divide_by_scalar(self, x: Array, value: Any, dtype: str) -> Array:
        """Reason: bits."""
        return x / jnp.asarray(value, dtype=x.dtype)

    def contract(self, equation: str, x: Array, y: Array, precision: Any = None, dot_general: Any = None) -> Array:
        """Reason: bits. A matrix product of permuted axes rounds differently from Flax's einsum."""
        kwargs: dict[str, Any] = {}
        if dot_general:
            kwargs["_dot_general"] = dot_general
        if x.dtype != y.dtype:
            with jax.numpy_dtype_promotion("standard"):
                return jnp.einsum(equation, x, y, precision=precision, **kwargs)
        return jnp.einsum(equation, x, y, precision=precision, **kwargs)

    def truth(self, mask: Array) -> Array:
        """Reason: bits. The same test for zero that ``jnp.where`` makes."""
        return mask if mask.dtype == bool else mask != jnp.zeros((), mask.dtype)

    def where(self, mask: Array, x: Array, fill: Any) -> Array:
        """Reason: bits. ``jnp.where`` takes the mask as it is."""
        return jnp.where(mask, x, np.asarray(fill).astype(x.dtype))

    def lowest(self, dtype: str) -> Any:
        """Reason: missing. JAX has more floating dtypes than the table of `dtypes`."""
        return jnp.finfo(dtype).min

    def softmax(self, logits: Array) -> Array:
        """Reason: bits, of the gradient above all: it has a derivative rule of its own."""
        return jax.nn.softmax(logits)

    def keep(self, key: Any, keep_prob: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Reason: bits. Every kind of key, under the flags in force."""
        return jax.random.bernoulli(key, keep_prob, shape)


backend = JAXBackend(jnp)
