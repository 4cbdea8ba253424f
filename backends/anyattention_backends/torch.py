"""PyTorch: autocast is kept out, float32 softmax is PyTorch's own, and guests in bfloat16 find a way in."""

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch

from anyattention import dtypes
from anyattention.backend import Backend

Array = Any
_NAMES = {
    getattr(torch, name): name
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
    )
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_STEPWISE = (torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


class TorchBackend(Backend):
    """Overrides for PyTorch tensors."""

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """Reason: missing. PyTorch cannot read NumPy's bfloat16, nor arrays it may not write to without a warning."""
        device = None if like is None else like.device
        name = dtypes.name_of(guest.dtype) if hasattr(guest, "dtype") else ""
        if name == "bfloat16":
            return torch.tensor(guest.astype("float32"), dtype=torch.bfloat16, device=device)
        return torch.tensor(guest, device=device)

    def adopt_key(self, words: Any) -> Any:
        """Reason: missing. uint32 has no arithmetic in PyTorch."""
        import numpy as np

        words = np.asarray(words)
        if words.dtype != np.uint32:
            raise TypeError(f"a dropout key must have dtype uint32, got {words.dtype}")
        return torch.tensor(words.astype(np.int64))

    def key_data(self, key: Any) -> Any:
        """Reason: missing. A key in int64 is unsigned words elsewhere."""
        words = key.cpu().numpy()
        return words.astype("uint32") if words.dtype == "int64" else words

    def dtype_name(self, x: Array) -> str:
        """Reason: speed."""
        return _NAMES.get(x.dtype) or str(x.dtype)

    def cast(self, x: Array, name: str) -> Array:
        """Reason: speed."""
        dtype = _DTYPES[name]
        return x if x.dtype is dtype else x.to(dtype)

    def run(self, function: Callable[..., Array], /, *args: Any, **kwargs: Any) -> Array:
        """Reason: bits. Autocast would compute the products in 16 bits."""
        device = args[2].device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    def scale(self, query: Array, depth: int, dtype: str) -> Array:
        """Reason: missing. Under ``torch.compile(dynamic=True)`` the depth is a symbol until it is used as a length."""
        return super().scale(query, len(range(depth)), dtype)

    def check_precision(self, precision: Any, dot_general: Any, x: Array) -> None:
        """Reason: missing. On an accelerator PyTorch's own switch decides how float32 products are computed."""
        if precision is not None and x.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
            raise ValueError(
                f"precision={precision!r} is decided by PyTorch on {x.device.type}: call "
                "torch.set_float32_matmul_precision('highest') and pass None"
            )
        super().check_precision(precision, dot_general, x)

    def matmul(self, x: Array, y: Array) -> Array:
        """Reason: speed."""
        return torch.matmul(x, y)

    def permute_dims(self, x: Array, axes: tuple[int, ...]) -> Array:
        """Reason: speed."""
        return torch.permute(x, axes)

    def where(self, mask: Array, x: Array, fill: float) -> Array:
        """Reason: missing. ``torch.where`` refuses a complex array beside a real scalar."""
        return torch.where(self.truth(mask), x, complex(fill) if x.is_complex() else fill)

    def softmax(self, logits: Array) -> Array:
        """Reason: speed, and the gradient: the maximum must not take part in it. 16 bits are rounded step by step."""
        if logits.dtype not in _STEPWISE:
            return torch.softmax(logits, dim=-1)
        if logits.shape[-1] == 0:
            return logits
        weights = torch.exp(logits - _max(logits.detach()))
        return self.divide(weights, torch.sum(weights, dim=-1, keepdim=True))

    def keep(self, key: Any, keep_prob: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Reason: missing. The key is brought to the device of the weights."""
        return super().keep(key.to(like.device), keep_prob, shape, like)


def _max(x: Array) -> Array:
    if not x.is_complex():
        return torch.amax(x, dim=-1, keepdim=True)
    real = torch.amax(x.real, dim=-1, keepdim=True)  # by real part, then by imaginary, as JAX orders them
    imaginary = torch.amax(torch.where(x.real == real, x.imag, -torch.inf), dim=-1, keepdim=True)
    return torch.complex(real, imaginary)


backend = TorchBackend(xp)
