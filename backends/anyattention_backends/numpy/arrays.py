from collections.abc import Callable
from typing import Any

import numpy as np

from anyattention.extend import Arrays

Array = Any
HALF = ("float16", "bfloat16")
_NAMES = {np.dtype(name): name for name in ("float16", "float32", "float64", "complex64", "complex128", "bool")}


class NumPyArrays(Arrays):
    def adopt(self, guest: Any, like: Array | None) -> Array:
        """Lists of Python numbers get JAX's default dtypes, which are 32 bits wide."""
        x = np.asarray(guest)
        if isinstance(guest, list | tuple) and x.dtype.name in ("float64", "complex128", "int64"):
            x = x.astype(x.dtype.name.replace("64", "32").replace("128", "64"))
        return self.check_array(x)

    def check_array(self, x: Array) -> Array:
        """Subclasses would carry their own arithmetic in: a masked array its mask."""
        if type(x) is np.ndarray:
            return x
        if isinstance(x, np.ma.MaskedArray):
            raise ValueError("numpy masked arrays are not supported: pass the data, and the mask as mask=")
        return np.asarray(x)

    def own(self, x: Array) -> Array:
        """What repeats along an axis, as `numpy.broadcast_to` makes it, is copied once."""
        if x.size and 0 in x.strides:
            return np.broadcast_to(x[tuple(slice(None) if stride else slice(1) for stride in x.strides)].copy(), x.shape)
        return x.copy()

    def dtype_name(self, x: Array) -> str:
        """From a table: 0.1 us, where NumPy's own name takes 1.9, and hides a swapped byte order."""
        dtype = x.dtype
        return _NAMES.get(dtype) or (dtype.name if dtype.isnative else str(dtype))

    def cast(self, x: Array, name: str) -> Array:
        """The namespace has no bfloat16."""
        if self.dtype_name(x) == name:
            return x
        if name != "bfloat16":
            return x.astype(name)
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError("NumPy has bfloat16 only through the package ml_dtypes: install it first") from None
        return x.astype(ml_dtypes.bfloat16)

    def run(self, like: Array, function: Callable[..., Any], /, *args: Any) -> Any:
        """Overflow and NaN are results here, as in Flax, not occasions to warn."""
        with np.errstate(all="ignore"):
            return function(*args)

    def join(self, x: Array, y: Any) -> tuple[Array, Any]:
        """A Python scalar would turn bfloat16 into float32."""
        x, y = super().join(x, y)
        return x, (np.asarray(y, x.dtype) if isinstance(y, float) else y)

    def permute_dims(self, x: Array, axes: tuple[int, ...]) -> Array:
        """The method takes 0.15 us, the namespace's function 0.7."""
        return x.transpose(axes)

    def inspects(self, x: Array) -> bool:
        return True

    def surely(self, x: Any, value: bool) -> bool:
        return x is not None and bool(x.all() if value else not x.any())
