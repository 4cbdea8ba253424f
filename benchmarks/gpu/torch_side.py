"""PyTorch: ours and SDPA called directly, both eagerly, as they are used."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.measure import Function, key_lengths
from benchmarks.gpu.ours import attention

Array = Any


class TorchSide:
    """PyTorch on its first GPU, or on the CPU."""

    name = "torch"
    engines = ("sdpa", "flex")
    rows = ("ours, fused", "ours", "sdpa")

    def __init__(self, pretend: bool) -> None:
        self.device = "cpu" if pretend else "cuda"
        self.memory = 2**20 if pretend else torch.cuda.get_device_properties(0).total_memory

    @classmethod
    def about(cls) -> dict[str, Any]:
        """Whether there is a GPU, which one, and what is installed."""
        gpu = torch.cuda.is_available() and torch.version.cuda is not None
        versions = {"torch": version("torch"), "numpy": version("numpy")}
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if gpu else {}
        device = torch.cuda.get_device_name() if gpu else "cpu"
        return {"gpu": gpu, "device": device, "versions": versions}

    def inputs(self, case: Case) -> dict[str, Any]:
        generator = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": getattr(torch, case.dtype)}
        shape = case.batch, case.q_length, case.heads, case.depth
        found: dict[str, Any] = {
            name: torch.randn(shape, **options).requires_grad_(case.gradient) for name in ("query", "key", "value")
        }
        found |= {"cotangent": torch.randn(shape, **options), "extras": {}}
        if case.kind == "bias":  # a product of two, as on JAX
            rows = torch.randn((1, case.heads, case.q_length, 1), **options)
            columns = torch.randn((1, case.heads, 1, case.keys), **options)
            found["extras"] = {"bias": rows * columns / 2}
        if case.kind in ("lengths", "keys"):
            lengths = torch.tensor(key_lengths(case), device=self.device)
            found["extras"] = {"lengths": lengths} if case.kind == "lengths" else {"mask": shown(lengths, case.keys)}
        return found

    def functions(self, case: Case) -> dict[str, Function]:
        return dict(zip(self.rows, (attention(case, "fused"), attention(case, None), sdpa(case)), strict=True))

    def prepare(self, function: Function, case: Case, inputs: dict[str, Any]) -> tuple[Callable[[Array], Any], Any]:
        arrays, extras = [inputs[name] for name in ("query", "key", "value")], inputs["extras"]

        def call(cotangent: Array) -> Any:
            output = function(*arrays, extras)
            return torch.autograd.grad(output, arrays, cotangent) if case.gradient else (output,)

        call(inputs["cotangent"])  # loads code
        if self.device == "cpu":
            return call, None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(inputs["cotangent"])
        torch.cuda.synchronize()
        return call, torch.cuda.max_memory_allocated() - before

    def at(self, x: Array, rows: np.ndarray) -> Array:
        index = torch.tensor(rows, device=self.device)
        return torch.zeros_like(x).index_copy_(1, index, x[:, index])

    def get(self, x: Array) -> np.ndarray:
        return x.detach().to(torch.float64).cpu().numpy()

    def finite(self, x: Array) -> bool:
        return bool(torch.isfinite(x).all())

    def wait(self, x: Any) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def product(self, size: int) -> Callable[[], Any]:
        """A matrix product in bfloat16 of random numbers, since a card is faster on zeros."""
        x, y = torch.randn((2, size, size), device=self.device, dtype=torch.bfloat16)
        return lambda: x @ y

    def clear(self) -> None:
        """Give the memory of a case back."""
        torch.cuda.empty_cache()


def shown(lengths: Array, keys: int) -> Array:
    """The mask of lengths, ``[batch, 1, 1, kv_length]``."""
    return (torch.arange(keys, device=lengths.device) < lengths[:, None])[:, None, None]


def sdpa(case: Case) -> Function:
    """SDPA on arrays in our layout, which are its own transposed; PyTorch picks the kernel."""

    def call(query: Array, key: Array, value: Array, extras: dict[str, Array]) -> Array:
        mask = extras.get("mask", extras.get("bias"))
        if case.kind == "lengths":
            mask = shown(extras["lengths"], case.keys)
        four = [x.transpose(1, 2) for x in (query, key, value)]
        causal = case.kind == "causal"
        return torch.nn.functional.scaled_dot_product_attention(*four, mask, is_causal=causal).transpose(1, 2)

    return call
