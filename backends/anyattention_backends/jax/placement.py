"""Lengths that are sharded over the devices of a mesh: no device has all rows, or all keys, of its heads.

Where JAX knows the sharding when it traces (explicit axes) it refuses what is ambiguous; elsewhere (automatic axes) XLA
decides, and cuts along the tiles of a loop, and of groups of rows, go across the shards, dozens of messages each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from anyattention.extend import Block, tree_map


def sharding_of(x: Array) -> Any:
    """How an array, even a tracer, lies on a mesh as JAX knows it when it traces; None where there is no mesh."""
    typeof = getattr(jax, "typeof", None)
    sharding = getattr(typeof(x), "sharding", None) if typeof else None
    return None if sharding is None or sharding.mesh.empty else sharding


def _all_auto(sharding: Any) -> bool:
    return all(kind == jax.sharding.AxisType.Auto for kind in sharding.mesh.axis_types)


def axes_of(x: Array, axis: int) -> tuple[str, ...]:
    """The axes of a mesh over which this axis of the array is known to be sharded."""
    sharding = sharding_of(x)
    if sharding is None:
        return ()
    if not isinstance(x, jax.core.Tracer):
        sharding = x.sharding
    spec = getattr(sharding, "spec", ())
    names = (*spec, *(None,) * (x.ndim - len(spec)))[axis]
    names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in names if sharding.mesh.shape[name] > 1)


def varying(tree: Any) -> frozenset[str]:
    """The manual axes of a mesh along which devices may have other numbers of these arrays."""
    found: frozenset[str] = frozenset()
    for x in jax.tree.leaves(tree) if hasattr(jax, "typeof") else ():
        kind = jax.typeof(x)
        kind = getattr(kind, "manual_axis_type", kind)  # newer than 0.8; `vma` before
        found |= getattr(kind, "varying", getattr(kind, "vma", found))
    return found


def vary(tree: Any, like: Any) -> Any:
    """The arrays as some that may differ along the axes along which these do, or along those of these names."""
    axes = like if isinstance(like, frozenset) else varying(like)

    def one(x: Array) -> Array:
        more = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, more, to="varying") if more else x

    return jax.tree.map(one, tree) if axes else tree


def whole(x: Array, axis: int, where: Any = None) -> Array:
    """The array with all of an axis on each device; where "explicit", only if the mesh has such axes."""
    sharding, axis = sharding_of(x), axis % x.ndim
    if sharding is None or x.shape[axis] == 1:
        return x
    if not _all_auto(sharding):
        return x if sharding.spec[axis] is None else _resharded(x, axis, None)
    if where == "explicit":
        return x
    spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def gathered(block: Block, by_column: bool) -> Block:
    """The block with all rows on each device; all columns too where they are cut at any place, or axes are explicit."""
    where = None if by_column else "explicit"
    rows = tree_map(lambda x: whole(x, -2), block.rows)
    columns = tree_map(lambda x: whole(x, -2, where), block.columns)
    pairs = tree_map(lambda x: whole(whole(x, -2), -1, where), block.pairs)
    shown = None if block.shown is None else whole(block.shown, -2, where)
    return block._replace(rows=rows, columns=columns, pairs=pairs, shown=shown)


def placed_as(x: Array | None, other: Array | None) -> Array | None:
    """The array with rows where those of the other are, which has as many."""
    if x is None or other is None:
        return x
    sharding = sharding_of(other)
    if sharding is None:
        return x
    if _all_auto(sharding):  # where they are XLA alone knows
        # A choice between both, of which XLA does not know that it is none, lies where they do; it costs a pass.
        x, first = jax.lax.optimization_barrier((x, True))
        return jax.lax.select(jnp.broadcast_to(first, x.shape), x, other) if x.shape == other.shape else x
    return _resharded(x, x.ndim - 2, sharding.spec[-2])


def _resharded(x: Array, axis: int, names: Any) -> Array:
    sharding = sharding_of(x)
    spec = (*sharding.spec[:axis], names, *sharding.spec[axis + 1 :])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
