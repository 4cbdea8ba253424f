"""JAX: the steps are Flax's own calls, so that the traced program, and with it every bit, is Flax's."""

import jax
import jax.numpy as jnp

from anyattention.extend import Backend, Bias, Mask
from anyattention_backends.jax.arrays import JAXArrays, register
from anyattention_backends.jax.cudnn import CuDNN
from anyattention_backends.jax.mesh import axis_of
from anyattention_backends.jax.splash import Splash
from anyattention_backends.jax.steps import JAXSteps
from anyattention_backends.jax.tiles import JAXTiles
from anyattention_backends.jax.tokamax import Tokamax

backend = Backend(jnp, JAXArrays, JAXSteps, JAXTiles)
backend.engines, backend.vjp, backend.axis = (CuDNN(), Tokamax(), Splash()), jax.vjp, axis_of
for kind in (
    *Mask.__subclasses__(),
    *Bias.__subclasses__(),
):  # those that were made before JAX was imported are pytrees from now on
    register(kind)  # type: ignore[arg-type]  # mypy asks the instances for a hash
