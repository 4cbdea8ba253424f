"""Attention between some queries and some keys of a whole, in the library of these: what those who cut a call share.

A shard is a block. Its positions, ids, bias and dropout counts are cut from arrays of the whole, so that nothing here
knows where it lies. The partials of the shards of a row are joined, with one in closed form for keys that a rule
hides; the backward pass of a shard needs of the others no more than the output, base and total of its rows.
"""

import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from anyattention._src.blocks import Block, sum_to
from anyattention._src.call import Options
from anyattention._src.interfaces import Arrays, Backend, permute
from anyattention._src.rules import Expression, Term, visible
from anyattention._src.tiles import passes
from anyattention._src.tiles.partials import Partial, finish, finite, of_hidden, of_sinks
from anyattention._src.tiles.tiling import Tiling, tiling

Array = Any
Results = tuple[Array, Array, Array]  # output, base and total of rows


class Whole(NamedTuple):
    """What all shards of a call share; it can be pickled, and named by its contents."""

    options: Options
    dtype: str
    expression: Expression | None
    terms: tuple[Term, ...]

    @property
    def keep_prob(self) -> float:
        """The probability that dropout keeps a weight."""
        return 1.0 if self.options.dropout is None else float(self.options.dropout.keep_prob)


class Home:
    """Where the backend of a shard's arrays is found; set by the registry, which stands above."""

    backend_of: Callable[[Array], Backend]


def attended(whole: Whole, block: Block, before: Partial | None = None) -> Partial:
    """The partial of every row over all columns of the shard, joined with that of others."""
    backend = Home.backend_of(block.rows[0])
    found = backend.arrays.run(block.rows[0], _attended, backend, whole, block)
    return found if before is None else joined(before, found)


def seen(whole: Whole, block: Block) -> Partial:
    """The partial of every row over all columns of the shard, of which it may see some."""
    backend = Home.backend_of(block.rows[0])
    return backend.arrays.run(block.rows[0], _seen, backend, whole, block)


def whole_rows(whole: Whole, block: Block) -> Results:
    """Output, base and total of rows whose columns are all there."""
    return _forward(Home.backend_of(block.rows[0]), whole, block, passes.forward)


def hidden(whole: Whole, rows: Array, count: int, sums: tuple[Array, ...]) -> Partial:
    """The partial of so many keys that a rule hides from all rows, by the sums of their values."""
    ones = Home.backend_of(rows).xp.ones_like(rows[..., :1])
    return Partial(ones * _fill(Home.backend_of(rows), whole), ones * count, ones * sum(sums[1:], sums[0]))


def joined(one: Partial, two: Partial) -> Partial:
    """The partial of the keys of both; what has no weight has no part in it, NaN or not. Overwrites nothing."""
    backend = Home.backend_of(one.total)
    return backend.arrays.run(one.total, _joined, backend, one, two)


def finished(whole: Whole, state: Partial, sinks: Array | None, checks: bool) -> Results:
    """Output, base and total of some rows, sinks included.

    Dropout has no closed form. If it `checks`, hidden keys have no part in the state, and must have no weight.

    Raises:
        ValueError: logits of visible keys so low that hidden ones have some weight, beside dropout.
    """
    backend = Home.backend_of(state.total)
    base: Any = state.base
    if checks and bool(backend.xp.any(base <= _fill(backend, whole) + 800.0)):
        raise ValueError(
            "dropout beside a mask by rule: visible logits are as low as those of hidden keys. Pass the mask as an "
            "array, so that no chunk is left out"
        )
    if sinks is not None:
        state = joined(state, of_sinks(backend.xp, sinks, state, False))
    return backend.arrays.run(state.total, finish, state, whole.keep_prob), state.base, state.total


def pulled(whole: Whole, block: Block, results: Results, doutput: Array, delta: Array | None = None) -> Any:
    """The gradients of what is in the shard, as `passes.backward` has them, from the results of whole rows.

    Given `delta`, the row sums of doutput times output over total, the output may be None.
    """
    backend = Home.backend_of(block.rows[0])
    return backend.arrays.run(block.rows[0], _pulled, backend, whole, block, results, doutput, delta)


def pulled_hidden(whole: Whole, results: Results, doutput: Array) -> Array:
    """What each value that a rule hides from these rows gets: no more than zero, unless they see no key at all."""
    (_, base, total), backend = results, Home.backend_of(doutput)
    fill: Any = _fill(backend, whole)

    def compute() -> Array:
        weights = backend.xp.exp(fill - finite(backend.tiles, base)) / (total * whole.keep_prob)
        return backend.xp.sum(backend.xp.where(weights == 0.0, 0.0, doutput) * weights, axis=-2, keepdims=True)

    return backend.arrays.run(doutput, compute)


def pulled_sinks(sinks: Array, results: Results, doutput: Array) -> Array:
    """The gradient of the sinks of some rows."""
    backend = Home.backend_of(doutput)
    xp, of_rows = backend.xp, delta(results, doutput)

    def compute() -> Array:
        return sum_to(xp, -xp.exp(sinks - finite(backend.tiles, results[1])) * of_rows, sinks.shape)

    return backend.arrays.run(doutput, compute)


def delta(results: Results, doutput: Array) -> Array:
    """The row sums of doutput times output, over total: what gradients have of the output."""
    (output, _, total), backend = results, Home.backend_of(doutput)
    return backend.arrays.run(doutput, lambda: backend.xp.sum(doutput * output, axis=-1, keepdims=True) / total)


def _fill(backend: Backend, whole: Whole) -> float:
    return float(backend.steps.lowest(whole.options.dtype))


def _tiling(backend: Backend, whole: Whole, block: Block) -> Tiling:
    return tiling(backend, whole.options, whole.dtype, whole.expression, whole.terms, block)


def _attended(backend: Backend, whole: Whole, block: Block) -> Partial:
    looks = whole.options.dropout is None and backend.arrays.inspects(block.rows[0])
    if looks and not may_see(backend.arrays, whole.expression, block):
        return of_hidden(backend.tiles, block.rows[0], _fill(backend, whole), block.columns[1:])
    return _seen(backend, whole, block)


def _seen(backend: Backend, whole: Whole, block: Block) -> Partial:
    return Partial(*_forward(backend, whole, block, _some))


def _some(tiling: Tiling, block: Block) -> Results:
    return passes.forward(tiling, block, passes.attend_some)


def _forward(backend: Backend, whole: Whole, block: Block, function: Any) -> Any:
    how = _tiling(backend, whole, block)
    if not _hides(whole, block):
        return function(how, block)
    return backend.tiles.guarded(function, how, block, partial(_shown, backend, whole, block))


def _joined(backend: Backend, one: Partial, two: Partial) -> Partial:
    xp = backend.xp
    bases: list[Any] = [one.base, two.base]
    base = xp.maximum(*bases)
    shift = finite(backend.tiles, base)
    left, right = (xp.exp(x - shift) for x in bases)

    def weighed(x: Array, weight: Array) -> Array:
        return (x if backend.arrays.surely(weight > 0.0, True) else xp.where(weight == 0.0, 0.0, x)) * weight

    output = backend.tiles.plus(weighed(one.output, left), weighed(two.output, right))
    return Partial(base, one.total * left + two.total * right, output)


def _pulled(backend: Backend, whole: Whole, block: Block, results: Results, doutput: Array, delta: Array | None) -> Any:
    how = _tiling(backend, whole, block)
    if _hides(whole, block):
        block = backend.tiles.with_shown(block, partial(_shown, backend, whole, block))
    return passes.backward(how, block, *results, doutput, None if delta is None else -delta)


def _hides(whole: Whole, block: Block) -> bool:
    """Whether a key may be there that no row sees."""
    return whole.expression is not None and block.pairs.mask is not None and not block.empty


def _shown(backend: Backend, whole: Whole, block: Block) -> Array:
    """Which keys of the shard some of its rows see, ``[lead..., columns or 1, 1]``."""
    arrays, xp, key = backend.arrays, backend.xp, block.columns[0]
    see = partial(visible, arrays, whole.expression)  # type: ignore[arg-type]  # asked for where there is one
    shown = backend.tiles.any_row(see, block.pairs.mask, block.lengths[0])
    more = tuple(axis for axis in range(key.ndim - 2) if shown.shape[axis] != 1 == key.shape[axis])
    shown = xp.any(shown, axis=more, keepdims=True) if more else shown
    return permute(arrays, shown, (-1, -2))


def may_see(arrays: Arrays, expression: Expression | None, block: Block) -> Any:
    """Whether a row may see a column of a block, as far as the least and the largest of its operands tell; an array."""
    if expression is None or block.pairs.mask is None or block.empty:
        return True
    return _holds(arrays, expression, block.pairs.mask, False)


def shows_all(arrays: Arrays, expression: Expression | None, block: Block) -> Any:
    """Whether every row sees every column of a block for certain; an array."""
    if expression is None or block.pairs.mask is None or block.empty:
        return not block.empty
    return _holds(arrays, expression, block.pairs.mask, True)


def _holds(arrays: Arrays, expression: Expression, operands: tuple[Array, ...], everywhere: bool) -> Any:
    """Whether an expression may hold somewhere; or whether it holds everywhere for certain."""
    xp, (name, *parts) = arrays.xp, expression
    if name == "array":
        shown = arrays.truth(operands[parts[0]])
        return xp.all(shown) if everywhere else xp.any(shown)
    if name == "function":
        return xp.asarray(not everywhere)
    if name == "~":
        return xp.logical_not(_holds(arrays, parts[0], operands, not everywhere))
    if name in ("&", "|"):
        found = [_holds(arrays, part, operands, everywhere) for part in parts]
        return functools.reduce(operator.and_ if name == "&" else operator.or_, found)
    (least, most), (low, high) = ((xp.min(operands[i]), xp.max(operands[i])) for i in parts)
    if name == "==":
        return (least == high) & (low == most) & (least == most) if everywhere else (least <= high) & (low <= most)
    one, two = (most, low) if everywhere else (least, high)
    return one <= two if name == "<=" else one < two
