"""Tiles in NumPy: one head at a time, shared among threads, computed in place."""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from anyattention._src.blocks import Block, Group, Sizes, cut_group, cut_lead, tree_map
from anyattention._src.interfaces import OfTiles, Pair
from anyattention.extend import Tiles
from anyattention_backends.numpy import threads

Array = Any
_LOGITS = 2**19  # of a tile, if more heads can be taken together: calls of NumPy cost time, above all among threads


class NumPyTiles(Tiles):
    power_unit = float(np.log2(np.e))

    def sizes(self, block: Block, ruled: bool) -> Sizes:
        """Logits of a tile stay in the cache; fewer rows waste less along a diagonal."""
        rows, columns = block.lengths
        return 256 if ruled else _even(rows), _even(columns)

    def transpose(self, x: Array) -> Array:
        return x.swapaxes(-1, -2)

    def product(self, x: Array, y: Array, precision: Any = None, scratch: str = "") -> Array:
        """New memory costs as much as a pass over it."""
        if not scratch:
            return np.matmul(x, y)
        shape = (*map(max, x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        return np.matmul(x, y, out=_scratch.array(scratch, shape, x.dtype))

    def logits(self, query: Array, key: Array, precision: Any, precise: bool) -> Array:
        """BLAS sums one term after the other, and loses twice what XLA does: large sums are float64."""
        if not precise:
            return super().logits(query, key, precision, precise)
        wide = self.product(query.astype(np.float64), self.transpose(key).astype(np.float64), scratch="wide")
        logits = _scratch.array("logits", wide.shape, query.dtype)
        np.copyto(logits, wide, casting="same_kind")
        return logits

    def row_sum(self, x: Array) -> Array:
        """A product with ones sums at the rate of memory."""
        return np.matmul(x, np.ones((x.shape[-1], 1), x.dtype))

    def exp_minus(self, x: Array, shift: Array | None) -> Array:
        if shift is not None:
            np.subtract(x, shift, out=x)
        return np.exp(x, out=x)

    def power(self, x: Array) -> Array:
        """Powers of two take half the time of exp."""
        return np.exp2(x, out=x)

    def times_minus(self, x: Array, y: Array, shift: Array) -> Array:
        return np.multiply(x, np.subtract(y, shift, out=y), out=y)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        np.copyto(x, value, where=~visible)
        return x

    def span(self, visible: Array) -> tuple[int, int]:
        columns = np.flatnonzero(visible.any(axis=tuple(range(visible.ndim - 1))))
        return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)

    def map_rows(self, function: OfTiles, block: Block, groups: Sequence[Group], sizes: Sizes, like: Pair) -> Pair:
        results = _Results(block.lead, block.lengths[0], like)
        parts = [part for group in reversed(groups) for part in group.split(sizes[0])]  # those that see most first
        size = min(sizes[0], block.lengths[0]) * min(sizes[1], block.lengths[1])

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
    each = zip(lead, reversed(steps), strict=True)
    return itertools.product(*([slice(i, i + step) for i in range(0, size, step)] for size, step in each))


class _Results:
    """Arrays of the whole, filled from the results of tiles, from several threads."""

    def __init__(self, lead: tuple[int, ...], length: int, like: Pair) -> None:
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
