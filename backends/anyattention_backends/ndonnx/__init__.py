"""ndonnx: the sizes that are known stay known, beside those that the exported ONNX model learns only when it runs."""

from anyattention.extend import Backend
from anyattention_backends.ndonnx.arrays import NDonnxArrays, xp
from anyattention_backends.ndonnx.attention import OnnxAttention

backend = Backend(xp, NDonnxArrays)
backend.engines = (OnnxAttention(),)
