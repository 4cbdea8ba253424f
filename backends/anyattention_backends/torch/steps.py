from collections.abc import Sequence
from typing import Any

import torch

from anyattention.extend import Steps
from anyattention_backends.torch.operators import beside, keep

Array = Any
_STEPWISE = (torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


class TorchSteps(Steps):
    def scale(self, query: Array, depth: int, dtype: str) -> Array:
        """Under ``torch.compile(dynamic=True)`` the depth is a symbol until it is used as a length."""
        return super().scale(query, len(range(depth)), dtype)

    def check_precision(self, precision: Any, dot_general: Any, x: Array) -> None:
        """On an accelerator PyTorch's own switch decides how float32 products are computed."""
        if precision is not None and x.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
            raise ValueError(
                f"precision={precision!r} is decided by PyTorch on {x.device.type}: call "
                "torch.set_float32_matmul_precision('highest') and pass None"
            )
        super().check_precision(precision, dot_general, x)

    def where(self, mask: Array, x: Array, fill: float) -> Array:
        """``torch.where`` refuses a complex array beside a real scalar."""
        return torch.where(self.arrays.truth(mask), x, complex(fill) if x.is_complex() else fill)

    def softmax(self, logits: Array) -> Array:
        """PyTorch's own in float32 and float64; 16 bits are rounded step by step."""
        if logits.dtype not in _STEPWISE:
            return torch.softmax(logits, dim=-1)
        if logits.shape[-1] == 0:
            return logits
        weights = torch.exp(logits - _max(logits.detach()))  # the maximum takes no part in the gradient
        return self.divide(weights, torch.sum(weights, dim=-1, keepdim=True))

    def keep(self, key: Any, keep_prob: Any, shape: Sequence[int], like: Array) -> Array:
        """Inductor makes one expression of threefry's twenty rounds and never ends compiling: it gets an operator."""
        key = beside(key.to(like.device), like)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return keep(key, float(keep_prob), shape)
        return super().keep(key, keep_prob, tuple(shape), like)


def _max(x: Array) -> Array:
    if not x.is_complex():
        return torch.amax(x, dim=-1, keepdim=True)
    real = torch.amax(x.real, dim=-1, keepdim=True)  # by real part, then by imaginary, as JAX orders them
    imaginary = torch.amax(torch.where(x.real == real, x.imag, -torch.inf), dim=-1, keepdim=True)
    return torch.complex(real, imaginary)
