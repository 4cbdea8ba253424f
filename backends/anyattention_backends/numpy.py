"""NumPy: 16-bit floats are computed in float32 and rounded step by step, because NumPy's own rules differ.

NumPy promotes bfloat16 (from ml_dtypes) to float32 or float64 in most operations, sums it in bfloat16 (a thousand
ones make 256), and multiplies float16 matrices fifty times slower than float32 ones.
"""

import threading
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from anyattention import dtypes
from anyattention.backend import Backend
from anyattention.blocks import Block, at, cut_rows, tree_map
from anyattention_backends import threads

Array = Any
_HALF = ("float16", "bfloat16")
_NAMES = {np.dtype(name): name for name in ("float16", "float32", "float64", "complex64", "complex128", "bool")}


class NumPyBackend(Backend):
    """Overrides for NumPy arrays."""

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """Reason: missing. Lists of Python numbers get JAX's default dtypes, which are 32 bits wide."""
        x = np.asarray(guest)
        if isinstance(guest, list | tuple) and x.dtype.name in ("float64", "complex128", "int64"):
            x = x.astype(x.dtype.name.replace("64", "32").replace("128", "64"))
        return self.check_array(x)

    def check_array(self, x: Array) -> Array:
        """Reason: missing. Subclasses would carry their own arithmetic in: a masked array its mask."""
        if type(x) is np.ndarray:
            return x
        if isinstance(x, np.ma.MaskedArray):
            raise ValueError("numpy masked arrays are not supported: pass the data, and the mask as mask=")
        return np.asarray(x)

    def dtype_name(self, x: Array) -> str:
        """Reason: speed, and NumPy's own name hides a swapped byte order."""
        dtype = x.dtype
        return _NAMES.get(dtype) or (dtype.name if dtype.isnative else str(dtype))

    def cast(self, x: Array, name: str) -> Array:
        """Reason: missing. The namespace has no bfloat16."""
        if self.dtype_name(x) == name:
            return x
        if name == "bfloat16":
            return x.astype(_bfloat16())
        return x.astype(name)

    def run(self, function: Callable[..., Array], /, *args: Any, **kwargs: Any) -> Array:
        """Reason: bits. Overflow and NaN are results here, as in Flax, not occasions to warn."""
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    def divide(self, x: Array, y: Array) -> Array:
        if x.dtype.name == "bfloat16":
            return (x.astype(np.float32) / y.astype(np.float32)).astype(x.dtype)
        return super().divide(x, y)

    def divide_by_scalar(self, x: Array, value: Any, dtype: str) -> Array:
        """Reason: bits. A Python scalar turns bfloat16 into float32."""
        if dtype == "bfloat16":
            return (x.astype(np.float32) / np.float32(dtypes.round_to(float(value), dtype))).astype(x.dtype)
        return super().divide_by_scalar(x, value, dtype)

    def join(self, x: Array, y: Any) -> tuple[Array, Any]:
        """Reason: bits. A Python scalar turns bfloat16 into float32."""
        x, y = super().join(x, y)
        return x, (np.asarray(y, x.dtype) if isinstance(y, float) else y)

    def contract(self, equation: str, x: Array, y: Array, precision: Any = None, dot_general: Any = None) -> Array:
        """Reason: bits and speed. 16-bit products accumulate in float32 and are rounded once."""
        x, y = self.join(x, y)
        if self.dtype_name(x) in _HALF:
            x32, y32 = x.astype(np.float32), y.astype(np.float32)
            return super().contract(equation, x32, y32, precision, dot_general).astype(x.dtype)
        return super().contract(equation, x, y, precision, dot_general)

    def permute_dims(self, x: Array, axes: tuple[int, ...]) -> Array:
        """Reason: speed."""
        return x.transpose(axes)

    def matmul(self, x: Array, y: Array, precision: Any = None) -> Array:
        """Reason: speed."""
        return np.matmul(x, y)

    def where(self, mask: Array, x: Array, fill: float) -> Array:
        """Reason: bits. A Python scalar turns bfloat16 into float64."""
        return np.where(self.truth(mask), x, np.asarray(fill, x.dtype))

    def softmax(self, logits: Array) -> Array:
        """Reason: bits. A 16-bit sum accumulates in float32; the maximum of no keys is minus infinity."""
        if self.dtype_name(logits) not in _HALF:
            weights = logits - logits.max(axis=-1, keepdims=True, initial=-np.inf)
            np.exp(weights, out=weights)
            weights /= weights.sum(axis=-1, keepdims=True)
            return weights
        half = logits.dtype
        logits = logits.astype(np.float32)
        weights = (logits - np.max(logits, axis=-1, keepdims=True, initial=-np.inf)).astype(half)
        weights = np.exp(weights.astype(np.float32)).astype(half)
        return self.divide(weights, np.sum(weights.astype(np.float32), axis=-1, keepdims=True).astype(half))

    # --- tiles ---

    def tiles(self, block: Block) -> tuple[int, int]:
        """Reason: speed. Logits of a tile stay in the cache."""
        return 256, 1024

    def transpose(self, x: Array) -> Array:
        """Reason: speed."""
        return x.swapaxes(-1, -2)

    def row_sum(self, x: Array) -> Array:
        """Reason: speed. A product with ones sums at the rate of memory."""
        return np.matmul(x, np.ones((x.shape[-1], 1), x.dtype))

    def exp_minus(self, x: Array, shift: Array) -> Array:
        """Reason: speed. In place."""
        np.subtract(x, shift, out=x)
        return np.exp(x, out=x)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        """Reason: speed. In place."""
        np.copyto(x, value, where=~visible)
        return x

    def inspects(self, x: Array) -> bool:
        """Reason: speed. Tiles that are hidden are known."""
        return True

    def surely(self, x: Any, value: bool) -> bool:
        """Reason: speed. The values are at hand."""
        return x is not None and bool(x.all() if value else not x.any())

    def map_rows(
        self, function: Callable[[Block], tuple[Any, Any]], block: Block, tiles: tuple[int, int]
    ) -> tuple[Any, Any]:
        """Reason: speed. One head at a time, tiles shared among threads, results in place."""
        lead, (length, _) = block.lead, block.lengths
        results = _Results(lead, length)

        def work(item: tuple[tuple[int, ...], int]) -> None:
            index, start = item
            stop = min(start + tiles[0], length)
            with np.errstate(all="ignore"):
                results.put(index, start, stop, *function(cut_rows(at(block, index), start, stop)))

        threads.for_each(work, [(index, i) for index in np.ndindex(*lead) for i in range(0, length, tiles[0])])
        return results.rows, results.sums


class _Results:
    """Arrays of the whole, filled from the results of tiles, from several threads."""

    def __init__(self, lead: tuple[int, ...], length: int) -> None:
        self.lead, self.length, self.lock = lead, length, threading.Lock()
        self.rows: Any = None
        self.sums: Any = None

    def put(self, index: tuple[int, ...], start: int, stop: int, rows: Any, sums: Any) -> None:
        with self.lock:
            if self.rows is None:
                self.rows = tree_map(lambda x: np.empty((*self.lead, self.length, x.shape[-1]), x.dtype), rows)
                self.sums = tree_map(lambda x: np.zeros((*self.lead, *x.shape), x.dtype), sums)

            def add(whole: Array, x: Array) -> None:
                whole[index] += x

            tree_map(add, self.sums, sums)

        def store(whole: Array, x: Array) -> None:
            whole[index][start:stop] = x

        tree_map(store, self.rows, rows)


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError("NumPy has bfloat16 only through the package ml_dtypes: install it first") from None
    return ml_dtypes.bfloat16


backend = NumPyBackend(xp)
