"""Splash attention for TPUs, as JAX ships it."""

from collections.abc import Iterator
from functools import cached_property
from importlib import util
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from anyattention.extend import Call, Structure
from anyattention_backends.jax.fused import JAXKernel

LANES = 128  # of which lengths and depths are multiples


class Splash(JAXKernel):
    """Bands and segments, of which it computes no tile that is wholly hidden; lengths are segments."""

    name = "splash"
    serves = JAXKernel.serves - {"bias"} | {"logits_soft_cap", "sinks"}
    platform = "tpu"
    dtypes = ("bfloat16", "float32")
    multiple = LANES
    dense = False
    interpret = False  # for tests, on a CPU

    @cached_property
    def absent(self) -> str:
        module = "jax.experimental.pallas.ops.tpu.splash_attention"
        return "" if util.find_spec(module) else f"this JAX has no {module}"

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        if any(length % LANES for length in call.lengths):
            yield f"lengths must be multiples of {LANES}"

    def lacks(self, call: Call, mask: Structure) -> dict[str, str]:
        both = mask.kv_lengths is not None and mask.kv_ids is not None
        return {"lengths": "it has lengths or segments, not both"} if both else {}

    def kernel(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        mask: Structure,
        scale: float,
        logits_soft_cap: float | None = None,
        sinks: Array | None = None,
    ) -> Any:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as rules

        (q_length, heads, _), kv_length = query.shape[1:], key.shape[1]
        shape = q_length, kv_length
        rule = rules.LocalMask(shape, (mask.left, mask.right), 0) if mask.banded else rules.FullMask(shape)
        options = {"block_sizes": _blocks(splash, *shape), "interpret": self.interpret}
        options |= {"attn_logits_soft_cap": logits_soft_cap}
        kernel = splash.make_splash_mha(rules.MultiHeadMask([rule] * heads), head_shards=1, q_seq_shards=1, **options)
        segments = None
        if mask.kv_ids is not None:
            segments = splash.SegmentIds(*(jnp.asarray(x, jnp.int32) for x in (mask.query_ids, mask.kv_ids)))
        elif mask.kv_lengths is not None:
            visible = jnp.arange(kv_length) < mask.kv_lengths[:, None]
            segments = splash.SegmentIds(jnp.ones((query.shape[0], q_length), jnp.int32), visible.astype(jnp.int32))
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)  # rounded once
        sinks = None if sinks is None else sinks.astype(query.dtype)  # which is that of its gradient of them
        arrays = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        return jnp.swapaxes(jax.vmap(kernel)(*arrays, segments, sinks), 1, 2)


def _blocks(splash: Any, q_length: int, kv_length: int) -> Any:
    """The largest of 512, 256 and 128 that divides each length, forward and backward."""
    q, kv = (next(size for size in (512, 256, LANES) if length % size == 0) for length in (q_length, kv_length))
    forward = {"block_q": q, "block_kv": kv, "block_kv_compute": kv}
    backward = {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": kv, "block_q_dq": q, "block_kv_dq": kv}
    return splash.BlockSizes(**forward, **backward)
