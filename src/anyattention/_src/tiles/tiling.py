"""How a block is cut into tiles, and the shortcuts that its values allow.

Small logits need no maximum, and hidden keys are skipped: both are right where every row sees a key. Whether that is so
is known when the rows are computed; those that took a shortcut wrongly are computed again.
"""

import math
from typing import Any, NamedTuple

from anyattention._src import threefry
from anyattention._src.blocks import Block, Group, Sizes, everything
from anyattention._src.call import Options
from anyattention._src.interfaces import Backend
from anyattention._src.rules import Expression, Term, bound_of_terms, operands_with_gradients
from anyattention._src.tiles.partials import Partial

Array = Any
BOUND = 20.0  # exp(20) is 5e8: sums over any length, times values, stay in the range of float32
LEAST = 1e-30  # of a total: what is lost of it below the range of float32, 1e-38, does not count


class Tiling(NamedTuple):
    """What is the same in every tile; hashable."""

    backend: Backend
    options: Options  # of the call
    dtype: str  # of logits and accumulators: at least float32
    expression: Expression | None  # the mask, over the arrays in `Pairs.mask`
    root: float  # of the depth, or one over the scale: divides queries
    fill: float  # the logit of a masked key: finfo.min of the compute dtype
    sizes: Sizes  # rows and columns of a tile
    terms: tuple[Term, ...]  # the bias, over `Pairs.bias` and `Block.parameters`
    bias_axes: tuple[tuple[bool, bool] | None, ...]  # whether each of these has rows, and columns; None of integers
    groups: tuple[Group, ...]
    precise: bool  # sum logits in float64, which float32 needs where they are large
    # Shortcuts, which are right where every row sees a key: see `sound`.
    skip: bool  # leave out what is hidden
    bounded: bool = False  # take exp of logits as they are
    of_bias: bool = True  # backward: whether the bias has a gradient

    @property
    def keep_prob(self) -> Any:
        """The probability that dropout keeps a weight."""
        return 1.0 if self.options.dropout is None else self.options.dropout.keep_prob

    @property
    def unit(self) -> float:
        """What queries are multiplied by beside the scale: a pass over the logits less, whose unit it is.

        One over a soft cap, within bounds that keep queries in the range of float32; else that of powers.
        """
        if (cap := self.options.logits_soft_cap) is not None:
            return 1.0 / min(max(cap, 1e-9), 1e9)
        return self.backend.tiles.power_unit if self.bounded else 1.0

    def draw(self, counts: Any) -> Array:
        """Which weights dropout keeps, from the counts of their bits."""
        return threefry.keep_at(self.backend.xp, self.keep_prob, counts)


def tiling(
    backend: Backend,
    options: Options,
    dtype: str,
    expression: Expression | None,
    terms: tuple[Term, ...],
    block: Block,
    mask: Any = None,
) -> Tiling:
    """How a block is cut; `mask` is by rule, and tells which rows see which columns where its positions are these."""
    rows, columns = block.lengths
    ruled = mask is not None and mask.ranges(0, 1, columns)[0] != mask.ranges(rows - 1, rows, columns)[0]
    sizes = backend.tiles.sizes(block, ruled)
    root, fill = max(block.rows[0].shape[-1], 1) ** 0.5, float(backend.steps.lowest(options.dtype))
    if options.scale is not None:
        root = 1.0 / options.scale if options.scale else math.inf
    found = operands_with_gradients(backend, terms, block.pairs.bias)
    axes = [(x.shape[-2] != 1, x.shape[-1] != 1) if n in found else None for n, x in enumerate(block.pairs.bias)]
    groups = backend.tiles.groups(mask, block, sizes[0]) if ruled else (everything(block),)
    skip, precise = expression is not None and backend.arrays.inspects(block.rows[0]), options.dtype == "float32"
    return Tiling(backend, options, dtype, expression, root, fill, sizes, terms, tuple(axes), groups, precise, skip)


def with_bounds(tiling: Tiling, block: Block) -> Block:
    """The block with what bounds its logits by Cauchy and Schwarz, if values can be looked at.

    Norms of queries, ``[lead..., rows, 1]``; of keys the largest, what no bias exceeds, and of values beside a mask the
    sum of norms, which says whether all are finite: ``[lead..., 1, 1]``.
    """
    (query, *_), (key, value) = block.rows, block.columns
    xp, norms = tiling.backend.xp, tiling.backend.tiles.norms
    if not tiling.backend.arrays.inspects(query):
        return block
    rows, columns = (norms(x)[..., None] for x in (query, key))
    columns = xp.max(columns, axis=-2, keepdims=True)
    size = bound_of_terms(tiling.backend, tiling.terms, block.pairs.bias, block.parameters)
    values = None if tiling.expression is None else xp.sum(norms(value), axis=-1)[..., None, None]
    return block._replace(pairs=block.pairs._replace(bounds=(rows, columns, size, values)))


def inspected(tiling: Tiling, block: Block) -> Tiling:
    """The tiling with the shortcuts that are right for these rows, which are of one batch entry.

    Logits that are small need no maximum, since exp is far from overflow and underflow, and lose less than Flax's in
    a sum in float32; of a partial the maximum is wanted. Where a value is not finite, no key may be left out: Flax
    multiplies it by weights of zero.
    """
    arrays, xp, pairs = tiling.backend.arrays, tiling.backend.xp, block.pairs
    if pairs.bounds is None:
        return tiling._replace(skip=False)
    rows, columns, size, values = pairs.bounds
    largest = xp.max(rows) * xp.max(columns) / abs(tiling.root)
    small = arrays.surely(largest <= BOUND, True)
    all_finite = values is None or arrays.surely(xp.isfinite(values), True)
    cap = tiling.options.logits_soft_cap
    capped = largest if cap is None else xp.where(largest > cap, cap, largest)
    bounded = all_finite and not tiling.options.partial and arrays.surely(capped <= BOUND, True)
    if bounded and tiling.terms:
        bounded = size is not None and arrays.surely(capped + xp.max(size) <= BOUND, True)
    return tiling._replace(bounded=bounded, precise=tiling.precise and not small, skip=tiling.skip and all_finite)


def sound(tiling: Tiling, state: Partial) -> bool:
    """Whether the shortcuts that were taken were right for all rows."""
    if tiling.bounded:
        xp = tiling.backend.xp
        return tiling.backend.arrays.surely((state.total > LEAST) & xp.isfinite(state.output), True)
    return sees(tiling, state.base)


def sees(tiling: Tiling, base: Array) -> bool:
    """Whether every row has a logit beside which the fill vanishes; False where it cannot be known."""
    return tiling.backend.arrays.surely(base > tiling.fill + 800.0, True)  # exp(-800) is zero in float64 too
