"""Functions that JAX's checkpoint policies see as one operation.

The policies of `jax.checkpoint` ask of every product in a function, those in loops too, whether it may be kept: of all
tiles that would be the whole matrix of logits. A policy does not look into what stands here. All derivatives are JAX's
own: the derivative of such a function is again one, and so is its transpose.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.experimental import jet
from jax.interpreters import ad, batching, mlir

from anyattention_backends.jax.placement import placed_as

Function = Callable[..., Any]


def opaque(function: Function, *trees: Any) -> Any:
    """``function(*trees)``, of trees of arrays, as one operation."""
    arrays, structure = jax.tree.flatten(trees)
    found: list[Any] = []

    def flat(*arrays: Array) -> list[Array]:
        leaves, results = jax.tree.flatten(function(*structure.unflatten(arrays)))
        found[:] = [results]
        return leaves

    results = _bind(_call, flat, arrays)
    return found[0].unflatten(results)


def _bind(primitive: Any, function: Function, arrays: Sequence[Array], **parameters: Any) -> list[Array]:
    return primitive.bind(*arrays, jaxpr=jax.make_jaxpr(function)(*arrays), **parameters)


def _as_call(jaxpr: Any, *arrays: Array) -> list[Array]:
    return jax.extend.core.jaxpr_as_fun(jaxpr)(*arrays)


def _of_some(jaxpr: Any, which: tuple[bool, ...], primals: Sequence[Array]) -> tuple[Function, list[Array]]:
    """The function of those arguments alone that vary, and these."""

    def function(*varying: Array) -> list[Array]:
        rest = iter(varying)
        return _as_call(jaxpr, *(next(rest) if varies else x for x, varies in zip(primals, which, strict=True)))

    return function, [x for x, varies in zip(primals, which, strict=True) if varies]


def _as_tangent(jaxpr: Any, which: tuple[bool, ...], *arrays: Array) -> list[Array]:
    """The tangents of the results, from all arguments and the tangents of those that vary."""
    primals, tangents = arrays[: len(which)], arrays[len(which) :]
    function, varying = _of_some(jaxpr, which, primals)
    return jax.jvp(function, varying, list(tangents))[1]


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], jaxpr: Any) -> Any:
    results = _call.bind(*primals, jaxpr=jaxpr)
    which = tuple(not isinstance(x, ad.Zero) for x in tangents)
    given = [x for x in tangents if not isinstance(x, ad.Zero)]
    return results, _tangent.bind(*primals, *given, jaxpr=jaxpr, which=which)


def _jvp_of_tangent(primals: Sequence[Array], tangents: Sequence[Any], jaxpr: Any, which: tuple[bool, ...]) -> Any:
    results = _tangent.bind(*primals, jaxpr=jaxpr, which=which)
    varying = tuple(not isinstance(x, ad.Zero) for x in tangents)
    given = [x for x in tangents if not isinstance(x, ad.Zero)]
    whole = jax.make_jaxpr(lambda *arrays: _as_tangent(jaxpr, which, *arrays))(*primals)
    return results, _tangent.bind(*primals, *given, jaxpr=whole, which=varying)


def _transposed(cotangents: Sequence[Any], *arrays: Any, jaxpr: Any, which: tuple[bool, ...]) -> list[Any]:
    primals = arrays[: len(which)]
    there = [not isinstance(x, ad.Zero) for x in cotangents]
    given = [x for x in cotangents if not isinstance(x, ad.Zero)]

    def pull_back(*arrays: Array) -> list[Array]:
        rest = iter(arrays[len(which) :])
        function, varying = _of_some(jaxpr, which, arrays[: len(which)])
        results, pullback = jax.vjp(function, *varying)
        gradients = pullback([next(rest) if x else jnp.zeros_like(y) for x, y in zip(there, results, strict=True)])
        return list(map(placed_as, gradients, varying))

    return [None] * len(which) + _bind(_call, pull_back, [*primals, *given])


def _batched(primitive: Any, function: Function) -> Function:
    def rule(arrays: Sequence[Array], axes: Sequence[Any], **parameters: Any) -> Any:
        mapped = jax.vmap(lambda *arrays: function(*parameters.values(), *arrays), tuple(axes))
        results = mapped(*arrays) if primitive is _tangent else _bind(_call, mapped, arrays)
        return results, [0] * len(results)

    return rule


def _primitive(name: str, function: Function) -> Any:
    primitive = jax.extend.core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *arrays, **parameters: function(*parameters.values(), *arrays))
    primitive.def_abstract_eval(lambda *avals, jaxpr, **_: jaxpr.out_avals)
    mlir.register_lowering(
        primitive,
        mlir.lower_fun(lambda *arrays, **parameters: function(*parameters.values(), *arrays), multiple_results=True),
    )
    return primitive


def _no_series(*args: Any, **parameters: Any) -> Any:
    raise NotImplementedError("tiled has no jax.experimental.jet, which lacks loops: pass implementation='exact'")


_call = _primitive("attention", _as_call)
_tangent = _primitive("tangent_of_attention", _as_tangent)
ad.primitive_jvps[_call], ad.primitive_jvps[_tangent] = _jvp, _jvp_of_tangent
ad.primitive_transposes[_tangent] = _transposed
for primitive, function in ((_call, _as_call), (_tangent, _as_tangent)):
    batching.primitive_batchers[primitive] = _batched(primitive, function)
    jet.jet_rules[primitive] = _no_series
