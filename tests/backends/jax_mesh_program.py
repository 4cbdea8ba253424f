"""Calls on a mesh of four devices, against float64 on one: prints for each what went wrong, as JSON.

A program of its own, since JAX has to be told of its devices before it is imported.
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from anyattention import biases, config, dot_product_attention, dot_product_attention_vjp, explain, masks, random

BATCH, LENGTH, HEADS, DEPTH = 2, 128, 4, 16
draw = np.random.default_rng(0)


def normal(*shape):
    return draw.standard_normal(shape).astype(np.float32)


IDS = np.sort(draw.integers(0, 5, (BATCH, LENGTH)), axis=-1)
ODD = np.where(np.arange(LENGTH) < 9, 77, IDS)  # ids that no key has
DENSE = draw.random((BATCH, 1, LENGTH, LENGTH)) < 0.5
DENSE[:, :, 17] = False  # a row that sees nothing
DROPOUT = {"dropout_rng": random.key(7), "dropout_rate": 0.25}
PER_HEAD = {**DROPOUT, "broadcast_dropout": False}


def near(rows, columns):
    return abs(rows - columns) % 3 != 1


#: Arguments beside query, key and value; those that are arrays of floats have a gradient.
CALLS = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"mask": masks.LocalMask(20, 9)},
    "window to the left": {"mask": masks.LocalMask(20, 0)},
    "rows without keys": {"mask": masks.CausalMask(-40)},
    "lengths": {"mask": masks.LengthMask(np.array([77, 0]))},
    "lengths of both": {"mask": masks.LengthMask(np.array([77, 30]), np.array([LENGTH, 5]))},
    "segments": {"mask": masks.SegmentMask(IDS, IDS)},
    "segments, causal": {"mask": masks.SegmentMask(ODD, IDS), "is_causal": True},
    "either": {"mask": masks.CausalMask() | masks.SegmentMask(IDS, IDS)},
    "not": {"mask": ~masks.LocalMask(3, 3)},
    "rule": {"mask": masks.Rule(near)},
    "dense mask": {"mask": DENSE},
    "row of a mask": {"mask": DENSE[:, :, :1], "is_causal": True},
    "bias": {"bias": normal(1, HEADS, LENGTH, LENGTH)},
    "bias, causal": {"bias": normal(BATCH, HEADS, LENGTH, LENGTH), "is_causal": True},
    "row of a bias": {"bias": normal(BATCH, 1, 1, LENGTH)},
    "row of a bias, causal": {"bias": normal(BATCH, HEADS, 1, LENGTH), "is_causal": True},
    "column of a bias": {"bias": normal(1, HEADS, LENGTH, 1), "mask": masks.LocalMask(9, 9)},
    "number as a bias": {"bias": normal(1, HEADS, 1, 1), "is_causal": True},
    "slopes": {"bias": biases.Alibi(normal(HEADS)), "is_causal": True},
    "table": {"bias": biases.Relative(normal(32, HEADS))},
    "grouped heads": {"kv_heads": 2, "is_causal": True, "bias": normal(1, HEADS, LENGTH, LENGTH)},
    "scale and cap": {"scale": 0.7, "logits_soft_cap": 2.0, "is_causal": True},
    "sinks": {"sinks": normal(HEADS), "is_causal": True},
    "sinks of rows": {"sinks": normal(BATCH, HEADS, LENGTH), "mask": masks.CausalMask(-40)},
    "dropout": DROPOUT,
    "dropout of each head": PER_HEAD,
    "dropout, causal": {**PER_HEAD, "is_causal": True},
    "dropout, rows without keys": {**DROPOUT, "mask": masks.CausalMask(-40)},
    "dropout, bias": {**PER_HEAD, "bias": normal(1, HEADS, LENGTH, LENGTH), "kv_heads": 2},
    "hidden NaN": {"mask": masks.LengthMask(np.array([100, 60])), "spoiled": True},
    "bfloat16": {"dtype": "bfloat16", "is_causal": True},
    "float16": {"dtype": "float16", "mask": masks.SegmentMask(IDS, IDS)},
    "more keys": {"kv_length": 320, "q_length": 64, "mask": masks.LengthMask(np.array([300, 11]))},
    "one query": {"q_length": 1, "mask": masks.LengthMask(np.array([77, 3]))},
    "three queries": {"q_length": 3, "mask": masks.CausalMask(90), "sinks": normal(HEADS), **PER_HEAD},
}


def arguments(name):
    """Query, key and value, and the rest of a call."""
    given = dict(CALLS[name])
    kv_length, q_length = given.pop("kv_length", LENGTH), given.pop("q_length", LENGTH)
    shapes = [
        (BATCH, n, given.get("kv_heads", HEADS) if i else HEADS, DEPTH)
        for i, n in enumerate((q_length, *[kv_length] * 2))
    ]
    given.pop("kv_heads", None)
    arrays = [np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)]
    if given.pop("spoiled", False):
        for x in arrays[1:]:
            x[0, 100:], x[1, 60:] = np.nan, np.nan
    return arrays, given


def split(given):
    """What has a gradient, by name, and what makes a call of it."""
    found = {}
    for name, x in given.items():
        if name in ("bias", "sinks"):
            found[name] = x.arrays()[0] if isinstance(x, biases.Bias) else x

    def whole(floats):
        rest = dict(given)
        for name, x in floats.items():
            rest[name] = given[name].with_arrays(lambda _, x=x: x) if isinstance(given[name], biases.Bias) else x
        return rest

    return found, whole


def truth(name):
    """Output and gradients in float64, by NumPy."""
    arrays, given = arguments(name)
    dtype = given.pop("dtype", None)
    floats, whole = split(given)
    if dtype:
        arrays = [np.asarray(x, dtype) for x in arrays]
    wide = [np.asarray(x, np.float64) for x in arrays]
    given = whole({key: x.astype(np.float64) for key, x in floats.items()})
    output, pullback = dot_product_attention_vjp(*wide, **given)
    cotangent = np.random.default_rng(9).standard_normal(output.shape)
    dquery, dkey, dvalue, dbias, *dsinks = pullback(cotangent)
    dbias = dbias[0] if isinstance(dbias, tuple) else dbias
    more = {"bias": dbias, "sinks": dsinks[0] if dsinks else None}
    return arrays, cotangent, [output, dquery, dkey, dvalue, *(more[key] for key in floats)]


def compare(found, expected, dtype):
    """What is wrong with output and gradients, in words."""
    bound, said = {"bfloat16": 3e-2, "float16": 4e-3}.get(dtype, 2e-5), []
    for n, (x, y) in enumerate(zip(found, expected, strict=True)):
        x = np.asarray(x, np.float64)
        if x.shape != y.shape:
            said.append(f"{n}: shape {x.shape} instead of {y.shape}")
            continue
        # A bias that is the same for all keys has a gradient of zero, the sum of terms that are not.
        error, size = np.max(abs(x - y)), max(np.max(abs(y)), 1.0)
        if not error <= bound * size:
            said.append(f"{n}: error {error:.2g} of {size:.2g}")
    return said


def function(name, **more):
    """The output, and the loss whose gradients are compared, of a call by its arrays."""
    _, given = arguments(name)
    dtype = given.pop("dtype", None)
    floats, whole = split(given)

    def attend(query, key, value, *others):
        return dot_product_attention(query, key, value, **whole(dict(zip(floats, others, strict=True))), **more)

    def loss(cotangent, *arrays):
        output = attend(*arrays)
        return jnp.sum(output.astype(jnp.float32) * cotangent), output

    return attend, jax.value_and_grad(loss, tuple(range(1, 4 + len(floats))), has_aux=True), [*floats.values()], dtype


def run(name, mesh, spec, sequence_axis="seq", exchange=None):
    """What is wrong with a call of whole arrays on a mesh, and which exchange it was."""
    arrays, cotangent, expected = truth(name)
    _, graded, floats, dtype = function(name, **({"sequence_axis": sequence_axis} if sequence_axis else {}))
    _, given = arguments(name)
    given.pop("dtype", None)

    def place(x):
        sizes = [1 if axis is None else mesh.shape[axis] for axis in spec]
        fits = all(n % size == 0 for n, size in zip(x.shape, sizes, strict=False))
        return jax.device_put(x, NamedSharding(mesh, spec if fits and x.ndim == 4 else P()))

    with jax.set_mesh(mesh), config(exchange=exchange):
        placed = [place(x) for x in arrays]
        plan = explain(*placed, **given, **({"sequence_axis": sequence_axis} if sequence_axis else {}))
        (_, output), gradients = jax.jit(graded)(place(cotangent), *placed, *map(jnp.asarray, floats))
    return {
        "exchange": plan.reasons[-1].partition(" over")[0],
        "wrong": compare([output, *gradients], expected, dtype),
        "spec": [str(x.sharding.spec) for x in (output, *gradients[:3])],
    }


def inside(name, mesh, spec, exchange=None):
    """What is wrong with a call of each device's parts, inside of `jax.shard_map`."""
    arrays, cotangent, expected = truth(name)
    _, given = arguments(name)
    floats, whole = split(given)
    sequence, batch = spec[1], spec[0]
    of_mask, mask = [], given.get("mask")
    if isinstance(mask, masks.SegmentMask):
        of_mask = [mask.query_ids, mask.kv_ids]

    def local(query, key, value, ids, *others):
        more = whole(dict(zip(floats, others, strict=True)))
        more |= {"mask": masks.SegmentMask(*ids)} if ids else {}
        return dot_product_attention(query, key, value, **more, sequence_axis="seq")

    def of_float(key, x):
        rows = sequence if key == "bias" and isinstance(given["bias"], np.ndarray) and x.shape[-2] != 1 else None
        return P(*(None,) * (x.ndim - 2), rows, None) if x.ndim > 1 else P(None)

    specs = [of_float(key, x) for key, x in floats.items()]
    mapped = jax.shard_map(
        local, in_specs=(spec, spec, spec, [P(batch, sequence)] * len(of_mask), *specs), out_specs=spec
    )

    def loss(cotangent, *arrays):
        output = mapped(*arrays[:3], list(map(jnp.asarray, of_mask)), *arrays[3:])
        return jnp.sum(output * cotangent), output

    graded = jax.value_and_grad(loss, tuple(range(1, 4 + len(floats))), has_aux=True)
    with jax.set_mesh(mesh), config(exchange=exchange):
        (_, output), gradients = jax.jit(graded)(
            cotangent.astype(np.float32), *map(jnp.asarray, (*arrays, *floats.values()))
        )
    return {"wrong": compare([output, *gradients], expected, None)}


def mesh_of(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def main(which):
    line, square = mesh_of((4,), ("seq",)), mesh_of((2, 2), ("data", "seq"))
    of_heads = mesh_of((2, 2), ("seq", "heads"))
    explicit = mesh_of((2, 2), ("data", "seq"), AxisType.Explicit)
    places = {
        "line": partial(run, mesh=line, spec=P(None, "seq")),
        "ring": partial(run, mesh=line, spec=P(None, "seq"), exchange="ring"),
        "gather": partial(run, mesh=line, spec=P(None, "seq"), exchange="gather"),
        "reduce": partial(run, mesh=line, spec=P(None, "seq"), exchange="reduce"),
        "batch": partial(run, mesh=square, spec=P("data", "seq"), exchange="ring"),
        "heads": partial(run, mesh=of_heads, spec=P(None, "seq", "heads"), exchange="ring"),
        "explicit": partial(run, mesh=explicit, spec=P("data", "seq"), sequence_axis=None, exchange="ring"),
        "inside": partial(inside, mesh=line, spec=P(None, "seq"), exchange="ring"),
        "inside, gather": partial(inside, mesh=line, spec=P(None, "seq"), exchange="gather"),
        "inside of both": partial(inside, mesh=square, spec=P("data", "seq"), exchange="ring"),
    }
    found = {}
    for place, name in which:
        try:
            found[f"{place}: {name}"] = places[place](name)
        except Exception as error:
            found[f"{place}: {name}"] = {"wrong": [f"{type(error).__name__}: {error}"[:600]]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
