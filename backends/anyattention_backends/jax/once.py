"""Functions that can be differentiated once, in reverse mode, and say so where they are differentiated otherwise."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from anyattention_backends.jax.compat import lacks_forward_mode

# Called with what is no variable and what is, each a tree of arrays, maybe with `trained`; returns an array.
Function = Callable[..., Array]


class Name(NamedTuple):
    """Of a function in messages, and what to do where it has no such derivative."""

    text: str
    instead: str
    alike: bool  # whether its derivative wants all arrays mapped by `jax.vmap`, or none


def once(
    function: Function,
    other: Function,
    name: str,
    mask: Any,
    arrays: Any,
    sound: Array | None = None,
    instead: str = "pass implementation='tiled', or implementation='exact'",
    alike: bool = True,
) -> Array:
    """``function(mask, arrays)``, with one derivative by the arrays; where it is not `sound`, that of the `other`.

    The function is called in any case, so that what it keeps for its derivative is no result of a branch, which XLA
    would copy; with ``trained=True`` where there is to be a derivative.

    Raises:
        NotImplementedError: it is differentiated in forward mode or twice; the message says `instead` what to do.
    """
    of = Name(name, instead, alike)
    try:
        return _once(function, other, of, mask, sound, jax.tree.map(partial(_no_forward, of), arrays))
    except TypeError as error:
        if not lacks_forward_mode(error):
            raise
        return _no_tangent(name=of)


def alike(*arrays: Array | None) -> list[Array | None]:
    """The arrays, each mapped over every axis over which `jax.vmap` maps any: cuDNN's rule for vmap wants all or none.

    XLA leaves out the selections, which have no choice, and their derivative is that of the array alone.
    """
    firsts = [x[(0,) * x.ndim] for x in arrays if x is not None and x.size]
    true = jnp.stack([first == first for first in firsts]).all()
    return [None if x is None else _tied(true, x) for x in arrays]


_tied = jax.custom_jvp(lambda true, x: jax.lax.select(jnp.broadcast_to(true, x.shape), x, x))
_tied.defjvp(lambda primals, tangents: (_tied(*primals), tangents[1]))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _once(function: Function, other: Function, name: Name, mask: Any, sound: Array | None, arrays: Any) -> Array:
    return _either(sound, function(mask, arrays), partial(other, mask, arrays))


def _forward(function: Function, other: Function, name: Name, mask: Any, sound: Array | None, arrays: Any) -> Any:
    output, pullback = jax.vjp(partial(function, mask, trained=True), arrays)
    return _either(sound, output, partial(other, mask, arrays)), (pullback, mask, sound, arrays)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _last(name: Name, other: Function, kept: Any, doutput: Array) -> Any:
    pullback, mask, sound, arrays = kept
    gradients = partial(pullback, alike(*jax.tree.leaves(pullback), doutput)[-1] if name.alike else doutput)
    if sound is None:
        return gradients()[0]
    return jax.lax.cond(sound, gradients, lambda: jax.vjp(partial(other, mask), arrays)[1](doutput))[0]


def _either(sound: Array | None, output: Array, other: Callable[[], Array]) -> Array:
    return output if sound is None else jax.lax.cond(sound, lambda: output, other)


def _no_second(name: Name, other: Function, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(f"{name.text} has no second derivative: {name.instead}")


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _no_forward(name: Name, x: Array) -> Array:
    """The array, whose tangent may be transposed but not computed."""
    return x


def _no_tangent(*args: Any, name: Name) -> Any:
    raise NotImplementedError(f"{name.text} has no forward-mode derivative: {name.instead}")


_once.defvjp(_forward, lambda _, other, name, kept, doutput: (None, None, _last(name, other, kept, doutput)))
_last.defjvp(_no_second)
_tangent = jax.extend.core.Primitive("tangent_of_fused")
_no_forward.defjvp(lambda name, primals, tangents: (primals[0], _tangent.bind(tangents[0], name=name)))
_tangent.def_abstract_eval(lambda x, name: x)
_tangent.def_impl(_no_tangent)
mlir.register_lowering(_tangent, _no_tangent)
ad.deflinear2(_tangent, lambda cotangent, x, name: [cotangent])
batching.defvectorized(_tangent)
