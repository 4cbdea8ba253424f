"""Keras's attention on its backend numpy."""

from anyattention_conformance.adapters import keras_ops

attention = keras_ops.on("numpy")
