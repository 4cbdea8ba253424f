"""Functions that can be differentiated once, in reverse mode, and say so where they are differentiated otherwise."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

Array = Any
# Called with what is no variable and what is, each a tree of arrays; returns an array.
Function = Callable[[Any, Any], Array]
INSTEAD = "pass implementation='tiled', or implementation='exact'"


def once(function: Function, name: str, mask: Any, arrays: Any) -> Array:
    """``function(mask, arrays)``, with one derivative by the arrays.

    Raises:
        NotImplementedError: it is differentiated in forward mode or twice; the message has the engine's name.
    """
    try:
        return _once(function, name, mask, jax.tree.map(partial(_no_forward, name), arrays))
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        return _no_tangent(engine=name)


def alike(*arrays: Array | None) -> list[Array | None]:
    """The arrays, each mapped over every axis over which `jax.vmap` maps any: cuDNN's rule for vmap wants all or none.

    XLA leaves out the selections, which have no choice, and their derivative is that of the array alone.
    """
    firsts = [x[(0,) * x.ndim] for x in arrays if x is not None and x.size]
    true = jnp.stack([first == first for first in firsts]).all()
    return [None if x is None else _either(true, x) for x in arrays]


@partial(jax.custom_jvp)
def _either(true: Array, x: Array) -> Array:
    return jax.lax.select(jnp.broadcast_to(true, x.shape), x, x)


def _either_jvp(primals: Any, tangents: Any) -> Any:
    return _either(*primals), tangents[1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _once(function: Function, name: str, mask: Any, arrays: Any) -> Array:
    return function(mask, arrays)


def _forward(function: Function, name: str, mask: Any, arrays: Any) -> tuple[Array, Any]:
    return jax.vjp(partial(function, mask), arrays)


def _backward(function: Function, name: str, pullback: Any, doutput: Array) -> tuple[None, Any]:
    return None, _last(name, pullback, doutput)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _last(name: str, pullback: Any, doutput: Array) -> Any:
    return pullback(alike(*jax.tree.leaves(pullback), doutput)[-1])[0]


def _no_second(name: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(f"the engine {name!r} has no second derivative: {INSTEAD}")


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _no_forward(engine: str, x: Array) -> Array:
    """The array, whose tangent may be transposed but not computed."""
    return x


def _to_transpose(engine: str, primals: Any, tangents: Any) -> Any:
    return primals[0], _tangent.bind(tangents[0], engine=engine)


def _no_tangent(*args: Any, engine: str) -> Any:
    raise NotImplementedError(f"the engine {engine!r} has no forward-mode derivative: {INSTEAD}")


_either.defjvp(_either_jvp)
_once.defvjp(_forward, _backward)
_last.defjvp(_no_second)
_no_forward.defjvp(_to_transpose)
_tangent = jax.extend.core.Primitive("tangent_of_fused")
_tangent.def_abstract_eval(lambda x, engine: x)
_tangent.def_impl(_no_tangent)
mlir.register_lowering(_tangent, _no_tangent)
ad.deflinear2(_tangent, lambda cotangent, x, engine: [cotangent])
batching.defvectorized(_tangent)
