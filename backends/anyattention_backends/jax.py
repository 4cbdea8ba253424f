"""JAX: the steps are Flax's own calls, so that the traced program, and with it every bit, is Flax's."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anyattention.backend import Backend
from anyattention.blocks import Block, Group, cut_columns, cut_group, cut_rows
from anyattention_backends.jax_cudnn import CuDNN
from anyattention_backends.jax_splash import Splash
from anyattention_backends.jax_tokamax import Tokamax

Array = Any


class JAXBackend(Backend):
    """Overrides for JAX arrays and tracers."""

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        self.registered: set[type] = set()

    def register(self, kind: type) -> None:
        """Reason: missing. Masks, which are dataclasses, pass through jit, vmap and grad; integers are static."""
        if kind in self.registered:
            return
        self.registered.add(kind)

        def flatten(mask: Any) -> tuple[list[Any], tuple[Any, ...]]:
            values = list(vars(mask).values())
            static = tuple(x if isinstance(x, int | str) else None for x in values)
            return [x if fixed is None else None for x, fixed in zip(values, static, strict=True)], static

        def unflatten(static: tuple[Any, ...], leaves: list[Any]) -> Any:
            mask: Any = object.__new__(kind)
            values = (leaf if fixed is None else fixed for leaf, fixed in zip(leaves, static, strict=True))
            vars(mask).update(zip(kind.__dataclass_fields__, values, strict=True))  # type: ignore[attr-defined]
            return mask

        jax.tree_util.register_pytree_node(kind, flatten, unflatten)

    def platform(self, x: Array) -> str:
        """Reason: missing. A tracer has no device, and a call is served alike traced and eager."""
        return jax.default_backend()

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """Reason: bits. Placement is left to JAX, which moves guests to where they are used."""
        return jnp.asarray(guest)

    def check_array(self, x: Array) -> Array:
        """Reason: missing. Flax variables and the like turn into arrays by ``__jax_array__``."""
        return x if isinstance(x, jax.Array) else jnp.asarray(x)

    def check_dtype(self, name: str) -> None:
        """Reason: bits. JAX knows more dtypes, and refuses the others itself."""

    def key_data(self, key: Any) -> Any:
        """Reason: missing. A typed key hides its words; only threefry's can be drawn from elsewhere."""
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if str(jax.random.key_impl(key)) != "threefry2x32":
                raise TypeError(
                    f"keys of kind {jax.random.key_impl(key)} can be used with JAX arrays only: make the key with "
                    "jax.random.key(seed, impl='threefry2x32') or anyattention.random.key(seed)"
                )
            key = jax.random.key_data(key)
        return np.asarray(key)

    def adopt_key(self, words: Any) -> Any:
        """Reason: bits. JAX reads raw words itself."""
        return words

    def cast(self, x: Array, name: str) -> Array:
        """Reason: bits. ``astype`` is Flax's cast."""
        return x if x.dtype.name == name and not x.weak_type else x.astype(name)

    def promote(self, arrays: Sequence[Array], dtype: Any = None) -> tuple[list[Array], str]:
        """Reason: bits. JAX's flags and weak types decide here, as in Flax."""
        first = arrays[0].dtype
        alike = dtype is None and all(x.dtype == first and not x.weak_type for x in arrays)
        if alike and jnp.issubdtype(first, jnp.inexact):  # nothing to ask, which takes JAX long
            return list(arrays), first.name
        if dtype is None:
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.result_type(*arrays)
                if not jnp.issubdtype(dtype, jnp.inexact):
                    dtype = jnp.promote_types(jnp.float32, dtype)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"Dtype must be inexact: {dtype!r}; pass a floating or complex dtype, or None to infer it")
        arrays = [jnp.asarray(x, dtype) for x in arrays]
        return arrays, arrays[0].dtype.name

    def join(self, x: Array, y: Any) -> tuple[Array, Any]:
        """Reason: bits. JAX promotes weakly typed values too; ranks are made equal here, casts explicit."""
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(x, y)
        y = jnp.asarray(y)
        x, y = (z if z.dtype == dtype else z.astype(dtype) for z in (x, y))
        if 0 < y.ndim < x.ndim:
            y = jnp.expand_dims(y, tuple(range(x.ndim - y.ndim)))
        elif x.ndim < y.ndim:
            x = jnp.expand_dims(x, tuple(range(y.ndim - x.ndim)))
        return x, y

    def scale(self, query: Array, depth: int, dtype: str) -> Array:
        """Reason: bits. XLA sees the root as Flax writes it."""
        return query / jnp.sqrt(depth).astype(query.dtype)

    def divide_by_scalar(self, x: Array, value: Any, dtype: str) -> Array:
        """Reason: bits."""
        return x / jnp.asarray(value, dtype=x.dtype)

    def contract(self, equation: str, x: Array, y: Array, precision: Any = None, dot_general: Any = None) -> Array:
        """Reason: bits. A matrix product of permuted axes rounds differently from Flax's einsum."""
        kwargs: dict[str, Any] = {}
        if dot_general:
            kwargs["_dot_general"] = dot_general
        if x.dtype != y.dtype:
            with jax.numpy_dtype_promotion("standard"):
                return jnp.einsum(equation, x, y, precision=precision, **kwargs)
        return jnp.einsum(equation, x, y, precision=precision, **kwargs)

    def truth(self, mask: Array) -> Array:
        """Reason: bits. The same test for zero that ``jnp.where`` makes."""
        return mask if mask.dtype == bool else mask != jnp.zeros((), mask.dtype)

    def where(self, mask: Array, x: Array, fill: Any) -> Array:
        """Reason: bits. ``jnp.where`` takes the mask as it is."""
        return jnp.where(mask, x, np.asarray(fill).astype(x.dtype))

    def lowest(self, dtype: str) -> Any:
        """Reason: missing. JAX has more floating dtypes than the table of `dtypes`."""
        return jnp.finfo(dtype).min

    def softmax(self, logits: Array) -> Array:
        """Reason: bits, of the gradient above all."""
        return jax.nn.softmax(logits)

    def keep(self, key: Any, keep_prob: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Reason: bits. Every kind of key, under the flags in force."""
        return jax.random.bernoulli(key, keep_prob, shape)

    # --- tiles ---

    def tiles(self, block: Block, ruled: bool) -> tuple[int, int]:
        """Reason: speed. XLA does best with a whole row of keys, while it fits."""
        rows, columns = block.lengths
        most = 2**20 if jax.default_backend() == "cpu" else 2**24  # logits of a tile: to stay in caches, to fill a GPU
        columns = min(columns, max(8192, most // max(rows, 1)))
        together = 1 if _one_cpu() else -(-math.prod(block.lead) // jax.device_count())
        return max(16 if together > 1 else 256, min(512, most // max(columns * together, 1))), columns

    def row_max(self, x: Array) -> Array:
        """Reason: speed. The weights do not depend on what is subtracted, so no derivative of it is needed."""
        return jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))

    def column_sum(self, x: Array) -> Array:
        """Reason: speed. XLA sums rows one after the other, but products with several threads."""
        return jnp.matmul(jnp.ones((1, x.shape[-2]), x.dtype), x)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        """Reason: bits. ``jnp.where`` with a fill of the logits' dtype."""
        return jnp.where(visible, x, np.asarray(value).astype(x.dtype))

    most_groups = 8  # each is a piece of program to compile

    def map_rows(
        self,
        function: Callable[[tuple[Block, ...]], tuple[Any, Any]],
        block: Block,
        groups: Sequence[Group],
        tiles: tuple[int, int],
        like: tuple[Any, Any],
    ) -> tuple[Any, Any]:
        """Reason: speed. Loops of XLA's, compiled once; derivatives recompute each tile."""
        if block.lead and _one_cpu() and not _few(block.rows[0], block.columns[0]):
            return _map_lead(lambda slab: self.map_rows(function, slab, groups, tiles, like), block)
        each = jax.checkpoint(function, prevent_cse=False)

        def step(carry: Any, tile: tuple[Block, ...]) -> tuple[Any, Any]:
            rows, sums = each(tile)
            return jax.tree.map(jnp.add, carry, sums), rows

        sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, cut_group(block, groups[0]))[1])
        results = []
        for group in groups:
            parts = cut_group(block, group)  # outside the loop, for XLA would copy them every time
            length = parts[0].lengths[0]
            full = length - length % tiles[0]
            for start, stop in ((0, full), (full, length)):
                if start < stop:
                    cut = tuple(cut_rows(part, start, stop) for part in parts)
                    sums, rows = _scan(step, sums, cut, tiles[0], -2)
                    results.append(rows)
        return self.join_rows(results), sums

    def scan_columns(
        self, step: Callable[[Any, Block], tuple[Any, Any]], state: Any, block: Block, tiles: tuple[int, int]
    ) -> tuple[Any, Any]:
        """Reason: speed. As `map_rows`."""
        if block.lengths[1] > tiles[1]:
            step = jax.checkpoint(step, prevent_cse=False)
        length, size = block.lengths[1], tiles[1]
        full = length - length % size
        first = min(size, length) if state is None else 0  # the tile that makes the state stands alone
        results = []
        for start, stop in ((0, first), (first, full), (max(first, full), length)):
            if start < stop:
                state, result = _scan(step, state, cut_columns(block, start, stop), size, -1)
                results.append(result)
        return state, self.join_rows(results)

    def matmul(self, x: Array, y: Array, precision: Any = None, scratch: str = "") -> Array:
        """Reason: speed, and precision is JAX's own. A few rows for each of several heads are one product."""
        return _product_of_few(x, y, precision) if _few(x, y) else jnp.matmul(x, y, precision=precision)

    def beside(self, like: Array | None) -> dict[str, Any]:
        """Reason: missing. A tracer has no device, and the sharding of one array does not fit another."""
        return {}

    def key_array(self, key: Any) -> Array:
        """Reason: missing. A typed key hides its words."""
        return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jnp.asarray(key)

    def no_keep_tiles(self, key: Any, keep_prob: Any) -> str:
        """Reason: bits. Some layouts of random bits are not a function of key and index."""
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and str(jax.random.key_impl(key)) != "threefry2x32":
            return f"dropout bits of {jax.random.key_impl(key)} keys cannot be drawn by tiles"
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and jax.config.jax_default_prng_impl != "threefry2x32":
            return f"dropout bits of {jax.config.jax_default_prng_impl} keys cannot be drawn by tiles"
        if not jax.config.jax_threefry_partitionable:
            return "with jax_threefry_partitionable off, dropout bits cannot be drawn by tiles"
        if jax.config.jax_enable_x64 and jnp.asarray(keep_prob).dtype == jnp.float64:
            return "under x64 a float64 rate draws 64 bits an element: pass numpy.float32(rate)"
        return ""

    def compiled(self, function: Callable[..., Any], call: Any, *arrays: Any) -> Any:
        """Reason: speed. One program, also when called eagerly."""
        return _compiled(function, call, *arrays)

    def differentiable(
        self, forward: Callable[..., Any], backward: Callable[..., Any], call: Any, block: Block
    ) -> Array:
        """Reason: speed. JAX differentiates the loops itself, in every mode it has."""
        return _compiled(forward, call, block)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _compiled(function: Callable[..., Any], call: Any, *arrays: Any) -> Any:
    return function(call, *arrays)


def _few(x: Array, y: Array) -> bool:
    """Whether the rows of `x` are so few, and its heads those of `y`, that all are better served by one product."""
    return _one_cpu() and x.ndim > 2 and x.shape[-3] == y.shape[-3] > 1 and x.shape[-3] * x.shape[-2] <= 64


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
    z = jnp.reshape(jnp.matmul(diagonal, whole.mT, precision=precision), (*lead, heads, rows, -1))

    def apart(_: Array, x: Array, lying: Array) -> Array:  # no product, whose copy of the keys XLA would make room for
        return jnp.sum(x[..., None, :] * jnp.moveaxis(lying, -3, -2)[..., None, :, :], axis=-1)

    finite = jnp.all(jnp.isfinite(jnp.sum(z, axis=-1)))  # by rows: XLA is slow to reduce all axes at once
    return jax.lax.cond(finite, lambda z, *_: z, apart, z, x, lying)


def _derivative_of_few(precision: Any, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    (x, y), (dx, dy) = primals, tangents
    dz = jnp.matmul(dx, y, precision=precision) + jnp.matmul(x, dy, precision=precision)
    return _product_of_few(x, y, precision), dz


_product_of_few.defjvp(_derivative_of_few)


def _one_cpu() -> bool:
    """Whether heads may be taken one after the other, or asked about together: on several devices they would wait."""
    return jax.device_count() == 1 and jax.default_backend() == "cpu"


def _blocks(tree: Any) -> list[Block]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Block))


def _map_lead(function: Callable[[Block], Any], block: Block) -> Any:
    """Call the function for each index of the first axis; arrays of size 1 there serve them all."""
    size = block.lead[0]
    leaves, structure = jax.tree.flatten(block)
    if size == 1:
        return jax.tree.map(lambda x: x[None], function(structure.unflatten([x[0] for x in leaves])))
    mapped = [x for x in leaves if x.shape[0] != 1]

    def one(mapped: list[Array]) -> Any:
        parts = iter(mapped)
        return function(structure.unflatten([x[0] if x.shape[0] == 1 else next(parts) for x in leaves]))

    return jax.lax.map(one, mapped)


def _scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, blocks: Any, size: int, axis: int
) -> tuple[Any, Any]:
    """Carry something through tiles of one size along rows (-2) or columns (-1); join the other results along rows.

    `blocks` is one block, or several of the same rows.
    """
    cut, length = cut_rows if axis == -2 else cut_columns, _blocks(blocks)[0].lengths[axis]
    if length <= size:
        return step(carry, blocks)
    leaves, structure = jax.tree.flatten(blocks)
    tile = [x for block in _blocks(blocks) for x in jax.tree.leaves(cut(block, 0, size))]
    along = [next((a for a in (-2, -1) if x.shape[a] != y.shape[a]), 0) for x, y in zip(leaves, tile, strict=True)]

    def split(x: Array, axis: int) -> Array:
        axis += x.ndim
        return jnp.moveaxis(jnp.reshape(x, (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])), axis, 0)

    def one(carry: Any, parts: list[Array]) -> tuple[Any, Any]:
        rest = iter(parts)
        return step(carry, structure.unflatten([next(rest) if a else x for x, a in zip(leaves, along, strict=True)]))

    parts = [split(x, a) for x, a in zip(leaves, along, strict=True) if a]
    carry, results = jax.lax.scan(one, carry, parts)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, -3)
        return jnp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))

    return carry, jax.tree.map(join, results)


backend = JAXBackend(jnp)
backend.engines = (CuDNN(backend), Tokamax(backend), Splash(backend))
