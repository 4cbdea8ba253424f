"""A sequence over the devices of a mesh axis: which axis it is, and how its devices hear of each other."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from anyattention._src import ring
from anyattention._src.blocks import Block, tree_map
from anyattention._src.interfaces import Axis, Exchange
from anyattention_backends.jax.once import once
from anyattention_backends.jax.placement import axes_of, sharding_of, vary, varying

_EXPLICIT = getattr(getattr(jax.sharding, "AxisType", None), "Explicit", None)  # which JAX 0.5.0 has not
_GATHER = "wrap the call in config(exchange='gather'), which has all derivatives, in memory for all keys"


class MeshAxis(NamedTuple):
    """An axis, and the mesh if it is not the one in force; hashable."""

    name: str
    mesh: Any = None


def axis_of(axis: Any, query: Array, key: Array) -> Axis | None:
    """The mesh axis of this name; if None the explicit one over which both lengths are sharded.

    Inside `jax.shard_map` over the axis arrays are the device's parts, elsewhere they are the whole.
    """
    mesh, asked, able = _mesh(query), axis is not None, hasattr(jax.lax, "pcast") and hasattr(jax, "shard_map")
    if not asked and (mesh is None or not able or (axis := _explicit(mesh, query, key)) is None):
        return None
    if not isinstance(axis, str):
        raise TypeError(f"sequence_axis={axis!r}: for JAX's arrays it is the name of an axis of the mesh")
    if not able:
        raise NotImplementedError(f"sequence_axis needs JAX 0.8 or newer, this is {jax.__version__}")
    names = () if mesh is None else tuple(mesh.axis_names)
    if axis not in names:
        has = ", ".join(names) if names else "none: call it within `with jax.set_mesh(mesh)`"
        raise ValueError(f"there is no mesh axis {axis!r}: the mesh has {has}")
    of = MeshAxis(axis, None if mesh is jax.sharding.get_abstract_mesh() else mesh)
    exchanges: tuple[str, ...] = ("gather", "ring", "reduce")
    if _EXPLICIT in getattr(mesh, "axis_types", ()):  # beside explicit axes JAX 0.10 cannot lower gather's gradient
        exchanges = ("ring", "gather", "reduce")
    found = Axis(of, mesh.shape[axis], f"mesh axis {axis!r}", exchanges=exchanges, asked=asked)
    manual = getattr(mesh, "manual_axes", ())
    if axis not in manual:
        for name, x in (("query", query), ("key", key)):
            if elsewhere := [other for other in axes_of(x, -3) if other != axis]:
                raise ValueError(f"the length of {name} is sharded over {', '.join(elsewhere)}, not over {found.name}")
        return found
    whole_queries = axis in varying(key) and axis not in varying(query)
    others = tuple(f"mesh axis {other!r}" for other in manual if other != axis and mesh.shape[other] > 1)
    index = jax.lax.axis_index(axis)
    exchanges = exchanges if whole_queries else tuple(x for x in exchanges if x != "reduce")
    return found._replace(index=index, local=True, whole_queries=whole_queries, others=others, exchanges=exchanges)


def _mesh(x: Array) -> Any:
    """The mesh in force, else that of an array; None for none."""
    mesh = jax.sharding.get_abstract_mesh() if hasattr(jax.sharding, "get_abstract_mesh") else None
    if mesh is not None and not mesh.empty:
        return mesh
    if isinstance(x, jax.core.Tracer):  # of which explicit axes are known alone
        sharding = sharding_of(x)
        return None if sharding is None else sharding.mesh
    found = getattr(x.sharding, "mesh", None)
    return None if found is None or found.empty else found


def _explicit(mesh: Any, query: Array, key: Array) -> str | None:
    if _EXPLICIT not in getattr(mesh, "axis_types", ()):
        return None
    one, two = axes_of(query, -3), axes_of(key, -3)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return one[0] if one == two and len(one) == 1 and kinds[one[0]] == _EXPLICIT else None


class Devices(Exchange):
    """The devices of a mesh axis that is manual, within one program."""

    def __init__(self, axis: str, size: int, manual: bool, differing: frozenset[str]) -> None:
        super().__init__(size, jax.lax.axis_index(axis))
        self.axis, self.manual, self.differing = axis, manual, differing

    def send(self, arrays: Sequence[Array]) -> list[Array]:
        return [self.permuted(x, [(i, (i + 1) % self.size) for i in range(self.size)]) for x in arrays]

    def receive(self, pending: Any) -> list[Array]:
        return list(pending)

    def arrived(self, arrays: Sequence[Array]) -> list[Array]:
        return list(arrays)

    def permuted(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        return jax.lax.ppermute(x, self.axis, pairs)

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, self.axis)

    def maximum(self, x: Array) -> Array:
        return jax.lax.pmax(jax.lax.stop_gradient(x), self.axis)

    def gather(self, x: Array, axis: int) -> Array:
        return jax.lax.all_gather(x, self.axis, axis=x.ndim + axis, tiled=True)

    def shared(self, gradient: Array) -> Array:
        """Inside the caller's `jax.shard_map` JAX adds up itself."""
        return gradient if self.manual else self.sum(gradient)

    def uniform(self, tree: Any) -> Any:
        return vary(tree, self.differing)

    def placed(self, x: Array, like: Array) -> Array:
        return typed_as(x, like)

    def repeat(self, step: Callable[[Any, Any], Any], carry: Any, count: int) -> Any:
        return jax.lax.scan(lambda carry, turn: (step(carry, turn), None), carry, jnp.arange(count))[0]

    def choose(self, predicate: Any, then: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
        branches = (lambda *args, f=f: self.uniform(f(*args)) for f in (then, otherwise))
        return jax.lax.cond(jnp.asarray(predicate), *branches, *args)

    def pick(self, predicate: Array, x: Array, y: Array) -> Array:
        return jnp.where(predicate, x, y)

    def cut(self, x: Array, start: Any, size: int, axis: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim + axis)

    def add(self, x: Array, part: Array, start: Any, axis: int) -> Array:
        part = part + self.cut(x, start, part.shape[axis], axis)
        return jax.lax.dynamic_update_slice_in_dim(x, part, start, x.ndim + axis)


def typed_as(x: Array, like: Array) -> Array:
    """An array that lies along explicit axes as another does: they are part of types, which branches and loops keep."""
    sharding = jax.typeof(like).sharding
    explicit = _EXPLICIT in getattr(sharding.mesh, "axis_types", ())
    return jax.sharding.reshard(x, sharding) if explicit and jax.typeof(x).sharding != sharding else x


def attend(tiling: Any, block: Block) -> Array:
    """The output of a block that is the whole, or a device's part."""
    kinds, spread = ring.kinds(tiling, block), tiling.options.spread
    if not spread.local:
        return _compiled(tiling, kinds, block)
    return _by(tiling, kinds, varying(block), vary(block, varying(block)))


@partial(jax.jit, static_argnums=(0, 1))
def _compiled(tiling: Any, kinds: Any, block: Block) -> Array:
    """One program, also when called eagerly: JAX lets no mesh axis be manual, others not, outside of one."""
    return _by(tiling, kinds, frozenset(), block)


def _by(tiling: Any, kinds: Any, differing: frozenset[str], block: Block) -> Array:
    """The output by the exchange of the call, in our own `jax.shard_map` unless the caller has one."""
    way = tiling.options.spread.exchange
    if way == "ring":
        run = partial(_ring, tiling, kinds, differing)
        return once(run, _no_other, "the ring of sequence_axis", None, block, instead=_GATHER, alike=False)
    run = partial(_gathered if way == "gather" else _reduced, tiling, kinds, differing)
    return _on_each(tiling, kinds, run, block, rows=1)(block)[0]


def _gathered(tiling: Any, kinds: Any, differing: frozenset[str], block: Block) -> tuple[Array]:
    return (ring.gathered(tiling, _exchange(tiling, differing), block, kinds),)


def _reduced(tiling: Any, kinds: Any, differing: frozenset[str], block: Block) -> tuple[Array]:
    return (ring.reduced(tiling, _exchange(tiling, differing), block, kinds)[0],)


def _ring(tiling: Any, kinds: Any, differing: frozenset[str], mask: Any, block: Block, trained: bool = False) -> Array:
    return _differentiated(tiling, kinds, differing, block)


def _no_other(mask: Any, block: Block) -> Array:
    raise NotImplementedError  # for what is not sound, which a ring always is


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiated(tiling: Any, kinds: Any, differing: frozenset[str], block: Block) -> Array:
    return _forward(tiling, kinds, differing, block)[0]


def _forward(tiling: Any, kinds: Any, differing: frozenset[str], block: Block) -> Any:
    """The output, and what the written backward needs: by JAX's own, memory would grow with the devices."""

    def run(block: Block) -> Any:
        return ring.forward(tiling, _exchange(tiling, differing), block, kinds)

    results = _on_each(tiling, kinds, run, block, rows=3)(block)
    return results[0], (block, results)


def _backward(tiling: Any, kinds: Any, differing: frozenset[str], kept: Any, doutput: Array) -> tuple[Block]:
    block, results = kept

    def run(block: Block, results: Any, doutput: Array) -> Any:
        return ring.backward(tiling, _exchange(tiling, differing), block, kinds, results, doutput)

    pairs = block.pairs
    wanted = (*block.rows, *block.columns, ring.with_gradients(tiling, pairs.bias), block.parameters, pairs.sinks)
    found = _on_each(tiling, kinds, run, block)(block, results, doutput)
    dquery, dkey, dvalue, dbias, dparameters, dsinks = tree_map(typed_as, found, wanted)
    pairs = block.pairs._replace(bias=dbias, sinks=dsinks, mask=None, counts=None)
    return (block._replace(rows=(dquery,), columns=(dkey, dvalue), pairs=pairs, parameters=dparameters),)


_differentiated.defvjp(_forward, _backward)


def _exchange(tiling: Any, differing: frozenset[str]) -> Devices:
    """The devices, inside the caller's `jax.shard_map` or our own."""
    spread = tiling.options.spread
    return Devices(spread.axis.name, spread.size, spread.local, differing)


def _on_each(tiling: Any, kinds: Any, run: Any, block: Block, rows: int = 0) -> Any:
    """A function of a block on each device's part of the whole, which returns so many arrays of rows, or gradients.

    The axis alone becomes manual: what other axes of the mesh spread, such as batch and heads, JAX still sees whole.
    """
    spread = tiling.options.spread
    if spread.local:
        return run
    name, mesh = spread.axis
    sequence = None if spread.whole_queries else name

    def of_rows(x: Array, name: str | None = sequence) -> PartitionSpec:
        return PartitionSpec(*(None,) * (x.ndim - 2), name, None)

    def of_pair(x: Array, kind: ring.Kind) -> PartitionSpec:
        row, column = sequence if kind.rows else None, name if kind.travels else None
        return PartitionSpec(*(None,) * (x.ndim - 2), row, column)

    pairs = tree_map(of_pair, block.pairs, kinds)
    columns = tuple(of_rows(x, name) for x in block.columns)
    own = of_rows(block.rows[0])
    specs: Any = Block((own,), columns, pairs, tuple(PartitionSpec(*(None,) * x.ndim) for x in block.parameters))
    if rows:
        given: tuple[Any, ...] = (specs,)
        results: tuple[Any, ...] = (own,) * rows
    else:
        dbias = ring.with_gradients(tiling, pairs.bias)
        dparameters = tuple(PartitionSpec(*(None,) * x.ndim) for x in block.parameters)
        given, results = (specs, (own,) * 3, own), (own, *columns, dbias, dparameters, pairs.sinks)
    on_each = jax.shard_map(run, mesh=mesh, in_specs=given, out_specs=results, axis_names={name}, check_vma=False)
    return lambda *trees: on_each(*jax.tree.map(partial(_cut_along, name), trees, given))


def _cut_along(name: str, x: Array, spec: PartitionSpec) -> Array:
    """An array that lies along an explicit axis as a `spec` has it: JAX 0.12 no longer moves it there."""
    sharding = jax.typeof(x).sharding
    if name not in sharding.mesh.axis_names or _EXPLICIT not in sharding.mesh.axis_types:
        return x
    names: list[Any] = []
    for there, wanted in zip(sharding.spec, spec, strict=True):
        others = () if there is None else (there,) if isinstance(there, str) else tuple(there)
        kept = (*(other for other in others if other != name), *(() if wanted is None else (wanted,)))
        names.append(kept if len(kept) > 1 else kept[0] if kept else None)
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*names)))
