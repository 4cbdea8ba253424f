"""Tiles in JAX: loops of XLA's, compiled once, with one head at a time on a CPU."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anyattention._src.blocks import Block, Group, Sizes, cut_columns, cut_group, cut_rows
from anyattention._src.interfaces import Function, OfTiles, Pair, Step, join_rows
from anyattention.extend import Call, Tiles
from anyattention_backends.jax.arrays import default_platform, is_symbol
from anyattention_backends.jax.mesh import attend
from anyattention_backends.jax.opaque import opaque
from anyattention_backends.jax.placement import axes_of, gathered, placed_as, vary, whole

_MOST_ROWS = 64


class JAXTiles(Tiles):
    most_groups = 8  # each is a piece of program to compile
    fuses = True

    def sizes(self, block: Block, ruled: bool) -> Sizes:
        """XLA does best with a whole row of keys, while it fits."""
        rows, columns = block.lengths
        most = 2**20 if default_platform() == "cpu" else 2**23  # logits of a tile: to stay in caches, to fill a GPU
        columns = min(columns, max(8192, most // max(rows, 1)))
        together = 1 if _one_cpu() else block.heads
        return max(16 if together > 1 else 256, min(512, most // max(columns * together, 1))), columns

    def row_max(self, x: Array) -> Array:
        """The weights do not depend on what is subtracted, so no derivative of it is needed."""
        return jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))

    def column_sum(self, x: Array) -> Array:
        """XLA sums rows one after the other, but products with several threads."""
        return jnp.matmul(jnp.ones((1, x.shape[-2]), x.dtype), x)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        return jnp.where(visible, x, np.asarray(value).astype(x.dtype))

    def map_rows(
        self, function: OfTiles, block: Block, groups: Sequence[Group], sizes: Sizes, like: Pair, draw: Any = None
    ) -> Pair:
        """Loops of XLA's, compiled once; derivatives recompute each tile."""
        if block.lead and _one_cpu() and not _few(block.rows[0], block.columns[0]):
            return _map_lead(lambda slab: self.map_rows(function, slab, groups, sizes, like), block)
        each = jax.checkpoint(function, prevent_cse=False)

        def step(carry: Any, *tile: Block) -> Pair:
            rows, sums = each(tile)
            return jax.tree.map(jnp.add, carry, sums), rows

        sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, cut_group(block, groups[0]))[1])
        sums = vary(sums, block)
        results = []
        for group in groups:  # which are cut outside the loop, for XLA would copy them every time; but not kept
            of_group = jax.checkpoint(partial(_of_group, step, group, sizes[0]), prevent_cse=False)
            sums, rows = of_group(sums, block)
            results += rows
        return join_rows(self.xp, results), sums

    def scan_columns(self, step: Step, state: Any, block: Block, sizes: Sizes) -> Pair:
        length, size = block.lengths[1], sizes[1]
        if length > size:
            step = jax.checkpoint(step, prevent_cse=False)
        alone = min(size, length) if state is None else 0  # the tile that makes the state
        state, results = _scan(step, state, [block], size, -1, alone)
        return state, join_rows(self.xp, results)

    def product(self, x: Array, y: Array, precision: Any = None, scratch: str = "") -> Array:
        """Precision is JAX's own. A few rows for each of several heads are one product."""
        return _product_of_few(x, y, precision) if _few(x, y) else jnp.matmul(x, y, precision=precision)

    def key_words(self, key: Any, like: Array) -> Array:
        """A typed key hides its words."""
        return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jnp.asarray(key)

    def any_row(self, function: Function, operands: Sequence[Array], rows: int) -> Array:
        """A loop: XLA would make all rows at once, and of constants would compute them itself, for seconds."""
        size, operands = min(256, rows), [whole(x, -2) if x.ndim > 1 else x for x in operands]

        def some(i: Any) -> Array:
            start = jnp.minimum(i * size, rows - size)  # the last rows may come twice
            cut = jax.lax.dynamic_slice_in_dim
            parts = [x if x.ndim < 2 or x.shape[-2] == 1 else cut(x, start, size, x.ndim - 2) for x in operands]
            return jnp.any(function(parts), axis=-2, keepdims=True)

        found = vary(jnp.zeros(jax.eval_shape(some, 0).shape, bool), operands)
        return jax.lax.fori_loop(0, -(-rows // size), lambda i, found: found | some(i), found)

    def with_shown(self, block: Block, shown: Callable[[], Array]) -> Block:
        """A choice of XLA's, which makes what is shown only where it is needed."""
        finite = jnp.all(jnp.stack([jnp.isfinite(jnp.sum(self.norms(x))) for x in block.columns]))
        everything = vary(jnp.ones(jax.eval_shape(shown).shape, bool), block)
        return block._replace(shown=jax.lax.cond(finite, lambda: everything, shown))

    def guarded(self, function: Function, tiling: Any, block: Block, shown: Callable[[], Array]) -> Any:
        """Of few rows the results tell whether keys and values are finite: a look at those takes as long again."""
        if block.lengths[0] > _MOST_ROWS:
            return super().guarded(function, tiling, block, shown)
        return _checked(function, tiling, block._replace(shown=shown()))

    def no_tiles(self, call: Call, by_rule: bool = False) -> str:
        """A loop of XLA's has tiles of one size, known when compiled; not all bits depend on key and index alone.

        Shardings are known of explicit axes of a mesh, and of the others where arrays are concrete.
        """
        if by_rule:
            found = [(name, axes_of(x, -3)) for name, x in zip(("query", "key"), call.operands[:2], strict=True)]
            sharded = [f"the length of {name} is sharded over {', '.join(axes)}" for name, axes in found if axes]
            return f"{' and '.join(sharded)}, and each device would compute all of it" if sharded else ""
        for rules, rule in (("masks", call.operands.mask), ("biases", call.operands.bias)):
            if any(isinstance(x, jax.core.Tracer) for f in getattr(rule, "functions", ()) for x in _held(f)):
                return (
                    f"a function of {rules}.Rule holds an array that JAX traces: pass it as query_arrays or key_arrays"
                )
        if any(is_symbol(n) for n in call.lengths):
            return "lengths are symbols of jax.export, and tiles have fixed sizes"
        (key, dropout), heads = (call.operands.dropout_key, call.options.dropout), call.operands.query.shape[-2]
        if dropout is None:
            return ""
        if not dropout.broadcast and is_symbol(heads):
            return "dropout of each head needs a known number of heads, not a symbol of jax.export"
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        kind = str(jax.random.key_impl(key)) if typed else jax.config.jax_default_prng_impl
        if kind != "threefry2x32":
            return f"dropout bits of {kind} keys cannot be drawn by tiles"
        if not jax.config.jax_threefry_partitionable:
            return "with jax_threefry_partitionable off, dropout bits cannot be drawn by tiles"
        if jax.config.jax_enable_x64 and jnp.asarray(dropout.keep_prob).dtype == jnp.float64:
            return "under x64 a float64 rate draws 64 bits an element: pass numpy.float32(rate)"
        return ""

    def compiled(self, function: Function, tiling: Any, *arrays: Any) -> Any:
        """One program, also when called eagerly."""
        return _compiled(function, tiling, *arrays)

    def differentiable(self, forward: Function, backward: Function, tiling: Any, block: Block) -> Any:
        """JAX differentiates the loops itself, in every mode it has; a ring in reverse mode, once."""
        if tiling.options.spread is not None:
            return (attend(tiling, block),)
        if block.shown is not None and not tiling.options.partial and _few(block.rows[0], block.columns[0]):
            return _checked(partial(_compiled, forward), tiling, block)
        return _compiled(forward, tiling, block)


@partial(jax.jit, static_argnums=(0, 1))
def _compiled(function: Function, tiling: Any, block: Block, *results: Array) -> Any:
    """Forward, or backward from its results: to checkpoint policies one operation, and all lengths are whole."""

    def local(block: Block, *results: Array) -> Any:
        results = tuple(whole(x, -2) for x in results)
        return function(tiling, gathered(block, by_column=len(tiling.groups) > 1), *results)

    (query, *_), columns, *_ = block
    places, found = (query, *columns) if results else (query,) * 3, opaque(local, block, *results)
    return *map(placed_as, found, places), *found[len(places) :]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _checked(forward: Function, tiling: Any, block: Block) -> Any:
    """The results of few queries, made again with zeros in place of what no query may see, if they show that.

    That pass over keys and values takes five times as long as the rest. A derivative needs it in any case.
    """
    results = forward(tiling, block._replace(shown=None))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(jnp.sum(x, axis=-1))) for x in results]))
    return jax.lax.cond(finite, lambda block: results, lambda block: forward(tiling, block), block)


@_checked.defjvp  # type: ignore[untyped-decorator]
def _(forward: Function, tiling: Any, primals: tuple[Block], tangents: tuple[Block]) -> Any:
    return jax.jvp(lambda block: forward(tiling, block), primals, tangents)


def _held(function: Callable[..., Any]) -> list[Any]:
    """What a function has from the function around it, or from `partial`."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return [*cells, *getattr(function, "args", ()), *getattr(function, "keywords", {}).values()]


def _few(x: Array, y: Array) -> bool:
    """Whether the rows of `x` are so few, and its heads those of `y`, that all are better served by one product."""
    if x.ndim > 2 and is_symbol(x.shape[-3]):
        return False
    return _one_cpu() and x.ndim > 2 and x.shape[-3] == y.shape[-3] > 1 and x.shape[-3] * x.shape[-2] <= _MOST_ROWS


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product_of_few(x: Array, y: Array, precision: Any) -> Array:
    """``x @ y``, all heads at once.

    Keys and values of all heads lie side by side in memory, ``[length, heads, depth]``; a product for each head would
    gather them first. So the rows are put on the diagonal of a matrix of heads by heads. Beside a zero of that matrix
    what is not finite would spread to the other heads: if anything comes out so, each head has its own product.
    """
    *lead, heads, rows, _ = x.shape
    if y.shape[-1] <= y.shape[-2]:  # [heads, columns, depth]: each row times the values of all heads, then its own
        x = jnp.reshape(x, (*lead, heads * rows, -1))
        y = jnp.moveaxis(y, -3, -2)  # as it lies
        y = jnp.reshape(y, (*y.shape[:-2], -1))
        z = jnp.reshape(jnp.matmul(x, y, precision=precision), (*lead, heads, rows, heads, -1))
        return jnp.einsum("...hrhd->...hrd", z)
    of_head = jnp.eye(heads, dtype=bool)[:, None, :, None]  # [heads, depth, columns]: the sum is over heads and depth
    diagonal = jnp.reshape(jnp.where(of_head, x[..., None, :], 0), (*lead, heads * rows, -1))
    lying = jnp.moveaxis(y, -1, -3)
    whole = jnp.reshape(lying, (*lying.shape[:-2], -1))
    # `matmul` takes one batch entry apart from its axis, and XLA then sums in another order than for several.
    z = jnp.einsum("...mk,...nk->...mn", diagonal, whole, precision=precision)
    z = jnp.reshape(z, (*lead, heads, rows, -1))

    # By rows: XLA is slow to reduce all axes at once.
    finite = jnp.all(jnp.isfinite(jnp.sum(z, axis=-1)), axis=(-1, -2))[..., None, None, None]

    def apart(_: Array, x: Array, lying: Array) -> Array:  # no product, whose copy of the keys XLA would make room for
        each = jnp.sum(x[..., None, :] * jnp.moveaxis(lying, -3, -2)[..., None, :, :], axis=-1)
        return jnp.where(finite, z, each)

    return jax.lax.cond(jnp.all(finite), lambda z, *_: z, apart, z, x, lying)


@_product_of_few.defjvp  # type: ignore[untyped-decorator]
def _(precision: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    (x, y), (dx, dy) = primals, tangents
    dz, more = (jnp.einsum("...mk,...kn->...mn", *pair, precision=precision) for pair in ((dx, y), (x, dy)))
    dz = dz + more
    return _product_of_few(x, y, precision), dz


def _one_cpu() -> bool:
    """Whether heads may be taken one after the other, or asked about together: on several devices they would wait."""
    return jax.device_count() == 1 and default_platform() == "cpu"


def _map_lead(function: Callable[[Block], Any], block: Block) -> Any:
    """Call the function for each index of the first axis; arrays of size 1 there serve them all."""
    leaves, structure = jax.tree.flatten(block)

    def one(mapped: list[Array]) -> Any:
        parts = iter(mapped)
        return function(structure.unflatten([x[0] if x.shape[0] == 1 else next(parts) for x in leaves]))

    if block.lead[0] == 1:
        return jax.tree.map(lambda x: x[None], one([]))
    return jax.lax.map(one, [x for x in leaves if x.shape[0] != 1])


def _of_group(step: Function, group: Group, size: int, sums: Any, block: Block) -> tuple[Any, list[Any]]:
    """Carry sums through the tiles of rows of a group."""
    return _scan(step, sums, cut_group(block, group), size, -2)


def _scan(step: Function, carry: Any, blocks: Any, size: int, axis: int, alone: int = 0) -> tuple[Any, list[Any]]:
    """Carry something through tiles along rows (-2) or columns (-1) of blocks; the other results come in pieces.

    Tiles are of one size, in a loop of XLA's, but for one that stands `alone` at the start and a rest at the end.
    """
    cut, length = cut_rows if axis == -2 else cut_columns, blocks[0].lengths[axis]
    full, pieces = length - length % size, []
    for start, stop in ((0, alone), (alone, full), (max(alone, full), length)):
        if start < stop:
            parts = [cut(block, start, stop) for block in blocks]
            carry, piece = _loop(step, carry, parts, cut, size) if stop - start > size else step(carry, *parts)
            pieces.append(piece)
    return carry, pieces


def _loop(step: Function, carry: Any, blocks: list[Block], cut: Callable[..., Block], size: int) -> Pair:
    """Carry something through tiles of one size; join the other results along rows."""
    leaves, structure = jax.tree.flatten(blocks)
    tile = jax.tree.leaves([cut(block, 0, size) for block in blocks])
    along = [next((a for a in (-2, -1) if x.shape[a] != y.shape[a]), 0) for x, y in zip(leaves, tile, strict=True)]

    def split(x: Array, axis: int) -> Array:
        axis += x.ndim
        return jnp.moveaxis(jnp.reshape(x, (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])), axis, 0)

    def one(carry: Any, parts: list[Array]) -> Pair:
        rest = iter(parts)
        return step(carry, *structure.unflatten([next(rest) if a else x for x, a in zip(leaves, along, strict=True)]))

    parts = [split(x, a) for x, a in zip(leaves, along, strict=True) if a]
    carry, results = jax.lax.scan(one, carry, parts)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, -3)
        return jnp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))

    return carry, jax.tree.map(join, results)
