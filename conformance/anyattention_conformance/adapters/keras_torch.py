"""Keras's attention on its backend torch."""

from anyattention_conformance.adapters import keras_ops

attention = keras_ops.on("torch")
