"""tokamax's Mosaic kernels for NVIDIA's Hopper and Blackwell GPUs, where tokamax is installed."""

import re
from collections.abc import Iterator
from functools import cached_property
from importlib import metadata, util
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from anyattention.extend import Call, Structure
from anyattention_backends.jax.fused import JAXKernel, plain


class Tokamax(JAXKernel):
    """Fastest where there is a bias or an array as mask, of which it reads axes of size 1 as they are."""

    name = "tokamax"
    platform = "gpu"
    dtypes = ("bfloat16", "float16")
    implementation = "mosaic"
    serves = JAXKernel.serves | {"logits_soft_cap"}

    @cached_property
    def version(self) -> tuple[int, ...]:
        """Of the installed tokamax; empty if there is none."""
        there = util.find_spec("tokamax") is not None
        return tuple(map(int, re.findall(r"\d+", metadata.version("tokamax"))[:3])) if there else ()

    @cached_property
    def absent(self) -> str:
        if not self.version:
            return "tokamax is not installed: pip install 'anyattention[tokamax]'"
        name = f"tokamax {'.'.join(map(str, self.version))}"
        if self.version < (0, 0, 13):
            return f"{name} reads the program's command line: install 0.0.13 or later"
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", "0")
        if not 9.0 <= float(capability) < 11.0:
            return f"it needs compute capability 9 or 10, not {capability}"
        try:
            import tokamax  # noqa: F401
        except Exception as error:
            return f"{name} cannot be imported: {type(error).__name__}: {error}"
        return ""

    def rank(self, call: Call) -> int:
        return 1 if plain(call) else 0

    def lacks(self, call: Call, mask: Structure) -> dict[str, str]:
        found = {}
        if mask.kv_ids is not None:
            found["segments"] = "it has no segments"
        windowed = mask.banded and not mask.causal
        if windowed and call.lengths[0] != call.lengths[1] and self.version < (0, 0, 17):
            found["band"] = "before tokamax 0.0.17 its windows need queries and keys of one length"
        return found

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        cap = call.options.logits_soft_cap
        if call.operands.bias is not None and cap is not None:
            yield "its soft cap comes after the bias"
        if cap is not None and cap <= 60.0 and call.options.dtype == "float16":  # on Hopper, 0.0.13 to 0.0.17
            yield "it takes no maximum from capped logits, whose exponentials exceed float16"

    def kernel(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        mask: Structure,
        scale: float,
        logits_soft_cap: float | None = None,
    ) -> Any:
        import tokamax

        window = None
        if mask.banded and not mask.causal:
            longest = max(query.shape[-3], key.shape[-3])
            window = tuple(longest if side is None else side for side in (mask.left, mask.right))
        lengths = mask.kv_lengths
        if lengths is None and bias is not None:  # else a tile whose biases are all minus infinity makes NaN of its row
            lengths = jnp.full(query.shape[:1], key.shape[-3], jnp.int32)
        options = {"scale": scale, "is_causal": mask.causal, "local_window_size": window}
        options |= {"logits_soft_cap": logits_soft_cap}
        options |= {"bias": bias, "mask": mask.joined, "key_value_seq_lengths": lengths}
        return tokamax.dot_product_attention(query, key, value, **options, implementation=self.implementation)
