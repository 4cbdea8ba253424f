"""The graph of attention: a task for each pair of chunks of queries and keys that may see each other.

The partials of a chunk of queries are merged in a chain, in several where there are few chunks of queries. Keys that a
rule hides from a whole chunk of queries are one partial, by their number and the sum of their values. Names are made
of what the call is made of, so that equal calls share their tasks.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate, count, product
from types import CodeType
from typing import Any

import array_api_compat
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from anyattention._src import shards
from anyattention._src.blocks import everything, sum_to
from anyattention.extend import Block, leaves, tree_map

Array = Any
Key = Any  # (name, number of the chunk along each axis)
Index = tuple[int, ...]
Chunks = tuple[tuple[int, ...], ...]
_CHAINS = 8  # at least, where there are as many chunks of keys: what runs at the same time


@dataclass(frozen=True, eq=False)
class Leaf:
    """An array of a block in the chunks of a grid."""

    array: Array
    lead: tuple[bool, ...]  # the lead axes that it has
    last: tuple[str, str]  # what its last two axes are: "rows", "columns", or neither

    def key(self, lead: Index, i: int, j: int) -> Key:
        """Of its chunk for some lead axes, rows and columns."""
        at = {"rows": i, "columns": j}
        return (self.array.name, *map(operator.mul, lead, self.lead), *(at.get(axis, 0) for axis in self.last))


class Grid:
    """The chunks of lead axes and rows, which are the query's, and of columns, which are the key's."""

    def __init__(self, tiling: Any, block: Block) -> None:
        query, key = block.rows[0], block.columns[0]
        self.tiling = tiling
        self.whole = shards.Whole(tiling.options, tiling.dtype, tiling.expression, tiling.terms)
        self.lead: Chunks = query.chunks[:-2]
        self.rows, self.columns = query.chunks[-2], key.chunks[-2]
        groups = tiling.groups if len(tiling.groups) == len(self.rows) else [everything(block)] * len(self.rows)
        ends = [(stop - size, stop) for stop, size in zip(accumulate(self.columns), self.columns, strict=True)]
        #: Of each chunk of rows: the chunks of columns that it sees, with whether it sees all of each for certain, and
        #: those that a rule hides from it.
        self.seen: list[dict[int, bool]] = []
        self.hidden: list[list[int]] = []
        for group in groups:
            (first, last), (start, stop) = group.seen, group.sure
            filled = [(j, a, b) for j, (a, b) in enumerate(ends) if a < b]
            self.seen.append({j: start <= a and b <= stop for j, a, b in filled if a < last and b > first})
            self.hidden.append([j for j, *_ in filled if j not in self.seen[-1]])

    def __str__(self) -> str:
        """As `explain` says it."""
        leads = "" if len(self.leads) == 1 else f" for each of {len(self.leads)} chunks of batch and heads"
        return (
            f"chunks of queries and keys: {len(self.rows)} x {len(self.columns)}, "
            f"{sum(map(len, self.seen))} pairs visible{leads}; largest task {max(self.rows)} x {max(self.columns)}"
        )

    @property
    def leads(self) -> list[Index]:
        """The chunks of the lead axes."""
        return list(product(*(range(len(sizes)) for sizes in self.lead)))

    def leaf(self, x: Array, *last: str) -> Leaf:
        """An array of the block in these chunks."""
        sizes = {"rows": self.rows, "columns": self.columns}
        lead = tuple(size != 1 for size in x.shape[:-2])
        chunks = [sizes if own else (1,) for own, sizes in zip(lead, self.lead, strict=True)]
        both = [sizes.get(axis, (size,)) for axis, size in zip(last, x.shape[-2:], strict=True)]
        return Leaf(x.rechunk((*chunks, *both)), lead, (last[0], last[1]))

    def leaves(self, block: Block) -> Block:
        """The block with leaves for arrays."""

        def pair(x: Array) -> Leaf:
            return self.leaf(x, "rows" if x.shape[-2] != 1 else "", "columns" if x.shape[-1] != 1 else "")

        return block._replace(
            rows=tuple(self.leaf(x, "rows", "") for x in block.rows),
            columns=tree_map(lambda x: self.leaf(x, "columns", ""), block.columns),
            pairs=tree_map(pair, block.pairs),
            parameters=tuple(self.leaf(x, "", "") for x in block.parameters),
        )


class _Graph:
    """Tasks whose names are made of what they depend on."""

    def __init__(self, grid: Grid, block: Block, *others: Leaf) -> None:
        self.grid, self.block = grid, grid.leaves(block)
        self.sinks = self.block.pairs.sinks  # which count once for each row, and not in each pair
        paired = self.block._replace(pairs=self.block.pairs._replace(sinks=None))
        shown = paired._replace(pairs=paired.pairs._replace(mask=None))
        #: What the task of a pair takes: the structure of its block, and the leaves; less where a rule shows all of it.
        self.kinds = [(_numbered(x), leaves(x)) for x in (paired, shown)]
        self.arrays = [x.array for x in (*leaves(self.block), *others)]
        names = [x.name for x in self.arrays]
        made_of = grid.whole, _codes(grid.whole), grid.seen, names, self.kinds[0][0], self.sinks is None
        self.token = tokenize(*made_of)
        self.tasks: dict[Key, Any] = {}

    def add(self, name: str, at: Index, *task: Any) -> Key:
        """A task, and its key."""
        key = (f"{name}-{self.token}", *at)
        self.tasks[key] = (partial(_quietly, task[0]), *task[1:])
        return key

    def pair(self, lead: Index, i: int, j: int) -> tuple[Block, list[Key]]:
        """The structure of the block of a pair of chunks, and the keys of its arrays."""
        structure, found = self.kinds[self.grid.seen[i][j]]
        return structure, [x.key(lead, i, j) for x in found]

    def outputs(self, like: Array, wanted: Iterable[tuple[str, Chunks, dict[Key, Any]]]) -> list[Array]:
        """Arrays in these chunks, from tasks by the keys that chunks have in a leaf."""
        found, inner = [], f"attention-{self.token}"
        graph: Any = HighLevelGraph.from_collections(inner, self.tasks, dependencies=self.arrays)
        for kind, chunks, tasks in wanted:
            name = f"{kind}-{self.token}"
            last = {(name, *key[1:]): task for key, task in tasks.items()}
            layers, needs = {**graph.layers, name: last}, {**graph.dependencies, name: {inner}}
            found.append(da.Array(HighLevelGraph(layers, needs), name, chunks, like.dtype, like._meta))
        return found


def forward(tiling: Any, block: Block) -> tuple[Array, ...]:
    """Output, base and total of every query, in the query's chunks."""
    grid = Grid(tiling, block)
    graph, whole, leads = _Graph(grid, block), grid.whole, grid.leads
    (query,), (_, value) = graph.block.rows, graph.block.columns
    chains = max(1, _CHAINS // (len(leads) * len(grid.rows)))
    finished: dict[Key, Key] = {}
    for lead, i in product(leads, range(len(grid.rows))):
        ends: list[Key] = []
        end: list[Key] = []
        if grid.hidden[i] and whole.options.dropout is None:
            values = [value.key(lead, 0, j) for j in grid.hidden[i]]
            many = sum(grid.columns[j] for j in grid.hidden[i])
            sums = [graph.add("sum", x[1:], _sum, x) for x in values]
            end = [graph.add("hidden", (*lead, i), partial(_hidden, whole, many), query.key(lead, i, 0), sums)]
        for n in range(chains):
            for j in [*grid.seen[i]][n::chains]:
                structure, keys = graph.pair(lead, i, j)
                end = [graph.add("attend", (*lead, i, j), partial(_attended, whole, structure), *keys, *end)]
            ends, end = [*ends, *end], []
        checks = bool(grid.hidden[i]) and whole.options.dropout is not None
        sinks = [] if graph.sinks is None else [graph.sinks.key(lead, i, 0)]
        task = graph.add("finish", (*lead, i), partial(_finished, whole, checks), ends, *sinks)
        finished[query.key(lead, i, 0)] = task
    chunks = [(*grid.lead, grid.rows, (size,)) for size in (value.array.shape[-1], 1, 1)]
    parts = [{key: (operator.itemgetter(n), task) for key, task in finished.items()} for n in range(3)]
    return tuple(graph.outputs(query.array, zip(("output", "base", "total"), chunks, parts, strict=True)))


def backward(tiling: Any, block: Block, *given: Array) -> Any:
    """The gradients, as `passes.backward` has them, each in the chunks of what it belongs to.

    A pair takes the gradient of its queries so far, so that pairs of a chunk of queries follow one another; those of
    the other arrays are added up as pairs end.
    """
    grid = Grid(tiling, block)
    rows = [grid.leaf(x, "rows", "") for x in given]  # output, base, total, doutput
    graph, whole = _Graph(grid, block, *rows), grid.whole
    (query,), (_, value), pairs = graph.block.rows, graph.block.columns, graph.block.pairs
    bias = tuple([None if axes is None else x for axes, x in zip(tiling.bias_axes, pairs.bias, strict=True)])
    real = [x if "float" in tiling.backend.arrays.dtype_name(x.array) else None for x in graph.block.parameters]
    wanted = (query, *graph.block.columns, bias, tuple(real), pairs.sinks)
    found = [x for x in leaves(wanted) if x is not graph.sinks]
    #: Of what is added up, the last sum, by the number of the gradient and its chunk; two may be of the same array.
    sums: dict[Index, Key] = {}
    hidden: dict[Index, list[Key]] = {}

    def add(n: int, leaf: Leaf, lead: Index, i: int, j: int, task: Key) -> None:
        chunk = (n, *leaf.key(lead, i, j)[1:])
        before = [sums[chunk]] if chunk in sums else []
        sums[chunk] = graph.add(f"add-{n}", (*lead, i, j), partial(_added, n), task, *before)

    for lead, i in product(grid.leads, range(len(grid.rows))):
        results = [x.key(lead, i, 0) for x in rows]
        before: list[Key] = []
        for j in grid.seen[i]:
            structure, keys = graph.pair(lead, i, j)
            before = [graph.add("pull", (*lead, i, j), partial(_pulled, whole, structure), *keys, *results, *before)]
            for n, leaf in enumerate(found[1:], 1):
                add(n, leaf, lead, i, j, before[0])
        if before:
            add(0, query, lead, i, 0, before[0])
        if grid.hidden[i] and whole.options.dropout is None:
            row = graph.add("pull-hidden", (*lead, i), partial(_pulled_hidden, whole), *results)
            for j in grid.hidden[i]:
                hidden.setdefault((2, *value.key(lead, 0, j)[1:]), []).append(row)
        if graph.sinks is not None:
            task = graph.add("pull-sinks", (*lead, i), _pulled_sinks, graph.sinks.key(lead, i, 0), *results)
            add(len(found), graph.sinks, lead, i, 0, task)
    for chunk, tasks in hidden.items():
        before = [sums[chunk]] if chunk in sums else []
        own = (value.array.name, *chunk[1:])
        sums[chunk] = graph.add("add-hidden", chunk[1:], _with_hidden, own, tasks, *before)
    numbers = count()

    def gradient(leaf: Leaf, x: Array) -> Array:
        n, name = next(numbers), leaf.array.name
        places = product(*map(range, leaf.array.numblocks))
        parts = {(name, *at): sums.get((n, *at)) or (_zeros, (name, *at)) for at in places}
        return graph.outputs(query.array, [(f"gradient-{n}", leaf.array.chunks, parts)])[0].rechunk(x.chunks)

    owners = (*block.rows, *block.columns, block.pairs.bias, block.parameters, block.pairs.sinks)
    return tree_map(gradient, wanted, owners)


# --- what tasks compute, with arrays of the chunks' library ---


def _quietly(function: Any, *arrays: Any) -> Any:
    """Overflow and NaN are results, not occasions to warn."""
    with np.errstate(all="ignore"):
        return function(*arrays)


def _sum(value: Array) -> Array:
    return value.sum(axis=-2, keepdims=True)


def _hidden(whole: Any, many: int, rows: Array, sums: list[Array]) -> Any:
    return shards.hidden(whole, rows, many, tuple(sums))


def _attended(whole: Any, structure: Block, *arrays: Array) -> Any:
    size = len(leaves(structure))
    return shards.attended(whole, _filled(structure, arrays), *arrays[size:])


def _finished(whole: Any, checks: bool, ends: list[Any], sinks: Array | None = None) -> tuple[Array, Array, Array]:
    return shards.finished(whole, reduce(shards.joined, ends), sinks, checks)


def _pulled(whole: Any, structure: Block, *arrays: Any) -> list[Array]:
    """The gradients that there are, that of the query with what it was before."""
    size = len(leaves(structure))
    *results, doutput = arrays[size : size + 4]
    found = leaves(shards.pulled(whole, _filled(structure, arrays), tuple(results), doutput))
    return [sum((before[0] for before in arrays[size + 4 :]), found[0]), *found[1:]]


def _pulled_hidden(whole: Any, output: Array, base: Array, total: Array, doutput: Array) -> Array:
    return shards.pulled_hidden(whole, (output, base, total), doutput)


def _pulled_sinks(sinks: Array, output: Array, base: Array, total: Array, doutput: Array) -> Array:
    return shards.pulled_sinks(sinks, (output, base, total), doutput)


def _with_hidden(value: Array, rows: list[Array], gradient: Array | None = None) -> Array:
    """The gradient of values, with what each gets from queries that do not see them."""
    xp = array_api_compat.array_namespace(value)
    return sum(
        (sum_to(xp, x, (*value.shape[:-2], 1, value.shape[-1])) for x in rows),
        _zeros(value) if gradient is None else gradient,
    )


def _added(n: int, found: Any, before: Array | None = None) -> Array:
    """One of the gradients of a pair, with what it was before; or a gradient alone."""
    x = found[n] if isinstance(found, list) else found
    return x if before is None else before + x


def _zeros(x: Array) -> Array:
    return array_api_compat.array_namespace(x).zeros_like(x)


def _codes(x: Any) -> list[Any]:
    """The code of all functions in a tuple: Dask names those of a module by their name, which a reload may leave."""
    if isinstance(x, tuple):
        return [code for part in x for code in _codes(part)]
    code = x if isinstance(x, CodeType) else getattr(getattr(x, "func", x), "__code__", None)
    if code is None:
        return []
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    others = [const for const in code.co_consts if not isinstance(const, CodeType)]
    return [code.co_code, code.co_names, others, *_codes(tuple(inner))]


def _numbered(block: Block) -> Block:
    """A block with numbers for its arrays."""
    numbers = count()
    return tree_map(lambda x: next(numbers), block)


def _filled(structure: Block, arrays: tuple[Array, ...]) -> Block:
    """The block of these arrays."""
    return tree_map(lambda n: arrays[n], structure)
