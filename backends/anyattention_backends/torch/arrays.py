from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from anyattention._src import dtypes
from anyattention.extend import Arrays, CausalMask
from anyattention_backends.torch import compat, dtensors, operators

Array = Any
_KINDS = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 bfloat16 float16 float32 float64 complex64 complex128"
_DTYPES = {name: getattr(torch, name) for name in _KINDS.split()}
_UNSIGNED, _STRIDED = (torch.uint16, torch.uint32, torch.uint64), torch.strided
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TorchArrays(Arrays):
    checks_devices = True
    guests = (np.ndarray, np.bool_, np.uint32, np.int32, np.int64, np.float16, np.float32, np.float64)

    def platform(self, x: Array) -> str:
        return x.device.type

    def run(self, like: Array, function: Callable[..., Any], /, *args: Any) -> Any:
        """Without autocast; the results contiguous, so that callers may view heads and depth as one axis."""
        found = operators.without_autocast(like, function, *args)
        if isinstance(found, tuple):  # of a function with its pullback, or of that; a partial
            parts = map(_contiguous, found)
            return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
        return _contiguous(found)

    def check_array(self, x: Array, like: Array | None = None) -> Any:
        """Tensors whose storage is what they mean; unsigned integers of more than 8 bits cannot be compared."""
        if type(x) is torch.Tensor and x.layout is _STRIDED and not x.is_nested:
            return x if like is None else self._met(x, like)
        if (reason := compat.foreign(type(x))) == "causal":
            return CausalMask(x.seq_len_kv - x.seq_len_q if x.variant.name == "LOWER_RIGHT" else 0)
        if reason:
            raise TypeError(reason)
        if x.layout is not _STRIDED:
            raise TypeError(f"a tensor of layout {str(x.layout).removeprefix('torch.')}: pass to_dense()")
        if x.is_nested:
            raise TypeError("a nested tensor: pad it, as torch.nested.to_padded_tensor does, and pass masks.LengthMask")
        return x if like is None else self._met(x, like)

    def _met(self, x: Array, like: Array) -> Array:
        """A bias, or an array of a mask, where it can meet `like`."""
        if x.dtype in _UNSIGNED:  # which PyTorch promotes with no other
            x = x.to(torch.int64) & (2**63 - 1)
        return operators.beside(x, like)

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """PyTorch cannot read NumPy's bfloat16, nor arrays it may not write to without a warning."""
        x = self._adopted(guest, like)
        return x if like is None else operators.beside(x, like)

    def _adopted(self, guest: Any, like: Array | None) -> Array:
        device = "cpu" if like is None else like.device
        if torch.compiler.is_compiling():  # NumPy arrays are tensors there already, and have no dtype
            return torch.as_tensor(guest, device=device)
        if isinstance(guest, float) or (getattr(guest, "ndim", None) == 0 and guest.dtype == np.float64):
            name = "float32" if like is None else self.dtype_name(like)
            if hasattr(guest, "dtype") and name != "float64":
                name = "float32"  # as JAX takes over such a scalar, unless it is to compute in float64
            return torch.tensor(dtypes.round_to(float(guest), name), dtype=_DTYPES[name], device=device)
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
        except TypeError:
            if name != "float64":
                raise
        narrow = guest.astype("float32")  # as the device has no float64; what is not zero stays so
        return torch.tensor(np.where((guest != 0) & (narrow == 0), np.float32(1e-45), narrow), device=device)

    def adopt_key(self, words: Any) -> Any:
        """uint32 has no arithmetic in PyTorch."""
        words = torch.tensor(words, device="cpu")
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
        """Values can be looked at on a CPU, but for tensors without storage, spread ones, or in a trace."""
        if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or dtensors.is_spread(x):
            return False
        return x.device.type == "cpu" and not compat.is_traced()

    def surely(self, x: Any, value: bool) -> bool:
        """As `inspects`, and not for tensors that a transformation sees."""
        if type(x) is not torch.Tensor or not self.inspects(x) or compat.is_wrapped(x):
            return False
        return bool(x.all() if value else not x.any())


def _contiguous(x: Any) -> Any:
    """A tensor with its elements in order; fake ones of MPS have no `contiguous` on other machines."""
    whole = not isinstance(x, torch.Tensor) or x.is_contiguous()
    return x if whole else x.clone(memory_format=torch.contiguous_format)
