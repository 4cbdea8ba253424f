"""Attention of a sequence over several devices: the queries stay, and the keys go once around all of them.

Each device holds some rows and some columns of the block of the whole. In every turn it sends the columns that it has
to the next device, joins what its rows get from them with what they have, and takes columns from the device before.
What has columns alone (keys, values, their positions and ids) travels with them; what has rows stays, with the columns
of all devices. Backward, the gradients of what travels go along, and are at home after the last turn.

In zigzag the halves i and 2n - 1 - i of the sequence, of 2n, are at device i of n during the computation. So a causal
mask leaves the same to do for each.

Source: Liu, Zaharia and Abbeel, Ring attention with blockwise transformers (2023); Brandon et al., Striped attention
(2023), for the balance.
"""

import operator
from dataclasses import dataclass
from typing import Any

from anyattention._src import shards
from anyattention._src.blocks import Block, cut_rows, leaves, sum_to, tree_map
from anyattention._src.interfaces import Exchange, is_floating
from anyattention._src.shards import Results
from anyattention._src.tiles.partials import Partial, finite, nothing
from anyattention._src.tiles.tiling import Tiling

Array = Any


@dataclass(frozen=True)
class Kind:
    """What an array of `Pairs` has of the sequence."""

    rows: bool
    columns: bool
    travels: bool  # with the keys; else it has the columns of all devices


def kinds(tiling: Tiling, block: Block) -> Any:
    """The kinds of the pairs of a block, which is the whole, or a device's part."""
    spread, columns = tiling.options.spread, block.lengths[1]

    def kind(x: Array) -> Kind:
        rows, has = x.shape[-2] != 1, x.shape[-1] != 1
        travels = x.shape[-1] == columns if spread.local else not rows or spread.whole_queries
        return Kind(rows, has, has and travels)

    return tree_map(kind, block.pairs)


class Ring:
    """What one device knows, of the rows and columns that are its own."""

    def __init__(self, tiling: Tiling, exchange: Exchange, block: Block, kinds: Any) -> None:
        self.tiling, self.exchange, self.kinds = tiling, exchange, kinds
        self.backend, self.spread = tiling.backend, tiling.options.spread
        self.whole = shards.Whole(tiling.options, tiling.dtype, tiling.expression, tiling.terms)
        self.halves = 2 if self.spread.zigzag else 1
        rows, columns = (tuple(self.swapped(x, -2) for x in part) for part in (block.rows, block.columns))
        self.block = block._replace(rows=rows, columns=columns, pairs=tree_map(self._swap_pair, block.pairs, kinds))
        self.sinks = self.block.pairs.sinks  # which count once for each row, and not in each turn
        self.block = self.block._replace(pairs=self.block.pairs._replace(sinks=None))
        self.kinds = kinds._replace(sinks=None)

    def swapped(self, x: Array, axis: int, back: bool = False) -> Array:
        """Rows or columns as they lie in zigzag, of those of the device; or back."""
        if not self.spread.zigzag:
            return x
        size, exchange = self.exchange.size, self.exchange
        places = [half if half < size else 2 * size - 1 - half for half in range(2 * size)]
        even = exchange.index % 2 == 0
        first, second = self.cut(x, axis)
        if back:
            first, second = exchange.pick(even, first, second), exchange.pick(even, second, first)
        found = []
        for n, part in enumerate((first, second)):
            pairs = [*enumerate(places[n::2])]
            found.append(exchange.permuted(part, [(to, at) for at, to in pairs] if back else pairs))
        first, second = found
        if not back:
            first, second = exchange.pick(even, first, second), exchange.pick(even, second, first)
        return self.backend.xp.concat((first, second), axis=axis)

    def _swap_pair(self, x: Array, kind: Kind) -> Array:
        x = self.swapped(x, -2) if kind.rows else x
        return self.swapped(x, -1) if kind.travels else x

    def cut(self, x: Array, axis: int) -> list[Array]:
        """The halves of an array in zigzag; elsewhere the array."""
        size = x.shape[axis] // self.halves
        ends = [(n * size, (n + 1) * size) for n in range(self.halves)]
        return [x[..., a:b] if axis == -1 else x[..., a:b, :] for a, b in ends]

    def join(self, parts: list[Array], axis: int = -2) -> Array:
        """What `cut` takes apart."""
        return parts[0] if len(parts) == 1 else self.backend.xp.concat(parts, axis=axis)

    @property
    def travelling(self) -> list[Array]:
        """The columns of this device, and what belongs to these alone."""
        pairs = zip(leaves(self.block.pairs), leaves(self.kinds), strict=True)
        return [*self.block.columns, *[x for x, kind in pairs if kind.travels]]

    def start(self, source: Any, half: int) -> Any:
        """The first column of a part that comes from a device, in the whole."""
        size = self.block.lengths[1] // self.halves
        return (source if half == 0 else 2 * self.exchange.size - 1 - source) * size

    def parts(self, travelling: list[Array], source: Any) -> list[tuple[int, int, Block]]:
        """The block of this device's rows and the columns of another, in quarters in zigzag, by rows and columns."""
        arrays, found = self.backend.arrays, []
        for column in range(self.halves):
            key, value, *rest = (self.cut(x, -2 if n < 2 else -1)[column] for n, x in enumerate(travelling))
            others, size, start = iter(rest), key.shape[-2], self.start(source, column)

            def pair(x: Array, kind: Kind, others: Any = others, start: Any = start, size: int = size) -> Array:
                if kind.travels:
                    return next(others)
                return self.exchange.cut(x, start, size, -1) if kind.columns else x

            columns = arrays.cast(key, self.tiling.dtype), arrays.cast(value, self.tiling.dtype)
            block = self.block._replace(columns=columns, pairs=tree_map(pair, self.block.pairs, self.kinds))
            rows = block.lengths[0] // self.halves
            found += [(n, column, cut_rows(block, n * rows, (n + 1) * rows)) for n in range(self.halves)]
        return found

    def choose(self, then: Any, otherwise: Any, block: Block, *more: Any) -> Any:
        """What a part comes to: otherwise where the mask hides all of it for certain."""
        if not self.spread.skip:
            return then(block, *more)
        sees = shards.may_see(self.backend.arrays, self.tiling.expression, block)
        return self.exchange.choose(sees, then, otherwise, block, *more)

    def partial(self, block: Block) -> Partial:
        """The partial of a part."""
        return self.choose(self._seen, self._hidden, block)

    def _seen(self, block: Block) -> Partial:
        if self.by_kernel(block):
            return Partial(*self.backend.tiles.kernel.forward(self.tiling, block))
        return shards.seen(self.whole, block)

    def by_kernel(self, block: Block) -> bool:
        """Whether a part is for a kernel, which has no mask."""
        if not self.spread.kernel or not self.backend.tiles.kernel.fits(block):
            return False
        return bool(shards.shows_all(self.backend.arrays, self.tiling.expression, block))

    def _hidden(self, block: Block) -> Partial:
        """Without dropout in closed form; beside it, `spread` lets no key be hidden that has some weight."""
        (rows, *_), (_, value) = block.rows, block.columns
        if self.whole.options.dropout is not None:
            return nothing(self.backend.xp, rows, value.shape[-1])
        return shards.hidden(self.whole, rows, value.shape[-2], (self.backend.tiles.column_sum(value),))

    def statistics(self, results: Results, doutput: Array) -> list[Array]:
        """What `pull` takes: of the output, kernels take all, tiles what gradients have of it, a number a row."""
        of_output = results[0] if self.spread.kernel else shards.delta(results, doutput)
        return [*results[1:], of_output, doutput]

    def pull(self, block: Block, base: Array, total: Array, of_output: Array, doutput: Array) -> Any:
        """The gradients of a part, as `passes.backward` has them."""
        return self.choose(self._pull_seen, self._pull_hidden, block, base, total, of_output, doutput)

    def _pull_seen(self, block: Block, base: Array, total: Array, of_output: Array, doutput: Array) -> Any:
        if self.by_kernel(block):
            found = self.backend.tiles.kernel.backward(self.tiling, block, of_output, base, total, doutput)
            return (*found, (), tuple([None for _ in block.parameters]), None)
        delta = shards.delta((of_output, base, total), doutput) if self.spread.kernel else of_output
        found = tuple(shards.pulled(self.whole, block, (None, base, total), doutput, delta))
        return (*tree_map(self.exchange.placed, found[:5], self.wanted(block)), None)

    def _pull_hidden(self, block: Block, base: Array, total: Array, of_output: Array, doutput: Array) -> Any:
        xp, value = self.backend.xp, block.columns[1]
        dvalue = xp.zeros_like(value)
        if self.whole.options.dropout is None:
            each = shards.pulled_hidden(self.whole, (None, base, total), doutput)
            dvalue = dvalue + sum_to(xp, each, (*value.shape[:-2], 1, value.shape[-1]))
        dquery, dkey, _, *others = tree_map(self.zeros, self.wanted(block))
        return (dquery, dkey, self.exchange.placed(dvalue, value), *others, None)

    def zeros(self, x: Array) -> Array:
        """What gradients are added to, in the accumulators' dtype."""
        return self.backend.xp.zeros_like(x, dtype=self.block.rows[0].dtype)

    def wanted(self, block: Block) -> tuple[Any, ...]:
        """What of a block has a gradient, but for the sinks."""
        return block.rows[0], *block.columns, with_gradients(self.tiling, block.pairs.bias), self.floats(block)

    def floats(self, block: Block) -> tuple[Any, ...]:
        """The parameters that have a gradient."""
        of_bias, arrays = self.tiling.of_bias, self.backend.arrays
        return tuple([x if of_bias and is_floating(arrays, x) else None for x in block.parameters])


def with_gradients(tiling: Tiling, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of one thing for each operand of the bias, those that have a gradient; None for the others."""
    wanted = zip(operands, tiling.bias_axes, strict=True)
    return tuple([x if axes is not None and tiling.of_bias else None for x, axes in wanted])


def forward(tiling: Tiling, exchange: Exchange, block: Block, kinds: Any) -> Results:
    """Output, base and total of this device's rows."""
    ring = Ring(tiling, exchange, block, kinds)
    (query,), (_, value), last = ring.block.rows, ring.block.columns, exchange.size - 1

    def absorbed(states: list[Partial], travelling: list[Array], turn: Any) -> list[Partial]:
        states = list(states)
        for row, _, part in ring.parts(travelling, (exchange.index - turn) % exchange.size):
            states[row] = shards.joined(states[row], ring.partial(part))
        return states

    def step(carry: Any, turn: Any) -> Any:
        states, travelling = carry
        pending = exchange.send(travelling)  # before the work, so that it goes on meanwhile
        states = absorbed(states, travelling, turn)
        return states, exchange.receive(pending)

    states = [nothing(tiling.backend.xp, rows, value.shape[-1]) for rows in ring.cut(query, -2)]
    states, travelling = exchange.repeat(step, exchange.uniform((states, ring.travelling)), last)
    states = absorbed(states, travelling, last)
    state = Partial(*(ring.join([getattr(x, name) for x in states]) for name in Partial._fields))
    output, base, total = shards.finished(ring.whole, state, ring.sinks, False)
    return ring.swapped(output, -2, True), ring.swapped(base, -2, True), ring.swapped(total, -2, True)


def backward(tiling: Tiling, exchange: Exchange, block: Block, kinds: Any, results: Results, doutput: Array) -> Any:
    """The gradients of query, key, value, the operands and the parameters of the bias, and sinks, as they lie."""
    ring = Ring(tiling, exchange, block, kinds)
    given = [ring.cut(ring.swapped(x, -2), -2) for x in ring.statistics(results, doutput)]
    bias_kinds, last = ring.kinds.bias, exchange.size - 1
    #: By number, the operands of the bias whose gradients travel.
    going = [n for n, x in enumerate(with_gradients(tiling, bias_kinds)) if x is not None and x.travels]

    def zeros(x: Array, kind: Kind) -> list[Array] | None:
        return None if kind.travels else [ring.zeros(y) for y in (ring.cut(x, -2) if kind.rows else [x])]

    def pulled(sums: Any, travelling: list[Array], turn: Any) -> tuple[Any, list[Array]]:
        """The gradients of what stays, and of what travels, the latter from this device's rows alone."""
        dquery, dbias, dparameters = sums
        dquery, dbias = list(dquery), [x if x is None else list(x) for x in dbias]
        moved: dict[tuple[int, int], Array] = {}  # by number and half
        source = (exchange.index - turn) % exchange.size
        for row, column, part in ring.parts(travelling, source):
            dq, dk, dv, db, dp, _ = ring.pull(part, *(x[row] for x in given))
            dquery[row] = dquery[row] + dq
            for n, x in enumerate((dk, dv, *(db[n] for n in going))):
                moved[n, column] = moved[n, column] + x if (n, column) in moved else x
            for n, kind in enumerate(bias_kinds):
                if (sum_of := dbias[n]) is None:
                    continue
                at, start = row if kind.rows else 0, ring.start(source, column)
                sum_of[at] = exchange.add(sum_of[at], db[n], start, -1) if kind.columns else sum_of[at] + db[n]
            dparameters = tree_map(operator.add, dparameters, dp)
        own = [[moved[n, half] for half in range(ring.halves)] for n in range(2 + len(going))]
        return (dquery, dbias, dparameters), [ring.join(x, -2 if n < 2 else -1) for n, x in enumerate(own)]

    def step(carry: Any, turn: Any) -> Any:
        sums, travelling, arriving = carry
        pending = exchange.send(travelling)
        sums, own = pulled(sums, travelling, turn)
        before = exchange.receive(arriving)  # of these columns, by the devices that had them
        arriving = exchange.send([*map(operator.add, before, own)])
        return sums, exchange.receive(pending), arriving

    each = zip(with_gradients(tiling, ring.block.pairs.bias), bias_kinds, strict=True)
    bias = [None if x is None else zeros(x, kind) for x, kind in each]
    queries, parameters = ring.cut(ring.block.rows[0], -2), ring.floats(block)
    sums = [*map(ring.zeros, queries)], bias, tree_map(ring.zeros, parameters)
    nothing_yet = [ring.zeros(x) for x in (*ring.block.columns, *(ring.block.pairs.bias[n] for n in going))]
    carry = (*exchange.uniform((sums, ring.travelling)), exchange.arrived(exchange.uniform(nothing_yet)))
    sums, travelling, arriving = exchange.repeat(step, carry, last)
    sums, own = pulled(sums, travelling, last)
    before = exchange.receive(arriving)
    home = exchange.receive(exchange.send([*map(operator.add, before, own)]))

    dquery, dbias, dparameters = sums
    home = [ring.swapped(x, -2 if n < 2 else -1, back=True) for n, x in enumerate(home)]
    for n, x in zip(going, home[2:], strict=True):
        dbias[n] = x
    for n, kind in enumerate(bias_kinds):
        if isinstance(found := dbias[n], list):
            dbias[n] = ring.swapped(ring.join(found), -2, back=True) if kind.rows else exchange.shared(found[0])
    dsinks = None
    if ring.sinks is not None:
        dsinks = shards.pulled_sinks(block.pairs.sinks, results, doutput)
        dsinks = dsinks if kinds.sinks.rows else exchange.shared(dsinks)
    found = (
        ring.swapped(ring.join(dquery), -2, back=True),
        *home[:2],
        tuple(dbias),
        tree_map(exchange.shared, dparameters),
        dsinks,
    )
    return _as_given(ring, block, found)


def reduced(tiling: Tiling, exchange: Exchange, block: Block, kinds: Any) -> Results:
    """Output, base and total of all rows, which every device has, from its own columns and those of the others."""
    ring, xp = Ring(tiling, exchange, block, kinds), tiling.backend.xp
    ((_, _, part),) = ring.parts(ring.travelling, exchange.index)
    mine: Any = ring.partial(part)
    base = exchange.maximum(mine.base)
    weight = xp.exp(mine.base - finite(tiling.backend.tiles, base))
    total, output = mine.total * weight, xp.where(weight == 0.0, 0.0, mine.output) * weight
    state = Partial(base, exchange.sum(total), exchange.sum(output))
    return shards.finished(ring.whole, state, ring.sinks, False)


def pulled_of_reduced(
    tiling: Tiling, exchange: Exchange, block: Block, kinds: Any, results: Results, doutput: Array
) -> Any:
    """The gradients, as `backward` has them."""
    ring = Ring(tiling, exchange, block, kinds)
    ((_, _, part),) = ring.parts(ring.travelling, exchange.index)
    dquery, dkey, dvalue, dbias, dparameters, _ = ring.pull(part, *ring.statistics(results, doutput))
    found: list[Any] = []
    for x, gradient, kind in zip(block.pairs.bias, dbias, ring.kinds.bias, strict=True):
        if gradient is not None and kind.columns and not kind.travels:
            gradient = exchange.add(ring.zeros(x), gradient, ring.start(exchange.index, 0), -1)
        found.append(gradient if gradient is None or kind.travels else exchange.shared(gradient))
    dsinks = None if ring.sinks is None else shards.pulled_sinks(ring.sinks, results, doutput)
    dparameters = tree_map(exchange.shared, dparameters)
    return _as_given(ring, block, (exchange.shared(dquery), dkey, dvalue, tuple(found), dparameters, dsinks))


def gathered(tiling: Tiling, exchange: Exchange, block: Block, kinds: Any) -> Array:
    """The output of this device's rows, over the columns of all devices at once."""
    ring = Ring(tiling, exchange, block, kinds)
    arrays = tiling.backend.arrays

    def pair(x: Array, kind: Kind) -> Array:
        return exchange.gather(x, -1) if kind.travels else x

    columns = tuple(arrays.cast(exchange.gather(x, -2), tiling.dtype) for x in block.columns)
    whole = block._replace(columns=columns, pairs=tree_map(pair, block.pairs, kinds))
    return shards.whole_rows(ring.whole, whole)[0]


def _as_given(ring: Ring, block: Block, found: Any) -> Any:
    """Gradients in the dtypes of what they belong to."""
    wanted = (*ring.wanted(block), block.pairs.sinks)
    arrays = ring.backend.arrays
    return tree_map(lambda x, gradient: arrays.cast(gradient, arrays.dtype_name(x)), wanted, found)
