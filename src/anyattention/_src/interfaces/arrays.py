"""The arrays of a library: how they are made, cast, promoted and placed."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat

from anyattention._src import dtypes, threefry
from anyattention._src.interfaces.products import PRODUCTS, Axes

Array = Any
Function = Callable[..., Any]


def unknown(size: Any) -> bool:
    """Whether a size is known at run time only: ndonnx says None, Dask NaN."""
    return size is None or size != size


def _order(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The permutation that moves the last axes so, and leaves those before them."""
    return (*range(rank - len(axes)), *(rank + axis for axis in axes))


_ORDERS = {(x, rank): _order(x, rank) for axes in PRODUCTS.values() for x in axes if x for rank in range(len(x), 8)}


class Arrays:
    """The arrays of a library: how they are made, cast, promoted and placed. Dtypes go by name."""

    guests: tuple[type, ...] = ()
    """Types of another library that come as guests."""
    narrow = False
    """Whether the library itself keeps scalars and integers to 32 bits, unless told otherwise."""
    checks_devices = False
    """Whether a call is to look for arrays on several devices, of which the library's own error names no argument."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.name = xp.__name__.removeprefix("array_api_compat.").partition(".")[0]

    def platform(self, x: Array) -> str:
        """Where calls with this array run: "cpu", "cuda", ..."""
        return "cpu"

    def run(self, like: Array, function: Function, /, *args: Any) -> Any:
        """Call an implementation, for arrays such as `like`, under whatever settings this library needs around it.

        NumPy, which may stand beneath it, is not to warn of infinities, which are results here.
        """
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return function(*args)
        with numpy.errstate(all="ignore"):
            return function(*args)

    def outline(self, function: Function, arguments: dict[str, Any]) -> Any:
        """``function(**arguments)``, of which some may be shapes that stand for arrays, where the library has such."""
        return function(**arguments)

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """An array of this library, on the device of `like`, from a scalar, a NumPy array or a nested list.

        A Python float takes the dtype of `like`. An array is in 32 bits where the device has no more.
        """
        if like is not None and type(guest) is float:
            return self.xp.asarray(dtypes.round_to(guest, self.dtype_name(like)), dtype=like.dtype, **self.beside(like))
        beside, name = self.beside(like), dtypes.name_of(getattr(guest, "dtype", ""))
        about = getattr(self.xp, "__array_namespace_info__", None) if beside and name in dtypes.NARROW else None
        if about is not None and name not in about().dtypes(**beside):
            guest = self.run(like, guest.astype, dtypes.NARROW[name])
        return self.xp.asarray(guest, **beside)

    def beside(self, like: Array | None) -> dict[str, Any]:
        """The `device` argument that makes a new array stand beside `like`."""
        return threefry.device_of(like)

    def check_array(self, x: Array, like: Array | None = None) -> Any:
        """An array of this library, or something that stands for one, made plain, where it can meet `like`.

        A mask by rule for something that stands for that. Raise TypeError or ValueError for what cannot be understood.
        """
        return x if like is None or x.shape else place(self, x, like)  # a scalar goes where it is needed

    def own(self, x: Array) -> Array:
        """A copy, which nobody else can change; the array itself where arrays never change."""
        return self.xp.asarray(x, copy=True)

    def adopt_key(self, words: Any) -> Array:
        """A dropout key of this library from two words as `key_data` gives them."""
        return self.adopt(words, None)

    def key_data(self, key: Any) -> Any:
        """A dropout key of this library as something that NumPy reads: two uint32 words."""
        return key

    def dtype_name(self, x: Array) -> str:
        """The name of the array's dtype, "float32" for example."""
        return dtypes.name_of(x.dtype)

    def cast(self, x: Array, name: str) -> Array:
        """The array in the dtype of this name."""
        dtype = getattr(self.xp, name, None)
        if dtype is None:
            raise TypeError(f"{self.name} has no dtype {name}")
        return x if x.dtype == dtype else self.run(x, self.xp.astype, x, dtype)

    def promote(self, arrays: Sequence[Array], dtype: Any = None) -> tuple[list[Array], str]:
        """The arrays in Flax's compute dtype, and its name: by JAX's lattice, or as `dtype` says."""
        kinds = [x.dtype for x in arrays]
        if dtype is None and kinds.count(kinds[0]) == len(kinds):
            name = self.dtype_name(arrays[0])
            if dtypes.is_inexact(name):
                return list(arrays), name
        name = dtypes.compute_dtype(tuple(self.dtype_name(x) for x in arrays), dtype)
        return [self.cast(x, name) for x in arrays], name

    def join(self, x: Array, y: Any) -> tuple[Array, Any]:
        """Both in their common dtype by JAX's lattice. A Python scalar takes the array's dtype, rounded first."""
        if getattr(y, "dtype", None) == x.dtype:
            return x, y
        left, right = self.dtype_name(x), dtypes.PYTHON_SCALARS.get(type(y)) or self.dtype_name(y)
        if left == right:
            return x, y
        name = dtypes.promote(left, right)
        if isinstance(y, bool | int | float):
            return self.cast(x, name), dtypes.round_to(float(y), name)
        return self.cast(x, name), y if isinstance(y, complex) else self.cast(y, name)

    def truth(self, mask: Array) -> Array:
        """Where the mask is truthy: any nonzero, NaN too."""
        return mask if self.dtype_name(mask) == "bool" else mask != 0

    def matmul(self, x: Array, y: Array) -> Array:
        """Matrix product over the last two axes, in one dtype."""
        return self.xp.matmul(x, y)

    def permute_dims(self, x: Array, axes: tuple[int, ...]) -> Array:
        """All axes in this order."""
        return self.xp.permute_dims(x, axes)

    def traced(self, x: Array) -> bool:
        """Whether the array is part of a program that is compiled as a whole."""
        return False

    def inspects(self, x: Array) -> bool:
        """Whether the values of masks can be looked at, as `surely` needs them."""
        return False

    def surely(self, x: Any, value: bool) -> bool:
        """Whether the array is known to hold this value throughout; False where that cannot be known, and of None."""
        return False


def is_floating(arrays: Arrays, x: Array) -> bool:
    """Whether the numbers of an array are real and floating, so that they may have a gradient."""
    return "float" in arrays.dtype_name(x)


def place(arrays: Arrays, x: Array, like: Array) -> Array:
    """The array beside another, on whose device it may not be yet."""
    device = arrays.beside(like).get("device")
    return x if device is None or x.device == device else array_api_compat.to_device(x, device)


def permute(arrays: Arrays, x: Array, axes: Axes) -> Array:
    """The last axes in this order, those before them as they are."""
    if axes is None:
        return x
    return arrays.permute_dims(x, _ORDERS.get((axes, x.ndim)) or _order(axes, x.ndim))
