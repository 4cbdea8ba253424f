"""Tiles in NumPy: one head at a time, shared among threads, computed in place."""

import itertools
import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from anyattention._src.blocks import Block, Group, Sizes, cut_group, cut_lead, lead_parts, leaves, tree_map
from anyattention._src.interfaces import OfTiles, Pair
from anyattention.extend import Tiles
from anyattention_backends.numpy import threads

Array = Any
_LOGITS = 2**19  # of a tile, if more heads can be taken together: calls of NumPy cost time, above all among threads


class NumPyTiles(Tiles):
    power_unit = float(np.log2(np.e))

    def sizes(self, block: Block, ruled: bool) -> Sizes:
        """Logits of a tile stay in the cache; fewer rows waste less along a diagonal, or where documents end.

        Eight documents of 256 tokens take 0.40 of the time, two of 1024 0.75, one 1.00.
        """
        rows, columns = block.lengths
        ruled = ruled or any(x.shape[-2] > 1 == x.shape[-1] for x in leaves(block.pairs.mask))
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

    def cap(self, x: Array, cap: float, again: bool) -> tuple[Array, Array | None]:
        tanh = np.tanh(x, out=x)
        if not again:
            return np.multiply(tanh, cap, out=tanh), None
        return np.multiply(tanh, cap, out=_scratch.array("capped", x.shape, x.dtype)), tanh

    def uncap(self, x: Array, tanh: Array) -> Array:
        np.multiply(tanh, tanh, out=tanh)
        return np.multiply(x, np.subtract(1.0, tanh, out=tanh), out=tanh)

    def plus(self, x: Array, y: Array) -> Array:
        larger = np.broadcast_shapes(x.shape, y.shape) != x.shape
        return x + y if larger else np.add(x, y, out=x)

    def along_diagonals(self, values: Array, rows: int, columns: int) -> Array:
        """A view: to copy takes as long as to add."""
        windows = np.lib.stride_tricks.sliding_window_view(values[..., 0, :], columns, axis=-1)
        return windows[..., ::-1, :]

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        np.copyto(x, value, where=~visible)
        return x

    def map_rows(
        self, function: OfTiles, block: Block, groups: Sequence[Group], sizes: Sizes, like: Pair, draw: Any = None
    ) -> Pair:
        results = _Results(block.lead, block.lengths[0], like)
        parts = [part for group in reversed(groups) for part in group.split(sizes[0])]  # those that see most first
        most = _LOGITS // (min(sizes[0], block.lengths[0]) * min(sizes[1], block.lengths[1]))
        if block.pairs.mask and block.lengths[1] > sizes[1]:  # what an entry hides can be skipped
            most = min(most, block.heads)
        if most >= 2 * block.heads:  # of several batch entries at once, none may depend on the values of another
            block = block._replace(pairs=block.pairs._replace(bounds=None))

        def work(item: tuple[int, tuple[Group, tuple[slice, ...]]]) -> None:
            tile, (part, lead) = item
            with np.errstate(all="ignore"):
                results.put(tile, lead, part.rows, *function(cut_group(cut_lead(block, lead), part)))

        threads.for_each(work, list(enumerate(itertools.product(parts, lead_parts(block.lead, most)))))
        return results.rows, results.sums


class _Results:
    """Arrays of the whole, filled from the results of tiles, from several threads.

    What several tiles add to is added to in the order of the tiles, so that its bits are the same in every run.
    """

    def __init__(self, lead: tuple[int, ...], length: int, like: Pair) -> None:
        self.lead, self.length, self.like, self.lock = lead, length, like, threading.Lock()
        self.rows: Any = None
        self.sums: Any = None
        self.waiting: dict[int, list[tuple[Array, Array]]] = {}  # by tile: parts of the whole, and what they get
        self.next = 0

    def put(self, tile: int, lead: tuple[slice, ...], length: tuple[int, int], rows: Any, sums: Any) -> None:
        def make(x: Array, like: Array, length: int = 0) -> Array:
            return np.zeros((*like.shape[:-2], length or x.shape[-2], x.shape[-1]), x.dtype)

        with self.lock:
            if self.rows is None:
                self.rows = tree_map(partial(make, length=self.length), rows, self.like[0])
                self.sums = tree_map(make, sums, self.like[1])
        shared = []

        def place(x: Array, whole: Array, last: tuple[slice, ...] = ()) -> None:
            at = tuple(slice(None) if size == 1 else part for size, part in zip(whole.shape, lead, strict=False))
            part = whole[(*at, *last)]
            if last and whole.shape[:-2] == self.lead:
                part[...] = x
            else:
                shared.append((part, x))

        tree_map(partial(place, last=(slice(*length),)), rows, self.rows)
        tree_map(place, sums, self.sums)
        with self.lock:
            self.waiting[tile] = shared
            while self.next in self.waiting:
                for part, x in self.waiting.pop(self.next):
                    part += x
                self.next += 1


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
