from collections.abc import Callable
from typing import Any

import numpy as np

from anyattention._src import dtypes
from anyattention.extend import Arrays

Array = Any
HALF = ("float16", "bfloat16")
_NAMES = {np.dtype(name): name for name in ("float16", "float32", "float64", "complex64", "complex128", "bool")}


_STORED = (np.memmap, np.matrix, np.recarray)  # NumPy's own subclasses, whose values are all that they mean
# What a subclass may do otherwise without another meaning of its values.
_HARMLESS = {"__new__", "__init__", "__repr__", "__str__", "__format__", "__reduce__", "__setstate__", "__hash__"}


def _means_more(x: Array) -> str:
    """What a subclass has beside its values: methods in place of ndarray's, or attributes; empty for nothing."""
    kinds = type(x).__mro__[: type(x).__mro__.index(np.ndarray)]
    own = [name for kind in kinds if kind not in _STORED for name in vars(kind) if hasattr(np.ndarray, name)]
    changed = {name for name in own if callable(getattr(np.ndarray, name))} - _HARMLESS
    if changed:
        return f"its own {', '.join(sorted(changed))}"
    attributes = [] if isinstance(x, _STORED) else sorted(getattr(x, "__dict__", ()))
    return f"the attributes {', '.join(attributes)}" if attributes else ""


class NumPyArrays(Arrays):
    def adopt(self, guest: Any, like: Array | None) -> Array:
        """Lists of Python numbers get JAX's default dtypes, which are 32 bits wide."""
        if like is not None and type(guest) is float:
            return np.asarray(dtypes.round_to(guest, self.dtype_name(like)), like.dtype)
        x = np.asarray(guest)
        if isinstance(guest, list | tuple) and x.dtype.name in ("float64", "complex128", "int64"):
            x = self.cast(x, x.dtype.name.replace("64", "32").replace("128", "64"))
        return x

    def check_array(self, x: Array, like: Array | None = None) -> Array:
        """A subclass may mean more than it stores, and would carry its own arithmetic in."""
        if type(x) is np.ndarray:
            return x
        if isinstance(x, np.ma.MaskedArray):
            raise ValueError("numpy masked arrays are not supported: pass the data, and the mask as mask=")
        if isinstance(x, np.ndarray) and (more := _means_more(x)):
            raise TypeError(
                f"{type(x).__module__}.{type(x).__qualname__} is a subclass of numpy.ndarray with {more}, so that its "
                "values may mean something else: pass numpy.asarray(x) if they alone count, and a mask as mask="
            )
        return np.asarray(x)

    def own(self, x: Array) -> Array:
        """What repeats along an axis, as `numpy.broadcast_to` makes it, is copied once."""
        if x.size and 0 in x.strides:
            once = tuple(slice(None) if stride else slice(1) for stride in x.strides)
            return np.broadcast_to(x[once].copy(), x.shape)
        return x.copy()

    def dtype_name(self, x: Array) -> str:
        """From a table: 0.1 us, where NumPy's own name takes 1.9, and hides a swapped byte order."""
        dtype = x.dtype
        return _NAMES.get(dtype) or (dtype.name if dtype.isnative else str(dtype))

    def cast(self, x: Array, name: str) -> Array:
        """The namespace has no bfloat16, and a cast that overflows would warn."""
        if self.dtype_name(x) == name:
            return x
        dtype: Any = name if name != "bfloat16" else _bfloat16()
        with np.errstate(all="ignore"):
            return x.astype(dtype)

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


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError("NumPy has bfloat16 only through the package ml_dtypes: install it first") from None
    return ml_dtypes.bfloat16
