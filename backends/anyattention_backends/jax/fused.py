"""What the kernels on JAX have in common: derivatives, and the choice at run time where biases are low."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import Array

from anyattention.extend import Call, Fused, Operands, tiled
from anyattention_backends.jax.once import once


class JAXKernel(Fused):
    """One kernel. Its first derivative is its own, in reverse mode; others raise."""

    platform: str  # as JAX names it; engines cache whether they are `absent`, since JAX takes long to say

    @property
    def platforms(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.platform,)

    def attend(self, call: Call) -> Array:
        """The kernel's answer; tiled's where biases are low, which a program decides when it runs."""
        query, key, value, bias, mask, *_, sinks = call.operands
        bias = None if bias is None else jnp.atleast_1d(jnp.asarray(bias, query.dtype))
        sound = None if bias is None else self._reached(call, jax.lax.stop_gradient(bias))
        if sound is not None and not isinstance(sound, jax.core.Tracer):
            if not sound:
                return tiled.compute(call)
            sound = None
        functions = partial(_mended, self, call.backend, call.options), partial(_tiled, call.backend, call.options)
        sinks = None if sinks is None else jnp.asarray(sinks, jnp.float32)  # of integers there is no derivative
        return once(*functions, f"the engine {self.name!r}", mask, (query, key, value, bias, sinks), sound)

    def _reached(self, call: Call, bias: Array) -> Array:
        """Whether no query's biases are all low."""
        call = replace(call, operands=call.operands._replace(bias=bias))
        if (step := self.sample(call)) == 1:
            return _all(self.reaches(call))
        by_some = _all(self.reaches(call, step))
        if not isinstance(by_some, jax.core.Tracer):
            return by_some if by_some else _all(self.reaches(call))
        return jax.lax.cond(by_some, lambda: jnp.array(True), lambda: _all(self.reaches(call)))


@partial(jax.jit, static_argnums=(0, 1, 2, 5))
def _mended(kernel: JAXKernel, backend: Any, options: Any, mask: Any, arrays: Any, trained: bool = False) -> Array:
    with jax.named_scope(f"anyattention engine {kernel.name}"):  # shows in errors of the compiler
        return kernel.mended(_call(backend, options, mask, arrays), trained)


def _tiled(backend: Any, options: Any, mask: Any, arrays: Any) -> Array:
    # A backward pass calls this outside of `run`.
    return backend.arrays.run(arrays[0], tiled.compute, _call(backend, options, mask, arrays))


def _call(backend: Any, options: Any, mask: Any, arrays: Any) -> Call:
    query, key, value, bias, sinks = arrays
    operands = Operands(query, key, value, bias, mask, sinks=sinks)
    return Call(backend=backend, operands=operands, options=options)


#: Whether all are true, of an axis of `jax.vmap` too, so that a branch stays one.
_all = jax.custom_batching.custom_vmap(lambda x: jnp.all(x))
_all.def_vmap(lambda size, mapped, x: (_all(x), False))


def plain(call: Call) -> bool:
    """Whether there is no bias and no mask but a causal one, a window to the left, and lengths."""
    found = call.structure
    return call.operands.bias is None and not found.rest and found.kv_ids is None and found.right in (None, 0)
