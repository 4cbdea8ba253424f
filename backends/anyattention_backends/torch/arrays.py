from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from anyattention._src import dtypes
from anyattention.extend import Arrays
from anyattention_backends.torch import compat

Array = Any
_KINDS = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 bfloat16 float16 float32 float64 complex64 complex128"
_DTYPES = {name: getattr(torch, name) for name in _KINDS.split()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TorchArrays(Arrays):
    guests = (np.ndarray, np.bool_, np.uint32, np.int32, np.int64, np.float16, np.float32, np.float64)

    def platform(self, x: Array) -> str:
        return x.device.type

    def run(self, like: Array, function: Callable[..., Any], /, *args: Any) -> Any:
        """Autocast would compute the products in 16 bits."""
        if like.is_cpu and not torch.is_autocast_enabled("cpu"):
            return function(*args)
        device = like.device.type
        if not compat.has_autocast(device) or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """PyTorch cannot read NumPy's bfloat16, nor arrays it may not write to without a warning."""
        device = None if like is None else like.device
        if torch.compiler.is_compiling():  # NumPy arrays are tensors there already, and have no dtype
            return torch.as_tensor(guest, device=device)
        if not hasattr(guest, "dtype"):
            return torch.tensor(guest, device=device)
        name = dtypes.name_of(guest.dtype)
        if name == "bfloat16":
            return torch.tensor(guest.astype("float32"), dtype=torch.bfloat16, device=device)
        if any(stride < 0 for stride in getattr(guest, "strides", ())):
            guest = guest.copy()
        try:
            return torch.tensor(guest, device=device)
        except ValueError as error:  # bytes in the other order
            raise TypeError(f"PyTorch cannot take over an array of {name}: {error}") from None

    def adopt_key(self, words: Any) -> Any:
        """uint32 has no arithmetic in PyTorch."""
        words = torch.tensor(words)
        if words.dtype != torch.uint32:
            raise TypeError(f"a dropout key must have dtype uint32, got {str(words.dtype).removeprefix('torch.')}")
        return words.to(torch.int64)

    def key_data(self, key: Any) -> Any:
        """A key in int64 is unsigned words elsewhere."""
        words = key.cpu().numpy()
        return words.astype("uint32") if words.dtype == "int64" else words

    def own(self, x: Array) -> Array:
        """What repeats along an axis, as `expand` makes it, is copied once."""
        if 0 in x.stride():
            return x[tuple(slice(None) if stride else slice(1) for stride in x.stride())].clone().expand(x.shape)
        return x.clone()

    def dtype_name(self, x: Array) -> str:
        """From a table: 0.1 us, where taking the dtype's text apart takes 0.3."""
        return _NAMES.get(x.dtype) or str(x.dtype)

    def cast(self, x: Array, name: str) -> Array:
        dtype = _DTYPES[name]
        return x if x.dtype is dtype else x.to(dtype)

    def matmul(self, x: Array, y: Array) -> Array:
        """PyTorch's own, without the namespace's check of dtypes."""
        return torch.matmul(x, y)

    def permute_dims(self, x: Array, axes: tuple[int, ...]) -> Array:
        return torch.permute(x, axes)

    def inspects(self, x: Array) -> bool:
        """Values can be looked at on a CPU, but for tensors without storage or in a trace."""
        return isinstance(x, torch.Tensor) and x.device.type == "cpu" and not torch.compiler.is_compiling()

    def surely(self, x: Any, value: bool) -> bool:
        """As `inspects`, and not for tensors that a transformation sees."""
        if type(x) is not torch.Tensor or not self.inspects(x) or compat.is_wrapped(x):
            return False
        return bool(x.all() if value else not x.any())
