"""Dask: attention by chunks, lazily, against the formula in float64; and what the graph is made of."""

import importlib
import sys
import time
from functools import cache, partial

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from dask.callbacks import Callback

import anyattention as aa
from anyattention import biases, masks
from anyattention.partials import merge
from anyattention_conformance import truth

BATCH, LENGTH, HEADS, DEPTH = SHAPE = (2, 192, 4, 16)
CHUNKINGS = {  # of query, of key and value
    "lengths": ((2, 96, 4, 16), (2, 64, 4, 16)),
    "batch and heads": ((1, 192, 2, 16), (1, 96, 4, 16)),
    "unequal": ((2, (50, 0, 142), 4, 16), ((1, 1), (0, 100, 1, 91), (3, 1), 16)),
    "depth": ((2, 96, 4, 8), (2, 192, 4, (3, 13))),
    "one chunk of queries": (SHAPE, (2, 16, 4, 16)),
}


def draw(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


QUERY, KEY, VALUE, COTANGENT = (draw(seed, SHAPE) for seed in range(4))
IDS = np.sort(np.random.default_rng(5).integers(0, 5, (BATCH, LENGTH)))
DENSE = np.random.default_rng(6).random((BATCH, 1, LENGTH, LENGTH)) > 0.5
DENSE[0, 0, 70] = False  # fully masked
ALIBI, TABLE = draw(7, (HEADS,)), draw(8, (8, HEADS))
DROPOUT = {"dropout_rng": aa.random.key(3), "dropout_rate": 0.25}
KINDS = {
    "none": {},
    "causal": {"is_causal": True},
    "causal, rows that see nothing": {"mask": masks.CausalMask(-100)},
    "window": {"mask": masks.LocalMask(30, 5)},
    "lengths": {"mask": masks.LengthMask(np.array([120, 0]))},
    "segments": {"mask": masks.SegmentMask(IDS, IDS), "is_causal": True},
    "offsets": {"mask": masks.CausalMask(np.array([-60, 20]))},
    "not a window": {"mask": ~masks.LocalMask(30, 5)},
    "function": {"mask": masks.Rule(lambda i, j, x: (i + j) % 3 != x, key_arrays=(IDS,))},
    "dense mask": {"mask": DENSE},
    "causal and a dense mask": {"mask": masks.CausalMask() & DENSE},
    "bias": {"bias": draw(9, (1, HEADS, LENGTH, LENGTH))},
    "bias of each key": {"bias": draw(10, (BATCH, 1, 1, LENGTH)), "is_causal": True},
    "slopes": {"bias": biases.Alibi(ALIBI), "is_causal": True},
    "table": {"bias": biases.Relative(TABLE, max_distance=20)},
    "scale and soft cap": {"scale": 0.4, "logits_soft_cap": 1.5, "is_causal": True},
    "large logits": {"scale": 20.0},
    "sinks": {"sinks": draw(11, (HEADS,)), "is_causal": True},
    "dropout": {**DROPOUT, "is_causal": True},
    "dropout of each head": {**DROPOUT, "broadcast_dropout": False, "mask": masks.LengthMask(np.array([120, 0]))},
}


def put(x, chunks):
    return da.from_array(x, chunks=chunks)


def arrays(chunking="lengths"):
    one, two = CHUNKINGS[chunking]
    return put(QUERY, one), put(KEY, two), put(VALUE, two)


def by_rule(found):
    """How each number of a bias by rule is made of its array: what is multiplied by ``array[n]``, of each head."""
    if isinstance(found, biases.Alibi):
        return biases.Alibi(np.ones(HEADS)).to_array(LENGTH, LENGTH)[None]
    ones = (np.repeat(np.arange(len(TABLE)) == n, HEADS).reshape(TABLE.shape) for n in range(len(TABLE)))
    return np.stack([biases.Relative(x * 1.0, max_distance=20).to_array(LENGTH, LENGTH) for x in ones])


@cache
def expected(kind, dtype="float32"):
    """Output and gradients of query, key, value, then of the bias or the sinks, in float64."""
    options = dict(KINDS[kind])
    mask, bias = options.get("mask"), options.get("bias")
    options["mask"] = None if mask is None else mask.to_array(LENGTH, LENGTH) if isinstance(mask, masks.Mask) else mask
    if options.pop("is_causal", False):
        causal = np.tri(LENGTH, dtype=bool)
        options["mask"] = causal if options["mask"] is None else options["mask"] & causal
    if isinstance(bias, biases.Bias):
        options["bias"] = bias.to_array(LENGTH, LENGTH)[None]
    given = (x.astype(dtype).astype(np.float32) for x in (QUERY, KEY, VALUE))
    named = dict(zip(("query", "key", "value"), given, strict=True)) | options
    found, _ = truth({name: x for name, x in named.items() if x is not None}, dtype, COTANGENT)
    gradients = [
        found.gradients[name] for name in ("query", "key", "value", "bias", "sinks") if name in found.gradients
    ]
    if isinstance(bias, biases.Bias):
        gradients[3] = (by_rule(bias) * gradients[3]).sum(axis=(-2, -1)).reshape(bias.arrays()[0].shape)
    return [found.output, *gradients]


def flat(gradients):
    return [x for y in gradients if y is not None for x in (y if isinstance(y, tuple) else (y,))]


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(kind, chunking):
    query, key, value = arrays(chunking)
    output, pullback = aa.dot_product_attention_vjp(query, key, value, **KINDS[kind])
    gradients = flat(pullback(put(COTANGENT, (1, 100, 4, 16))))
    assert [x.chunks for x in gradients[:3]] == [query.chunks, key.chunks, value.chunks]
    assert output.chunks == (*query.chunks[:3], (DEPTH,))
    found = dask.compute(output, *gradients, scheduler="sync")
    for x, y in zip(found, expected(kind), strict=True):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(np.abs(y).max(), 1.0))


@pytest.mark.parametrize("kind", ["none", "lengths", "dropout"])
def test_none_takes_tiled_on_threads(kind):
    found = aa.dot_product_attention(*arrays(), **KINDS[kind])
    assert found.name == aa.dot_product_attention(*arrays(), **KINDS[kind], implementation="tiled").name
    np.testing.assert_allclose(found.compute(scheduler="threads", num_workers=2), expected(kind)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype):
    given = [x.astype(getattr(ml_dtypes, dtype, dtype)) for x in arrays()]
    output, pullback = aa.dot_product_attention_vjp(*given, is_causal=True)
    gradients = flat(pullback(da.from_array(COTANGENT)))
    for x, y in zip(dask.compute(output, *gradients, scheduler="sync"), expected("causal", dtype), strict=True):
        assert x.dtype.name == dtype
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=0, atol=3e-2 * np.abs(y).max())
    with pytest.raises(TypeError, match=f"exact has no {dtype} on Dask: pass implementation='tiled'"):
        aa.dot_product_attention(*given, implementation="exact")


def test_grouped_heads():
    """Keys and values have a head for each of two groups; a chunk of query heads is a whole number of groups."""
    given = put(QUERY, (1, 96, 2, 16)), put(KEY[:, :, :2], (2, 64, 1, 16)), put(VALUE[:, :, :2], (2, 64, 2, 16))
    output, pullback = aa.dot_product_attention_vjp(*given, is_causal=True)
    assert output.chunks == given[0].chunks
    gradients = pullback(put(COTANGENT, SHAPE))[:3]
    assert [x.chunks for x in gradients] == [x.chunks for x in given]
    causal = {"mask": np.tri(LENGTH, dtype=bool), "query": QUERY, "key": KEY[:, :, :2], "value": VALUE[:, :, :2]}
    found, _ = truth(causal, "float32", COTANGENT)
    for x, y in zip(dask.compute(output, *gradients), (found.output, *found.gradients.values()), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())


def _rows():
    """Random, but for a fully masked row, and one that sees no more than the last keys."""
    mask = np.random.default_rng(7).random((512, 1280)) > 0.5
    mask[70], mask[71, :1270] = False, False
    return mask


LARGE = {
    "dense": _rows(),
    "segments": masks.SegmentMask(np.arange(512)[None] // 200, np.arange(1280)[None] // 500 + 1),
    "lengths": masks.LengthMask(np.array([700])),
    "window": masks.LocalMask(100, 200, offset=300),
}


@pytest.mark.parametrize("size", [1.0, 6.0], ids=["small logits", "large logits"])
@pytest.mark.parametrize("mask", LARGE)
def test_chunks_of_several_tiles(mask, size):
    """There tiles take shortcuts, which have to be right for rows that see no key of a chunk."""
    mask = LARGE[mask]
    query, key, value, doutput = (draw(seed, (1, 512 if seed % 3 == 0 else 1280, 2, 8)) for seed in range(4))
    given = {"query": query * size, "key": key, "value": value}
    chunked = [put(x, (1, 512 if n == 0 else 640, 2, 8)) for n, x in enumerate(given.values())]
    output, pullback = aa.dot_product_attention_vjp(*chunked, mask=mask)
    found = dask.compute(output, *pullback(da.from_array(doutput))[:3], scheduler="sync")
    given["mask"] = mask.to_array(512, 1280) if isinstance(mask, masks.Mask) else mask
    exact, _ = truth(given, "float32", doutput)
    for x, y in zip(found, (exact.output, *exact.gradients.values()), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())


def test_one_array_for_all():
    """Their chunks have the same names, and gradients of their own."""
    x = put(QUERY, (2, 64, 4, 16))
    gradients = aa.dot_product_attention_vjp(x, x, x, is_causal=True)[1](x)[:3]
    same = {"query": QUERY, "key": QUERY, "value": QUERY, "mask": np.tri(LENGTH, dtype=bool)}
    found, _ = truth(same, "float32", QUERY)
    for x, y in zip(dask.compute(*gradients), found.gradients.values(), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())


def test_guests_that_are_chunked():
    """Ids, masks and biases of Dask, in other chunks than the query's and the key's."""
    ids, bias = put(IDS, (1, 70)), put(KINDS["bias"]["bias"], (1, 3, 50, 192))
    found = aa.dot_product_attention(
        *arrays(), mask=masks.SegmentMask(ids, ids) & put(DENSE, (2, 1, 192, 31)), bias=bias
    )
    mask = masks.SegmentMask(IDS, IDS) & DENSE
    named = {"query": QUERY, "key": KEY, "value": VALUE, "mask": mask.to_array(LENGTH, LENGTH)}
    exact, _ = truth(named | {"bias": KINDS["bias"]["bias"]}, "float32")
    np.testing.assert_allclose(found.compute(scheduler="sync"), exact.output, atol=1e-5)


# --- what the graph is made of ---


def tasks(array, name=""):
    return [
        key for key in dict(array.__dask_graph__()) if str(key if isinstance(key, str) else key[0]).startswith(name)
    ]


def lengths(count, size=16):
    return da.zeros((1, count * size, 2, 4), chunks=(1, size, 2, 4), dtype=np.float32)


def test_a_task_for_each_visible_pair():
    causal = aa.dot_product_attention(*[lengths(16)] * 3, is_causal=True)
    assert len(tasks(causal, "attend-")) == 136
    assert len(tasks(causal)) <= 136 + 16 * 12
    window = aa.dot_product_attention(*[lengths(16)] * 3, mask=masks.LocalMask(16, 0))
    assert len(tasks(window, "attend-")) == 31
    for count in (4, 8):
        assert len(tasks(aa.dot_product_attention(*[lengths(count)] * 3))) <= count**2 + 11 * count
    x = lengths(16)
    _, pullback = aa.dot_product_attention_vjp(x, x, x, is_causal=True)
    assert len(tasks(pullback(x)[1], "pull-")) == 136 + 15  # chunks of queries that some values are hidden from


def test_what_is_seen_for_certain_has_no_mask():
    """Positions are needed along the diagonal alone."""
    x = lengths(4)
    graph = dict(aa.dot_product_attention(x, x, x, is_causal=True).__dask_graph__())
    pairs = {key[1:]: {need[0] for need in task[1:]} for key, task in graph.items() if key[0].startswith("attend-")}
    positions = {name for name in pairs[0, 0, 3, 3] - pairs[0, 0, 3, 0] if not name.startswith("attend-")}
    assert len(positions) == 2
    assert {at for at, needs in pairs.items() if needs & positions} == {(0, 0, i, i) for i in range(4)}


def test_dropout_skips_what_is_hidden():
    """But where a bias may hide what the mask shows: then the hidden keys count."""
    given = [lengths(16)] * 3
    found = aa.dot_product_attention(*given, is_causal=True, **DROPOUT)
    assert len(tasks(found, "attend-")) == 136
    bias = da.zeros((1, 1, 1, 256), dtype=np.float32)
    for options in ({"is_causal": True, "bias": bias}, {"mask": masks.CausalMask(-1)}):
        found = aa.dot_product_attention(*given, **options, **DROPOUT)
        assert len(tasks(found, "attend-")) > 136


def test_a_rule_that_shows_all_but_one_pair():
    """Two chunks meet along their diagonal, where the rule is needed for one key of one query."""
    given = {name: draw(seed, (64, 2, 8)) for seed, name in enumerate(("query", "key", "value"))}
    for offset in (-2, -1, 0):
        mask = masks.CausalMask(offset)
        found = aa.dot_product_attention(*(put(x, (16, 2, 8)) for x in given.values()), mask=mask)
        exact, _ = truth(given | {"mask": mask.to_array(64, 64)}, "float32")
        np.testing.assert_allclose(found.compute(scheduler="sync"), exact.output, atol=1e-5)


def test_dropout_refuses_logits_as_low_as_hidden_ones():
    """Where hidden keys have weight, their keep bits are wanted, which no closed form has."""
    query, key = (da.full((32, 2, 16), x, chunks=(16, 2, 16), dtype=np.float16) for x in (-127.5, 127.5))
    found = aa.dot_product_attention(query, key, key, is_causal=True, **DROPOUT)  # logits -65025; hidden ones -65504
    with pytest.raises(ValueError, match="Pass the mask as an array"):
        found.compute(scheduler="sync")


def test_nothing_larger_than_a_chunk():
    """Dropout of each head too: its bits are drawn in the task that needs them."""
    x = da.ones((2, 256, 4, 8), chunks=(1, 32, 2, 8), dtype=np.float32)
    largest = 0

    def seen(key, result, *_):
        nonlocal largest
        if str(key).startswith("finalize"):
            return  # the whole, which the caller asked for
        parts = result if isinstance(result, tuple | list) else (result,)
        largest = max(largest, sum(getattr(part, "nbytes", 0) for part in parts))

    options = {**DROPOUT, "broadcast_dropout": False, "mask": masks.LengthMask(np.array([200, 7]))}
    output, pullback = aa.dot_product_attention_vjp(x, x, x, **options)
    with Callback(posttask=seen):
        dask.compute(output, *pullback(x)[:3], scheduler="sync")
    assert largest <= 4 * (32 * 2 * 8 * 4)  # three gradients of a pair, each of a chunk


def test_a_graph_takes_no_time():
    x = da.zeros((1, 65536, 2, 64), chunks=(1, 4096, 2, 64), dtype=np.float32)
    start = time.process_time()
    output, pullback = aa.dot_product_attention_vjp(x, x, x, is_causal=True)
    gradients = pullback(x)
    assert all(len(tasks(y)) < 3000 for y in (output, *gradients[:3]))
    assert time.process_time() - start < 1.0


def test_equal_calls_share_their_tasks():
    one, two = (aa.dot_product_attention(*arrays(), **KINDS["segments"]) for _ in range(2))
    assert one.name == two.name
    assert set(tasks(one)) == set(tasks(two))
    others = [aa.dot_product_attention(*arrays(), **KINDS["segments"], scale=scale) for scale in (0.3, 0.4)]
    assert len({one.name, *(x.name for x in others)}) == 3
    gradients = [aa.dot_product_attention_vjp(*arrays())[1](arrays()[0])[0] for _ in range(2)]
    assert gradients[0].name == gradients[1].name


class Every:
    """A function with a state of its own."""

    def __init__(self, n):
        self.n = n

    def __call__(self, i, j):
        return (i + j) % self.n * 1.0


@pytest.mark.parametrize("make", [lambda x: {"mask": masks.Rule(x)}, lambda x: {"bias": biases.Rule(x)}])
def test_names_of_functions(make, tmp_path, monkeypatch):
    """Those that differ in what they hold, or in their code alone, are never taken for each other."""

    def name(function):
        given = [put(x, (2, 96, 4, 16)) for x in (QUERY, KEY, VALUE)]
        return aa.dot_product_attention(*given, **make(function)).name

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rule_of_a_module", raising=False)
    module, names = tmp_path / "rule_of_a_module.py", []
    for n in (4, 56789):  # whose files differ in size, by which Python knows them apart
        module.write_text(f"def function(i, j):\n    return (i + j) % {n} * 1.0\n")
        names.append(name(importlib.reload(importlib.import_module("rule_of_a_module")).function))
    others = [Every(2), Every(3), partial(lambda n, i, j: (i + j) % n * 1.0, 2)]
    others += [lambda i, j, n=n: (i + j) % n * 1.0 for n in (2, 3)]
    others += [lambda i, j: (i + j) % 2 * 1.0, lambda i, j: (i + j) % 3 * 1.0]
    assert len({*names, *map(name, others)}) == 9
    assert [*map(name, others)] == [*map(name, others)]


def test_everything_is_lazy():
    def refuse(*args, **kwargs):
        raise AssertionError("computed")

    options = {**DROPOUT, "mask": put(DENSE, (2, 1, 96, 96)), "bias": put(KINDS["bias"]["bias"], (1, 4, 96, 96))}
    with dask.config.set(scheduler=refuse):
        output, pullback = aa.dot_product_attention_vjp(*arrays(), **options)
        gradients = pullback(output)
        aa.explain(*arrays(), **options)
    assert all(isinstance(x, da.Array) for x in (output, *gradients))
    assert gradients[3].chunks == options["bias"].chunks


@pytest.mark.slow
def test_other_processes():
    """Tasks can be pickled, and need nothing but to be imported."""
    output, pullback = aa.dot_product_attention_vjp(*arrays(), **KINDS["segments"])
    wanted = output, *pullback(put(COTANGENT, SHAPE))[:3]
    here = dask.compute(*wanted, scheduler="sync")
    there = dask.compute(*wanted, scheduler="processes", num_workers=2)
    assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))


# --- the rest ---


def test_explain():
    x = lengths(16)
    found = aa.explain(x, x, x, is_causal=True)
    assert found.implementation == "tiled"
    assert found.reasons[-1] == "chunks of queries and keys: 16 x 16, 136 pairs visible; largest task 16 x 16"
    found = aa.explain(*arrays("batch and heads"))
    assert "1 x 2, 2 pairs visible for each of 4 chunks of batch and heads; largest task 192 x 96" in str(found)


def unknown(x):
    return x[:, da.from_array(np.arange(x.shape[1])) % 2 == 0]


UNKNOWN = {  # of these arguments, the last named first
    "query": lambda q, k, v, dense: {"query": unknown(q)},
    "key": lambda q, k, v, dense: {"key": unknown(k)},
    "key, value": lambda q, k, v, dense: {"value": unknown(v), "key": unknown(k)},
    "value": lambda q, k, v, dense: {"value": unknown(v)},
    "mask": lambda q, k, v, dense: {"mask": unknown(dense)},
    "mask by rule": lambda q, k, v, dense: {"mask": masks.SegmentMask(unknown(dense)[:, :, 0], dense[:, :, 0])},
    "mask by rule and array": lambda q, k, v, dense: {"mask": masks.CausalMask() & unknown(dense)},
    "bias": lambda q, k, v, dense: {"bias": unknown(dense)},
    "bias by rule": lambda q, k, v, dense: {"bias": biases.Alibi(unknown(dense[0, :1, :4])[0])},
    "sinks": lambda q, k, v, dense: {"sinks": unknown(dense[:, :4])},
}


@pytest.mark.parametrize("function", [aa.dot_product_attention, aa.dot_product_attention_vjp, aa.explain])
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_chunks(name, function):
    """At once, with what to do, whatever the others are."""
    query, key, value = arrays()
    dense = put(np.ones((1, LENGTH, LENGTH), np.float32), -1)
    given = {"query": query, "key": key, "value": value} | UNKNOWN[name](query, key, value, dense)
    name = name.split()[0].strip(",")
    with pytest.raises(ValueError, match=rf"^{name} has chunks of unknown size: call compute_chunk_sizes\(\) first$"):
        function(**given)


def test_exact_takes_unknown_chunks():
    query, key, value = arrays()
    found = aa.dot_product_attention(unknown(query), key, value, implementation="exact")
    even, _ = truth({"query": QUERY[:, ::2], "key": KEY, "value": VALUE}, "float32")
    np.testing.assert_allclose(found.compute(scheduler="sync"), even.output, atol=1e-5)


def test_what_is_no_array():
    query, _, value = arrays()
    with pytest.raises(TypeError, match=r"^key: dask.delayed.\w+ is no dask.array.Array: convert it first"):
        aa.dot_product_attention(query, dask.delayed(KEY), value)


def test_hidden_padding_does_not_show():
    key, value = KEY.copy(), VALUE.copy()
    key[:, 100:], value[:, 100:] = np.nan, np.inf
    given = put(QUERY, (2, 96, 4, 16)), put(key, (2, 64, 4, 16)), put(value, (2, 64, 4, 16))
    output, pullback = aa.dot_product_attention_vjp(*given, mask=masks.LengthMask(np.array([100, 90])))
    mask = masks.LengthMask(np.array([100, 90])).to_array(LENGTH, LENGTH)
    found, _ = truth({"query": QUERY, "key": KEY, "value": VALUE, "mask": mask}, "float32", COTANGENT)
    gradients = pullback(put(COTANGENT, SHAPE))[:3]
    for x, y in zip(dask.compute(output, *gradients), (found.output, *found.gradients.values()), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())


def test_rows_without_a_finite_logit():
    bias = np.zeros((1, 1, LENGTH, LENGTH), np.float32)
    bias[..., 7, :], bias[..., 8, :100] = -np.inf, -np.inf
    found = aa.dot_product_attention(*arrays(), bias=bias).compute(scheduler="sync")
    assert np.isnan(found[:, 7]).all()
    assert not np.isnan(found[:, [6, 8]]).any()


@pytest.mark.parametrize("axis", [1, 0])
def test_empty_arrays(axis):
    """No keys, or no batch entries."""
    query, key, value = arrays()
    query = query if axis else query[:0]
    index = (slice(None),) * axis + (slice(0),)
    output, pullback = aa.dot_product_attention_vjp(query, key[index], value[index])
    assert not output.compute().any()
    assert [x.compute().shape for x in pullback(output)[:3]] == [query.shape, key[index].shape, value[index].shape]


def test_partials():
    """Some of the keys in chunks, the others too."""
    query, key, value = arrays()
    whole = {"whole": (LENGTH, LENGTH), **DROPOUT, "is_causal": True}
    pages = [
        aa.dot_product_attention_partial(query, key[:, i:j], value[:, i:j], origin=(0, i), **whole)
        for i, j in ((0, 50), (50, 192))
    ]
    np.testing.assert_allclose(merge(*pages).output.compute(scheduler="sync"), expected("dropout")[0], atol=1e-5)
    first = pages[0].max_logit.compute(scheduler="sync")
    logits = np.einsum("bqhd,bkhd->bhqk", QUERY, KEY[:, :50]) / 4.0
    largest = np.where(np.tri(LENGTH, dtype=bool)[:, :50], logits, -np.inf).max(axis=-1)
    np.testing.assert_allclose(first, largest, atol=1e-5)


def test_bits_do_not_depend_on_the_scheduler():
    found = aa.dot_product_attention(*arrays("one chunk of queries"), is_causal=True)
    one, two = [found.compute(scheduler=name) for name in ("sync", "threads")]
    assert np.array_equal(one, two)
