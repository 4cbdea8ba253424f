"""The matrix of queries against keys as a block of arrays, from which tiles are cut: blocks themselves.

Heads stand before lengths, and arrays keep the axes along which they are broadcast at size 1: nothing is expanded.
`lead` is ``batch..., num_heads``, with grouped heads ``batch..., kv_heads, group``.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any
Sizes = tuple[int, int]  # of rows and of columns; or where some of one start and stop


class Group(NamedTuple):
    """Some rows, and what is known of all of them without a look at any array; groups of a block follow one another."""

    rows: Sizes
    seen: Sizes  # columns outside which they see nothing
    sure: Sizes = (0, 0)  # columns among those which they see for certain

    def split(self, size: int) -> "list[Group]":
        """The same in groups of at most `size` rows."""
        start, stop = self.rows
        return [self._replace(rows=(i, min(i + size, stop))) for i in range(start, stop, size)]


class Pairs(NamedTuple):
    """What belongs to a query and a key at once: arrays ``[lead..., rows or 1, columns or 1]``, or None."""

    bias: tuple[Array, ...] = ()  # operands of its terms, see `rules.terms`
    sinks: Array | None = None  # a logit more in the sum of each row, of no value; of one column
    mask: Any = None  # see `rules.visible`
    counts: Any = None  # of the dropout bits, see `threefry.counts`
    statistics: Any = None  # backward only: base, total; then base, delta
    bounds: Any = None  # of the logits, see `tiling.with_bounds`; None where values cannot be looked at


class Block(NamedTuple):
    """Some queries against some keys."""

    rows: tuple[Array, ...]  # [lead..., rows, *]: query; backward also doutput and output
    columns: tuple[Array, Array]  # [lead..., columns, *]: key, value
    pairs: Pairs
    parameters: tuple[Array, ...] = ()  # [lead..., *, 1]: what biases by rule have for each head
    hidden: tuple[Array, ...] = ()  # [lead..., *, v_depth]: values of keys that are left out, hidden from all rows
    shown: Array | None = None  # [lead..., columns or 1, 1]: keys that some query sees, see `hidden.unspoiled`
    spoiled: Array | None = None  # [lead..., 1, v_depth]: what the others add to the mean of all values

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes before rows and columns, broadcast over all arrays."""
        shapes = (x.shape[:-2] for x in leaves(self))
        return tuple(max(sizes) if 0 not in sizes else 0 for sizes in zip(*shapes, strict=True))

    @property
    def lengths(self) -> Sizes:
        """Number of rows and of columns."""
        return self.rows[0].shape[-2], self.columns[0].shape[-2]

    @property
    def empty(self) -> bool:
        """Whether there are no queries, no keys, or no heads."""
        return 0 in (*self.lead, *self.lengths)

    @property
    def heads(self) -> int:
        """Number of heads of a batch entry; grouped heads are two axes."""
        lead, keys = self.lead, self.columns[0].shape[-3]
        return lead[-1] * lead[-2] if len(lead) > 1 and keys == 1 != lead[-1] else lead[-1]

    @property
    def grown_lengths(self) -> Sizes:
        """The same where a single query or key is grown by the pairs."""
        shapes = (self.lengths, *(x.shape[-2:] for x in leaves(self.pairs)))
        rows, columns = (next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True))
        return rows, columns


def everything(block: Block) -> Group:
    """All rows in one group."""
    rows, columns = block.lengths
    return Group((0, rows), (0, columns))


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


def cut_rows_of(x: Array, start: int, stop: int) -> Array:
    """An array of these rows; all of one that has none of its own."""
    return x if x.ndim < 2 or x.shape[-2] == 1 else x[..., start:stop, :]


def cut_rows(block: Block, start: int, stop: int) -> Block:
    """The block of these rows and all columns."""
    pairs = tree_map(lambda x: cut_rows_of(x, start, stop), block.pairs)
    return block._replace(rows=tuple(x[..., start:stop, :] for x in block.rows), pairs=pairs)


def cut_columns(block: Block, start: int, stop: int) -> Block:
    """The block of all rows and these columns."""
    pairs = tree_map(lambda x: x if x.shape[-1] == 1 else x[..., start:stop], block.pairs)
    key, value = (x[..., start:stop, :] for x in block.columns)
    return block._replace(columns=(key, value), pairs=pairs)


def cut_group(block: Block, group: Group) -> tuple[Block, ...]:
    """Some rows and the columns that they may see, in one to three blocks.

    That of the columns seen for certain has no mask; the first has the values of all columns that are not seen.
    """
    value, length = block.columns[1], block.lengths[1]
    first, last = group.seen
    block = cut_rows(block, *group.rows)
    hidden = tuple(value[..., i:j, :] for i, j in ((0, first), (last, length)) if i < j)
    start, stop = group.sure if group.sure[0] < group.sure[1] else (last, last)
    parts = [cut_columns(block, *ends) for ends in ((first, start), (start, stop), (stop, last))]
    parts[1] = parts[1]._replace(pairs=parts[1].pairs._replace(mask=None))
    parts = [part for part in parts if part.lengths[1]] or parts[:1]
    return parts[0]._replace(hidden=hidden), *parts[1:]


def cut_lead(tree: Any, ranges: tuple[slice, ...]) -> Any:
    """A block, or other arrays with lead axes, of a part of each lead axis."""

    def cut(x: Array) -> Array:
        return x[tuple(slice(None) if size == 1 else part for size, part in zip(x.shape, ranges, strict=False))]

    return tree_map(cut, tree)


def lead_parts(lead: tuple[int, ...], most: int) -> list[tuple[slice, ...]]:
    """Parts of the lead axes, of at most so many heads, each for `cut_lead`."""
    steps: list[int] = []
    for size in reversed(lead):
        steps.append(max(min(size, most), 1))
        most = most // size if most >= size > 0 else 1
    each = zip(lead, reversed(steps), strict=True)
    return [*itertools.product(*([slice(i, i + step) for i in range(0, size, step)] for size, step in each))]


def sum_to(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` summed over the axes along which an array of `shape` was broadcast to it."""
    extra = x.ndim - len(shape)
    if extra:
        x = xp.sum(x, axis=tuple(range(extra)))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return xp.sum(x, axis=axes, keepdims=True) if axes else x
