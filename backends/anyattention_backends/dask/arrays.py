from typing import Any

import dask.array as da
import numpy as np

from anyattention.extend import Arrays

Array = Any


class DaskArrays(Arrays):
    def check_array(self, x: Array, like: Array | None = None) -> Array:
        """Dask has data frames and delayed objects too, of the same root module."""
        if not isinstance(x, da.Array):
            raise TypeError(f"{type(x).__module__}.{type(x).__qualname__} is no dask.array.Array: convert it first")
        return x

    def own(self, x: Array) -> Array:
        """The same graph: to assign to elements of an array gives that array another one."""
        return x.copy()

    def cast(self, x: Array, name: str) -> Array:
        """The namespace names no dtypes of 16 bits, which chunks may have. A cast that overflows would warn."""
        if self.dtype_name(x) == name:
            return x
        if name not in ("float16", "bfloat16"):
            return super().cast(x, name)
        dtype = np.dtype(np.float16 if name == "float16" else _bfloat16())
        return x.map_blocks(_quiet_cast, dtype, dtype=dtype)


def _quiet_cast(x: Array, dtype: Any) -> Array:
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError("Dask has bfloat16 only through the package ml_dtypes: install it first") from None
    return ml_dtypes.bfloat16
