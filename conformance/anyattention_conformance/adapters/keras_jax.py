"""Keras's attention on its backend jax."""

from anyattention_conformance.adapters import keras_ops

attention = keras_ops.on("jax")
