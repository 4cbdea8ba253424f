"""Calls on a mesh of virtual devices, against float64 on one: prints what was found, as JSON.

A program of its own, since JAX has to be told of its devices before it is imported.
"""

import json
import re
import sys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
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
    "lengths of one": {"mask": masks.LengthMask(np.array([77]))},
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
    "bfloat16": {"dtype": "bfloat16", "bias": normal(1, HEADS, LENGTH, LENGTH), "is_causal": True},
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
    if "bias" in given and given.get("dtype") == "bfloat16":
        given["bias"] = given["bias"].astype(ml_dtypes.bfloat16)
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


def compare(found, expected, kind):
    """What is wrong with output and gradients of a dtype or a call, in words."""
    # The gradient of a slope is a sum of terms of either sign, each times a distance of up to 127.
    bound, said = {"bfloat16": 3e-2, "float16": 4e-3, "slopes": 1e-4}.get(kind, 2e-5), []
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
        "wrong": compare([output, *gradients], expected, dtype or name),
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
    return {"wrong": compare([output, *gradients], expected, name)}


def mesh_of(shape, names, kind=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def cases(which):
    """What is wrong with calls in several placements."""
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
    return found


COLLECTIVE = re.compile(r"= [^=]*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def compiled(asked):
    """Collectives and MiB of a device, temporary and of results, of programs by length, devices and call."""
    found = []
    for length, devices, name, exchange in asked:
        mesh, (_, given) = mesh_of((devices,), ("seq",)), arguments(name)
        shape = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "seq")))

        def attend(*x, given=given):
            return dot_product_attention(*x, **given, sequence_axis="seq")

        one = {}
        with jax.set_mesh(mesh), config(exchange=exchange):
            gradient = jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2))
            for kind, function in (("forward", attend), ("gradient", gradient)):
                program = jax.jit(function).lower(*[shape] * 3).compile()
                memory = program.memory_analysis()
                one[kind] = {
                    "collectives": dict(Counter(COLLECTIVE.findall(program.as_text()))),
                    "temporary": memory.temp_size_in_bytes / 2**20,
                    "results": memory.output_size_in_bytes / 2**20,
                }
        found.append(one)
    return found


def travelling(dtype):
    """The types of what the devices of a ring send, as JAX hands it to XLA."""
    mesh = mesh_of((4,), ("seq",))
    shape = jax.ShapeDtypeStruct((2, 64, 4, 16), dtype)
    with jax.set_mesh(mesh), config(exchange="ring"):
        text = jax.jit(partial(dot_product_attention, sequence_axis="seq")).lower(*[shape] * 3).as_text()
    return re.findall(r"collective_permute.*?-> tensor<([^>]*)>", text)


def modes(_):
    """Of ring and gather: what forward mode, second derivatives and `jax.vmap` give, as errors or messages."""
    mesh, found = mesh_of((4,), ("seq",)), {}
    x = [jnp.asarray(np.random.default_rng(n).standard_normal((2, 16, 2, 8)), jnp.float32) for n in range(4)]

    def exact(*x):
        return dot_product_attention(*x, is_causal=True, implementation="exact")

    def spread(*x):
        return dot_product_attention(*x, is_causal=True, sequence_axis="seq")

    def forward_mode(f):
        return jax.jvp(lambda query: f(query, *x[1:3]), (x[0],), (x[3],))[1]

    def second(f):
        return jax.grad(lambda query: (jax.grad(lambda q: (f(q, *x[1:3]) ** 2).sum())(query) ** 2).sum())(x[0])

    def mapped(f):
        many = [jnp.stack([y, 2 * y]) for y in x[:3]]
        return jax.vmap(jax.grad(lambda *y: (f(*y) ** 2).sum()))(*many)

    def checkpointed(f):
        return jax.grad(lambda query: (jax.checkpoint(f)(query, *x[1:3]) ** 2).sum())(x[0])

    for exchange in ("ring", "gather", "reduce"):
        for function in (forward_mode, second, mapped, checkpointed):
            with jax.set_mesh(mesh), config(exchange=exchange):
                try:
                    result = jax.jit(partial(function, spread))()
                    said = str(float(abs(result - function(exact)).max() / abs(result).max()))
                except NotImplementedError as error:
                    said = str(error)
            found[f"{function.__name__}, {exchange}"] = said
    return found


def decode(_):
    """Steps of a decoder over keys that are sharded, in a compiled loop: the error, and its collectives."""
    mesh = mesh_of((4,), ("seq",))
    draw = np.random.default_rng(5)
    key, value = (jnp.asarray(draw.standard_normal((2, 64, 2, 16)), jnp.float32) for _ in range(2))
    queries = jnp.asarray(draw.standard_normal((5, 2, 1, 4, 16)), jnp.float32)

    def steps(queries, key, value, **where):
        def step(n, found):
            one = dot_product_attention(queries[n], key, value, mask=masks.LengthMask(40 + n), **where)
            return found.at[n].set(one)

        return jax.lax.fori_loop(0, len(queries), step, jnp.zeros_like(queries))

    place = NamedSharding(mesh, P(None, "seq"))
    with jax.set_mesh(mesh):
        spread = (
            jax.jit(partial(steps, sequence_axis="seq"))
            .lower(*(x := (queries, *(jax.device_put(y, place) for y in (key, value)))))
            .compile()
        )
    expected = steps(queries, key, value, implementation="exact")
    return {
        "error": float(abs(spread(*x) - expected).max()),
        "collectives": dict(Counter(COLLECTIVE.findall(spread.as_text()))),
    }


def bits(_):
    """Whether dropout on a mesh drops the weights that Flax drops, which values that are the identity show."""
    import flax.linen

    found, length = {}, 64
    draw = np.random.default_rng(6)
    query, key = (jnp.asarray(draw.standard_normal((2, length, 3, 16)), jnp.float32) for _ in range(2))
    value = jnp.broadcast_to(jnp.eye(length)[:, None], (2, length, 3, length))
    places = {
        "line": (mesh_of((4,), ("seq",)), P(None, "seq")),
        "square": (mesh_of((2, 2), ("data", "seq")), P("data", "seq")),
    }
    for broadcast, causal in ((True, False), (False, False), (False, True)):
        more = {"broadcast_dropout": broadcast, "dropout_rng": jax.random.key(3), "dropout_rate": 0.4}
        mask = jnp.tri(length) if causal else None
        expected = flax.linen.dot_product_attention(query, key, value, mask=mask, deterministic=False, **more)
        for place, (mesh, spec) in places.items():
            arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value)]
            for exchange in ("ring", "gather", "reduce"):
                with jax.set_mesh(mesh), config(exchange=exchange):
                    function = partial(dot_product_attention, is_causal=causal, sequence_axis="seq", **more)
                    same = ((jax.jit(function)(*arrays) == 0.0) == (expected == 0.0)).all()
                found[f"{place}, {exchange}, {'one' if broadcast else 'each head'}, {causal}"] = bool(same)
    return found


def error_of_flax(dtype):
    """The largest and the mean square error of output and gradients, over those of Flax, which is on one device."""
    import flax.linen

    arrays = [np.random.default_rng(n).standard_normal((1, 2048, 2, 64)).astype(dtype) for n in range(3)]
    cotangent = np.random.default_rng(9).standard_normal((1, 2048, 2, 64)).astype(np.float32)
    wide = [x.astype(np.float64) for x in arrays]
    output, pullback = dot_product_attention_vjp(*wide, is_causal=True)
    right = [output, *pullback(cotangent.astype(np.float64))[:3]]

    def found(function, mesh=None):
        def loss(*x):
            output = function(*x)
            return (output.astype(jnp.float32) * cotangent).sum(), output

        (_, output), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*map(jnp.asarray, arrays))
        errors = [np.asarray(x, np.float64) - y for x, y in zip((output, *gradients), right, strict=True)]
        return np.array([(abs(x).max(), np.sqrt((x**2).mean())) for x in errors])

    flax_error = found(lambda *x: flax.linen.dot_product_attention(*x, mask=jnp.tri(2048, dtype=bool)))
    ratios = {}
    for exchange in ("ring", "gather"):
        with jax.set_mesh(mesh_of((4,), ("seq",))), config(exchange=exchange):
            mine = found(partial(dot_product_attention, is_causal=True, sequence_axis="seq"))
        ratios[exchange] = float((mine / flax_error).max())
    return ratios


def refusals(_):
    """What calls that cannot be served say."""
    line, square = mesh_of((4,), ("seq",)), mesh_of((2, 2), ("data", "seq"))
    explicit = mesh_of((2, 2), ("data", "seq"), AxisType.Explicit)
    x, odd, few = (jnp.ones((2, n, 2, 4)) for n in (128, 126, 4))

    def parts(mesh, *arrays, **given):
        spec = P("data", "seq") if "data" in mesh.axis_names else P(None, "seq")
        function = partial(dot_product_attention, sequence_axis="seq", **given)
        with jax.set_mesh(mesh), config(exchange="ring"):
            jax.jit(jax.shard_map(function, in_specs=spec, out_specs=spec))(*arrays)

    def whole(mesh, *arrays, exchange=None, **given):
        with jax.set_mesh(mesh), config(exchange=exchange):
            dot_product_attention(*arrays, **{"sequence_axis": "seq", **given})

    per_head = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.5, "broadcast_dropout": False}
    calls = {
        "no mesh": lambda: dot_product_attention(x, x, x, sequence_axis="seq"),
        "no such axis": lambda: whole(line, x, x, x, sequence_axis="context"),
        "no name": lambda: whole(line, x, x, x, sequence_axis=3),
        "queries": lambda: whole(line, odd, odd, odd),
        "keys": lambda: whole(line, x, odd, odd),
        "columns": lambda: whole(line, x, x, x, bias=jnp.ones((2, 128, 32))),
        "columns of parts": lambda: parts(line, x, x, x, bias=jnp.ones((2, 32, 32))),
        "rows of parts": lambda: parts(line, x, x, x, mask=jnp.ones((128, 128))),
        "parts of one": lambda: parts(line, few, few, few),
        "exact": lambda: whole(line, x, x, x, implementation="exact"),
        "fused": lambda: whole(line, x, x, x, implementation="fused"),
        "dropout of parts": lambda: parts(square, x, x, x, **per_head),
        "another axis": lambda: whole(explicit, *[jax.device_put(x, NamedSharding(explicit, P(None, "data")))] * 3),
        "numpy": lambda: dot_product_attention(*[np.ones((2, 8, 1, 4))] * 3, sequence_axis="seq"),
        "unknown exchange": lambda: whole(line, x, x, x, exchange="all"),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except (ValueError, TypeError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main():
    """Calls the function of this name with arguments in JSON."""
    name, given = sys.argv[1:]
    sys.stdout.write(json.dumps(globals()[name](json.loads(given))))


if __name__ == "__main__":
    main()
