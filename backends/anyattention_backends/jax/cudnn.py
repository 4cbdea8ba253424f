"""cuDNN's flash attention for NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from anyattention.extend import Call, Structure
from anyattention_backends.jax.compat import has_cudnn
from anyattention_backends.jax.fused import JAXKernel, plain
from anyattention_backends.jax.once import alike


class CuDNN(JAXKernel):
    """Fastest without a bias or an array as mask, which it reads as a bias of the whole logits' shape."""

    name = "cudnn"
    platform = "gpu"
    dtypes = ("bfloat16", "float16")
    multiple = 8
    one_depth = True
    even = True  # JAX, 0.10 to 0.12, refuses odd lengths in training as if every call had a bias

    @cached_property
    def absent(self) -> str:
        device = jax.devices()[0]
        if "NVIDIA" not in device.device_kind.upper():
            return f"it runs on NVIDIA's GPUs, not on {device.device_kind}"
        if float(device.compute_capability) < 8.0:
            return f"it needs compute capability 8.0, not {device.compute_capability}"
        return "" if has_cudnn() else "JAX finds no cuDNN: install jax[cuda12] or jax[cuda13]"

    @cached_property
    def most_depth(self) -> int:
        return 256 if float(jax.devices()[0].compute_capability) >= 9.0 else 128

    def rank(self, call: Call) -> int:
        return 0 if plain(call) else 1

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        if (depth := self.depths(call)[0]) > self.most_depth:
            yield f"depth {depth} is more than {self.most_depth}"
        rows, columns = call.lengths
        if (call.operands.bias is not None or mask.rest) and (rows | columns) % 2 == 1:
            yield "with a bias or an array as mask lengths must be even"
        if mask.rest and call.options.dtype == "float16":
            yield "its fill for hidden keys in float16 is within reach of logits"

    def lacks(self, call: Call, mask: Structure) -> dict[str, str]:
        found = {}
        if mask.kv_ids is not None:
            found["segments"] = "it has no segments"
        if mask.left is not None and call.lengths[0] > call.lengths[1]:
            found["band"] = "its windows need no more queries than keys"
        if mask.banded and mask.right != 0:
            found["band"] = "of bands it has CausalMask() and LocalMask(left, 0) alone"
        if call.operands.bias is not None or mask.rest or found:
            if mask.kv_lengths is not None:
                found["lengths"] = "it has no lengths beside a bias or an array"
            if mask.left is not None:
                found.setdefault("band", "it has no window beside a bias or an array")
        return found

    def kernel(self, query: Array, key: Array, value: Array, bias: Array | None, mask: Structure, scale: float) -> Any:
        whole = query.shape[-3], key.shape[-3]
        bias, array = (None if x is None else jnp.broadcast_to(x, (*x.shape[:2], *whole)) for x in (bias, mask.joined))
        rows, lengths = mask.query_lengths, mask.kv_lengths
        if rows is None and lengths is not None:
            rows = jnp.full_like(lengths, whole[0])
        query, key, value, rows, lengths, bias, array = alike(query, key, value, rows, lengths, bias, array)
        window = None if mask.left is None else (mask.left, 0)
        options = {"scale": scale, "is_causal": mask.right == 0, "local_window_size": window, "implementation": "cudnn"}
        options |= {"bias": bias, "mask": array, "query_seq_lengths": rows, "key_value_seq_lengths": lengths}
        return jax.nn.dot_product_attention(query, key, value, **options)
