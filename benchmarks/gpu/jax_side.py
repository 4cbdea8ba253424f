"""JAX: ours, Flax as it is, and the engines called directly, each compiled."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.cases import Case
from benchmarks.gpu.measure import Function, key_lengths
from benchmarks.gpu.ours import attention

Array = Any


class JAXSide:
    """JAX on its first device."""

    name = "jax"
    engines = ("cudnn", "tokamax")
    rows = ("ours, fused", "ours", "Flax", *engines)

    def __init__(self, pretend: bool) -> None:
        self.device = jax.devices()[0]
        self.memory = 2**20 if pretend else self.device.memory_stats()["bytes_limit"]

    @classmethod
    def about(cls) -> dict[str, Any]:
        """Whether there is a GPU, which one, and what is installed."""
        device = jax.devices()[0]
        versions = {}
        for package in ("jax", "jaxlib", "flax", "tokamax", "numpy"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        gpu = device.platform == "gpu" and "NVIDIA" in device.device_kind.upper()
        return {"gpu": gpu, "device": device.device_kind, "versions": versions}

    def inputs(self, case: Case) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(0), 6)
        shape = case.batch, case.q_length, case.heads, case.depth
        names = ("query", "key", "value", "cotangent")
        found: dict[str, Any] = {
            name: jax.random.normal(key, shape, case.dtype) for name, key in zip(names, keys[:4], strict=True)
        }
        found["extras"] = {}
        if case.kind == "bias":  # a product of two, since so many random numbers would take a while
            rows = jax.random.normal(keys[4], (1, case.heads, case.q_length, 1), case.dtype)
            columns = jax.random.normal(keys[5], (1, case.heads, 1, case.keys), case.dtype)
            found["extras"] = {"bias": rows * columns / 2}
        if case.kind in ("lengths", "keys"):
            lengths = jnp.asarray(key_lengths(case))
            found["extras"] = {"lengths": lengths} if case.kind == "lengths" else {"mask": shown(lengths, case.keys)}
        return found

    def functions(self, case: Case) -> dict[str, Function]:
        calls = (
            attention(case, "fused"),
            attention(case, None),
            flax(case),
            directly(cudnn, case),
            directly(tokamax, case),
        )
        return dict(zip(self.rows, calls, strict=True))

    def prepare(self, function: Function, case: Case, inputs: dict[str, Any]) -> tuple[Callable[[Array], Any], Any]:
        def program(query: Array, key: Array, value: Array, extras: Any, cotangent: Array) -> Any:
            if not case.gradient:
                return (function(query, key, value, extras),)
            return jax.vjp(lambda *x: function(*x, extras), query, key, value)[1](cotangent)

        arrays = [inputs[name] for name in ("query", "key", "value", "extras")]
        compiled = jax.jit(program).lower(*arrays, inputs["cotangent"]).compile()
        memory = compiled.memory_analysis()
        peak = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
        return lambda cotangent: compiled(*arrays, cotangent), peak

    def at(self, x: Array, rows: np.ndarray) -> Array:
        return jnp.zeros_like(x).at[:, rows].set(x[:, rows])

    def get(self, x: Array) -> np.ndarray:
        return np.asarray(x.astype(jnp.float32)).astype(np.float64)

    def finite(self, x: Array) -> bool:
        return bool(jnp.isfinite(x).all())

    def wait(self, x: Any) -> None:
        jax.block_until_ready(x)

    def product(self, size: int) -> Callable[[], Any]:
        """A matrix product in bfloat16 of random numbers, since a card is faster on zeros."""
        x, y = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
        multiply = jax.jit(jnp.matmul)
        return lambda: multiply(x, y)

    def clear(self) -> None:
        """Nothing: JAX keeps the memory for what comes."""


def shown(lengths: Array, keys: int) -> Array:
    """The mask of lengths, ``[batch, 1, 1, kv_length]``."""
    return (jnp.arange(keys) < lengths[:, None])[:, None, None]


def flax(case: Case) -> Function:
    """Flax as it is, with a mask as people write it."""

    def call(query: Array, key: Array, value: Array, extras: dict[str, Array]) -> Array:
        import flax.linen

        mask = extras.get("mask")
        if case.kind == "causal":
            mask = jnp.tri(case.q_length, case.keys, dtype=bool)[None, None]
        if case.kind == "lengths":
            mask = shown(extras["lengths"], case.keys)
        return flax.linen.dot_product_attention(query, key, value, bias=extras.get("bias"), mask=mask)

    return call


def directly(engine: Callable[..., Array], case: Case) -> Function:
    """An engine with the names that `jax.nn.dot_product_attention` and tokamax share."""

    def call(query: Array, key: Array, value: Array, extras: dict[str, Array]) -> Array:
        options = {"bias": extras.get("bias"), "mask": extras.get("mask")}
        options |= {"key_value_seq_lengths": extras.get("lengths"), "is_causal": case.kind == "causal"}
        return engine(query, key, value, **options)

    return call


def cudnn(query: Array, key: Array, value: Array, mask: Array | None = None, **options: Any) -> Array:
    if mask is not None:  # it has no masks of a single row
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(query, key, value, mask=mask, **options, implementation="cudnn")


def tokamax(query: Array, key: Array, value: Array, **options: Any) -> Array:
    import tokamax

    return tokamax.dot_product_attention(query, key, value, **options, implementation="mosaic")
