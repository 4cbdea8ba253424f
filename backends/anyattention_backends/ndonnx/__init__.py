"""ndonnx: the sizes that are known stay known, beside those that the exported ONNX model learns only when it runs."""

from anyattention.extend import Backend
from anyattention_backends.ndonnx.arrays import NDonnxArrays, xp

backend = Backend(xp, NDonnxArrays)
