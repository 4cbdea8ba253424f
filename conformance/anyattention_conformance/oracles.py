"""What is right: Flax itself, called live."""

from typing import Any

import numpy as np

Array = Any


def flax_attention(**arguments: Any) -> Array:
    """``flax.linen.dot_product_attention`` on these arguments, eagerly; the answer as a NumPy array."""
    import flax.linen
    import jax.numpy as jnp

    placed = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    return np.asarray(flax.linen.dot_product_attention(**placed))
