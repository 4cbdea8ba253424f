"""The matrix of queries against keys as a block of arrays, from which tiles are cut: blocks themselves.

Heads stand before lengths, and arrays keep the axes along which they are broadcast at size 1: nothing is expanded.
`lead` is ``batch..., num_heads``, with grouped heads ``batch..., kv_heads, group``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any


class Pairs(NamedTuple):
    """What belongs to a query and a key at once: arrays ``[lead..., rows or 1, columns or 1]``, or None."""

    bias: Array | None = None
    mask: Any = None  # see `masks.visible`
    counts: Any = None  # of the dropout bits, see `random.counts`
    statistics: Any = None  # backward only: maximum, delta / total


class Block(NamedTuple):
    """Some queries against some keys."""

    rows: tuple[Array, ...]  # [lead..., rows, *]: query / sqrt(depth); backward also doutput
    columns: tuple[Array, Array]  # [lead..., columns, *]: key, value
    pairs: Pairs
    hidden: Array | None = None  # [lead..., 1, v_depth]: the sum of the values of keys that are left out

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes before rows and columns, broadcast over all arrays."""
        shapes = (x.shape[:-2] for x in leaves(self))
        return tuple(max(sizes) if 0 not in sizes else 0 for sizes in zip(*shapes, strict=True))

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self.rows[0].shape[-2], self.columns[0].shape[-2]

    @property
    def empty(self) -> bool:
        """Whether there are no queries, no keys, or no heads."""
        return 0 in (*self.lead, *self.lengths)

    @property
    def grown_lengths(self) -> tuple[int, int]:
        """The same where a single query or key is grown by the pairs."""
        shapes = (self.lengths, *(x.shape[-2:] for x in leaves(self.pairs)))
        rows, columns = (next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True))
        return rows, columns


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The tree of nested tuples with the function applied to its arrays; None stays."""
    if tree is None:
        return None
    if isinstance(tree, tuple):
        parts = [tree_map(function, *each) for each in zip(tree, *others, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(tree, *others)


def leaves(tree: Any) -> list[Array]:
    """The arrays of the tree, in order."""
    found: list[Array] = []
    tree_map(found.append, tree)
    return found


def cut_rows(block: Block, start: int, stop: int) -> Block:
    """The block of these rows and all columns."""

    def pair(x: Array) -> Array:
        return x if x.shape[-2] == 1 else x[..., start:stop, :]

    rows = tuple(x[..., start:stop, :] for x in block.rows)
    return block._replace(rows=rows, pairs=tree_map(pair, block.pairs))


def cut_columns(block: Block, start: int, stop: int) -> Block:
    """The block of all rows and these columns."""

    def pair(x: Array) -> Array:
        return x if x.shape[-1] == 1 else x[..., start:stop]

    key, value = (x[..., start:stop, :] for x in block.columns)
    return block._replace(columns=(key, value), pairs=tree_map(pair, block.pairs))


def at(block: Block, index: tuple[int, ...]) -> Block:
    """The block at one index of the lead axes, without them."""
    return tree_map(lambda x: x[tuple(0 if x.shape[a] == 1 else i for a, i in enumerate(index))], block)
