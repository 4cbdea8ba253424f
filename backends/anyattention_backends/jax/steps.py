"""The steps of exact in JAX: Flax's own calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anyattention.extend import Steps
from anyattention_backends.jax.compat import is_ambiguous
from anyattention_backends.jax.placement import whole


class JAXSteps(Steps):
    def scale(self, query: Array, depth: int, dtype: str) -> Array:
        """XLA sees the root as Flax writes it."""
        return query / jnp.sqrt(depth).astype(query.dtype)

    def divide_by_scalar(self, x: Array, value: Any, dtype: str) -> Array:
        """By an array of the same dtype, as Flax does."""
        return x / jnp.asarray(value, dtype=x.dtype)

    def contract(self, equation: str, x: Array, y: Array, precision: Any = None, dot_general: Any = None) -> Array:
        """A matrix product of permuted axes rounds differently from Flax's einsum.

        Where Flax's is ambiguous to JAX, keys or values that explicit axes of a mesh shard by length are gathered.
        """
        options = {"_dot_general": dot_general} if dot_general else {}
        try:
            return jnp.einsum(equation, x, y, precision=precision, **options)
        except Exception as error:
            if not is_ambiguous(error):
                raise
            keys = equation.partition(",")[2].partition("->")[0].removeprefix("...")
            return jnp.einsum(equation, x, whole(y, -len(keys)), precision=precision, **options)

    def where(self, mask: Array, x: Array, fill: Any) -> Array:
        """``jnp.where`` takes the mask as it is."""
        return jnp.where(mask, x, np.asarray(fill).astype(x.dtype))

    def lowest(self, dtype: str) -> Any:
        """JAX has more floating dtypes than the project's own table."""
        return jnp.finfo(dtype).min

    def softmax(self, logits: Array) -> Array:
        """JAX's, whose gradient has other bits than that of the steps."""
        return jax.nn.softmax(logits)

    def keep(self, key: Any, keep_prob: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Every kind of key, under the flags in force."""
        return jax.random.bernoulli(key, keep_prob, shape)
