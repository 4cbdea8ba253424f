"""JAX's arrays and tracers. Whatever decides about bits is JAX's own: its flags, its weak types, its placement."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anyattention.extend import Arrays


class JAXArrays(Arrays):
    narrow = True

    def platform(self, x: Array) -> str:
        """That of a concrete array; of a tracer, which has no device, that where the program will run by default."""
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return next(iter(x.devices())).platform
        return default_platform()

    def run(self, like: Array | None, function: Callable[..., Any], /, *args: Any) -> Any:
        """JAX's strict modes of promotion are for the caller's arithmetic: attention mixes ranks and dtypes."""
        if (jax.config.jax_numpy_rank_promotion, jax.config.jax_numpy_dtype_promotion) == ("allow", "standard"):
            return function(*args)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args)

    def outline(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Shapes (`jax.ShapeDtypeStruct`) stand for arrays where the function is traced."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]
        if not shapes:
            return function(**arguments)
        results = []

        def traced(*arrays: Array) -> None:
            for i, x in zip(shapes, arrays, strict=True):
                leaves[i] = x
            results.append(function(**structure.unflatten(leaves)))

        jax.eval_shape(traced, *(leaves[i] for i in shapes))
        return results[0]

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """JAX may read NumPy's memory after the call, so it gets a copy; placement is left to JAX."""
        return jnp.asarray(guest.copy() if isinstance(guest, np.ndarray) else guest)

    def beside(self, like: Array | None) -> dict[str, Any]:
        """A tracer has no device, and the sharding of one array does not fit another."""
        return {}

    def check_array(self, x: Array, like: Array | None = None) -> Array:
        """Flax variables and the like turn into arrays by ``__jax_array__``."""
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError("a jax.ShapeDtypeStruct has no values: explain takes it, and jax.eval_shape any function")
        return x if isinstance(x, jax.Array) else jnp.asarray(x)

    def own(self, x: Array) -> Array:
        """Arrays never change."""
        return x

    def key_data(self, key: Any) -> Any:
        """A typed key hides its words; only threefry's can be drawn from elsewhere."""
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if str(jax.random.key_impl(key)) != "threefry2x32":
                raise TypeError(
                    f"keys of kind {jax.random.key_impl(key)} can be used with JAX arrays only: make the key with "
                    "jax.random.key(seed, impl='threefry2x32') or anyattention.random.key(seed)"
                )
            key = jax.random.key_data(key)
        return np.asarray(key)

    def adopt_key(self, words: Any) -> Any:
        """JAX reads raw words itself."""
        return words

    def cast(self, x: Array, name: str) -> Array:
        """``astype`` is Flax's cast."""
        return x if x.dtype.name == name and not x.weak_type else x.astype(name)

    def promote(self, arrays: Sequence[Array], dtype: Any = None) -> tuple[list[Array], str]:
        """JAX's flags and weak types decide here, as in Flax."""
        first = arrays[0].dtype
        alike = dtype is None and all(x.dtype == first and not x.weak_type for x in arrays)
        if alike and jnp.issubdtype(first, jnp.inexact):  # nothing to ask, which takes JAX long
            return list(arrays), first.name
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
        """JAX promotes weakly typed values too; ranks are made equal here, casts explicit."""
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(x, y)
        y = jnp.asarray(y)
        x, y = (z if z.dtype == dtype else z.astype(dtype) for z in (x, y))
        if 0 < y.ndim < x.ndim:
            y = jnp.expand_dims(y, tuple(range(x.ndim - y.ndim)))
        elif x.ndim < y.ndim:
            x = jnp.expand_dims(x, tuple(range(y.ndim - x.ndim)))
        return x, y

    def traced(self, x: Array) -> bool:
        return isinstance(x, jax.core.Tracer)

    def truth(self, mask: Array) -> Array:
        """The same test for zero that ``jnp.where`` makes."""
        return mask if mask.dtype == bool else mask != jnp.zeros((), mask.dtype)


@cache
def register(kind: Any) -> None:
    """Let rules of a class, which are dataclasses, through jit, vmap and grad; numbers and functions are static."""
    names = [field.name for field in fields(kind)]

    def flatten(rule: Any) -> tuple[list[Any], tuple[Any, ...]]:
        values = [getattr(rule, name) for name in names]
        given = zip(names, values, strict=True)
        static = tuple(x if name == "function" or isinstance(x, int | float | str) else None for name, x in given)
        return [x if fixed is None else None for x, fixed in zip(values, static, strict=True)], static

    def unflatten(static: tuple[Any, ...], leaves: list[Any]) -> Any:
        rule: Any = object.__new__(kind)
        values = (leaf if fixed is None else fixed for leaf, fixed in zip(leaves, static, strict=True))
        vars(rule).update(zip(names, values, strict=True))
        return rule

    jax.tree_util.register_pytree_node(kind, flatten, unflatten)


def is_symbol(size: Any) -> bool:
    """Whether a size is a symbol of `jax.export`, of which comparisons may raise."""
    return not isinstance(size, int | np.integer)


def default_platform() -> str:
    """The platform of `jax.default_device`, a device or a platform's name, else of the default backend."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
