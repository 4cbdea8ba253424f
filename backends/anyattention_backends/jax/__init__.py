"""JAX: the steps are Flax's own calls, so that the traced program, and with it every bit, is Flax's."""

import jax.numpy as jnp

from anyattention.extend import Backend, Mask
from anyattention_backends.jax.arrays import JAXArrays, register
from anyattention_backends.jax.cudnn import CuDNN
from anyattention_backends.jax.splash import Splash
from anyattention_backends.jax.steps import JAXSteps
from anyattention_backends.jax.tiles import JAXTiles
from anyattention_backends.jax.tokamax import Tokamax

backend = Backend(jnp, JAXArrays, JAXSteps, JAXTiles)
backend.engines = (CuDNN(), Tokamax(), Splash())
for kind in Mask.__subclasses__():  # those that were made before JAX was imported are pytrees from now on
    register(kind)  # type: ignore[arg-type]  # mypy asks the instances for a hash
