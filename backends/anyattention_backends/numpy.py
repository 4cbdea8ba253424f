"""NumPy: 16-bit floats are computed in float32 and rounded step by step, because NumPy's own rules differ.

NumPy promotes bfloat16 (from ml_dtypes) to float32 or float64 in most operations, sums it in bfloat16 (a thousand
ones make 256), and multiplies float16 matrices fifty times slower than float32 ones.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from anyattention import dtypes
from anyattention.backend import Backend
from anyattention.blocks import Block, Group, cut_group, cut_lead, tree_map
from anyattention_backends import threads

Array = Any
_LOGITS = 2**19  # of a tile, if more heads can be taken together: calls of NumPy cost time, above all among threads
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

    def run(self, like: Array, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
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

    def matmul(self, x: Array, y: Array, precision: Any = None, scratch: str = "") -> Array:
        """Reason: speed. New memory costs as much as a pass over it."""
        if not scratch:
            return np.matmul(x, y)
        shape = (*map(max, x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        return np.matmul(x, y, out=_scratch.array(scratch, shape, x.dtype))

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

    def tiles(self, block: Block, ruled: bool) -> tuple[int, int]:
        """Reason: speed. Logits of a tile stay in the cache; fewer rows waste less along a diagonal."""
        rows, columns = block.lengths
        return 256 if ruled else _even(rows), _even(columns)

    def transpose(self, x: Array) -> Array:
        """Reason: speed."""
        return x.swapaxes(-1, -2)

    def logits(self, query: Array, key: Array, precision: Any, precise: bool) -> Array:
        """Reason: bits. BLAS sums one term after the other, and loses twice what XLA does: large sums are float64."""
        if not precise:
            return super().logits(query, key, precision, precise)
        wide = self.matmul(query.astype(np.float64), self.transpose(key).astype(np.float64), scratch="wide")
        logits = _scratch.array("logits", wide.shape, query.dtype)
        np.copyto(logits, wide, casting="same_kind")
        return logits

    def row_sum(self, x: Array) -> Array:
        """Reason: speed. A product with ones sums at the rate of memory."""
        return np.matmul(x, np.ones((x.shape[-1], 1), x.dtype))

    def exp_minus(self, x: Array, shift: Array | None) -> Array:
        """Reason: speed. In place."""
        if shift is not None:
            np.subtract(x, shift, out=x)
        return np.exp(x, out=x)

    power_unit = float(np.log2(np.e))

    def power(self, x: Array) -> Array:
        """Reason: speed. Powers of two take less time."""
        return np.exp2(x, out=x)

    def times_minus(self, x: Array, y: Array, shift: Array) -> Array:
        """Reason: speed. In place."""
        np.subtract(y, shift, out=y)
        return np.multiply(x, y, out=y)

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

    def span(self, visible: Array) -> tuple[int, int]:
        """Reason: speed. The values are at hand."""
        columns = np.flatnonzero(visible.any(axis=tuple(range(visible.ndim - 1))))
        return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)

    def map_rows(
        self,
        function: Callable[[tuple[Block, ...]], tuple[Any, Any]],
        block: Block,
        groups: Sequence[Group],
        tiles: tuple[int, int],
        like: tuple[Any, Any],
    ) -> tuple[Any, Any]:
        """Reason: speed. One head at a time, tiles shared among threads, results in place."""
        results = _Results(block.lead, block.lengths[0], like)
        parts = [part for group in reversed(groups) for part in group.split(tiles[0])]  # those that see most first
        size = min(tiles[0], block.lengths[0]) * min(tiles[1], block.lengths[1])

        def work(item: tuple[Group, tuple[slice, ...]]) -> None:
            part, lead = item
            with np.errstate(all="ignore"):
                results.put(lead, part.rows, *function(cut_group(cut_lead(block, lead), part)))

        threads.for_each(work, list(itertools.product(parts, _ranges(block.lead, _LOGITS // size))))
        return results.rows, results.sums


def _ranges(lead: tuple[int, ...], count: int) -> Iterator[tuple[slice, ...]]:
    """Parts of the lead axes of at most so many entries, the last axes whole where possible."""
    steps = []
    for size in reversed(lead):
        steps.append(min(size, max(count, 1)))
        count //= size
    axes = [
        [slice(i, i + step) for i in range(0, size, step)] for size, step in zip(lead, reversed(steps), strict=True)
    ]
    return itertools.product(*axes)


class _Results:
    """Arrays of the whole, filled from the results of tiles, from several threads."""

    def __init__(self, lead: tuple[int, ...], length: int, like: tuple[Any, Any]) -> None:
        self.lead, self.length, self.like, self.lock = lead, length, like, threading.Lock()
        self.rows: Any = None
        self.sums: Any = None

    def put(self, lead: tuple[slice, ...], length: tuple[int, int], rows: Any, sums: Any) -> None:
        def make(x: Array, like: Array, length: int = 0) -> Array:
            return np.zeros((*like.shape[:-2], length or x.shape[-2], x.shape[-1]), x.dtype)

        with self.lock:
            if self.rows is None:
                self.rows = tree_map(partial(make, length=self.length), rows, self.like[0])
                self.sums = tree_map(make, sums, self.like[1])

        def add(x: Array, whole: Array, last: tuple[slice, ...] = ()) -> None:
            place = tuple(slice(None) if size == 1 else part for size, part in zip(whole.shape, lead, strict=False))
            if last and whole.shape[:-2] == self.lead:
                whole[(*place, *last)] = x
                return
            with self.lock:  # several tiles have a share in it
                whole[(*place, *last)] += x

        tree_map(partial(add, last=(slice(*length),)), rows, self.rows)
        tree_map(add, sums, self.sums)


class _Scratch(threading.local):
    """Memory of one thread, kept from tile to tile and call to call: a few megabytes."""

    def __init__(self) -> None:
        self.buffers: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        size = math.prod(shape) * dtype.itemsize
        buffer = self.buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self.buffers[name] = np.empty(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)


_scratch = _Scratch()


def _even(length: int) -> int:
    """A size of about 640, into which the length divides well; powers of two would collide in the cache."""
    return -(-length // max(1, round(length / 640)) // 32) * 32 or 32


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError("NumPy has bfloat16 only through the package ml_dtypes: install it first") from None
    return ml_dtypes.bfloat16


backend = NumPyBackend(xp)
