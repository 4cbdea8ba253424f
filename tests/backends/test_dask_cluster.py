"""Dask on a cluster: two worker processes of one thread and little memory each, as many machines would be."""

import os
import signal
import time
from pathlib import Path

import dask.array as da
import distributed
import ml_dtypes
import numpy as np
import pytest

import anyattention as aa
from anyattention import biases, masks
from anyattention_conformance import truth

BATCH, LENGTH, HEADS, DEPTH = SHAPE = (2, 192, 4, 16)
WAIT = 60  # seconds, after which something hangs
MEMORY = 2**28  # of a worker, of which it takes a third before its first task


def draw(seed, shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


QUERY, KEY, VALUE, COTANGENT = map(draw, range(4))
IDS = np.sort(np.random.default_rng(5).integers(0, 5, (BATCH, LENGTH)))
DROPOUT = {"dropout_rng": aa.random.key(3), "dropout_rate": 0.25, "broadcast_dropout": False}
KINDS = {
    "causal": {"is_causal": True},
    "segments": {"mask": masks.SegmentMask(IDS, IDS) & masks.CausalMask()},
    "dropout of each head": DROPOUT | {"is_causal": True},
    "function": {"mask": masks.Rule(lambda i, j, x: (i + j + x) % 3 != 1, key_arrays=(IDS,))},
    "bias and sinks": {
        "bias": draw(6, (1, HEADS, LENGTH, LENGTH)),
        "sinks": draw(7, (HEADS,)),
        "mask": masks.CausalMask(-20),  # the first 20 queries see nothing
    },
    "slopes, scale and soft cap": {"bias": biases.Alibi(draw(8, (HEADS,))), "scale": 0.4, "logits_soft_cap": 1.5},
    "bfloat16": {"is_causal": True},
}


ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cluster():
    """Its processes find what this one finds, and the benchmarks."""
    sizes = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": MEMORY}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        with distributed.LocalCluster(processes=True, dashboard_address=":0", **sizes) as found:
            yield found


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster, timeout=WAIT) as found:
        found.wait_for_workers(2, timeout=WAIT)
        yield found


def computed(client, *arrays):
    return [x.result(timeout=WAIT) for x in client.compute(arrays)]


def put(x, *chunks):
    return da.from_array(x, chunks=chunks)


def flat(gradients):
    return [x for y in gradients if y is not None for x in (y if isinstance(y, tuple) else (y,))]


def expected(kind, given):
    """Output and gradients in float64, of query, key and value, of the bias, of the sinks; each with its size.

    That of a gradient of slopes is what was added up to it: of 147456 terms, most of which cancel.
    """
    options = dict(KINDS[kind])
    if options.pop("is_causal", False):
        options["mask"] = masks.CausalMask()
    if (bias := options.get("bias")) is not None:
        options["bias"] = bias.to_array(LENGTH, LENGTH)[None] if isinstance(bias, biases.Bias) else bias
    if "mask" in options:
        options["mask"] = options["mask"].to_array(LENGTH, LENGTH)
    named = dict(zip(("query", "key", "value"), given, strict=True))
    found, sizes = truth(named | options, given[0].dtype.name, COTANGENT)
    gradients = {name: found.gradients.get(name) for name in ("query", "key", "value", "bias", "sinks")}
    every = [(x, max(np.abs(x).max(), 1.0)) for x in (found.output, *gradients.values()) if x is not None]
    if isinstance(bias, biases.Bias):
        distances = biases.Alibi(np.ones(HEADS)).to_array(LENGTH, LENGTH)[None]
        terms = (distances * x.gradients["bias"] for x in (found, sizes))
        every[4] = tuple(np.abs(x.sum(axis=(0, -2, -1))) if n else x.sum(axis=(0, -2, -1)) for n, x in enumerate(terms))
    return every


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(client, kind):
    """Tasks travel, with all that they name: rules and their functions, options, dtypes."""
    given = [x.astype(ml_dtypes.bfloat16) if kind == "bfloat16" else x for x in (QUERY, KEY, VALUE)]
    query, key, value = put(given[0], 1, 96, 4, 16), *(put(x, 2, 64, 2, 16) for x in given[1:])
    output, pullback = aa.dot_product_attention_vjp(query, key, value, **KINDS[kind])
    found = computed(client, output, *flat(pullback(put(COTANGENT, 2, 100, 4, 16))))
    tolerance = 3e-2 if kind == "bfloat16" else 2e-5
    for x, (y, size) in zip(found, expected(kind, given), strict=True):
        assert (np.abs(x.astype(np.float64) - y) <= tolerance * size).all()


def drawn(length, chunk):
    normal = da.random.default_rng(0).standard_normal
    return [normal((1, length, 2, 64), chunks=(1, chunk, 2, 64), dtype=np.float32) for _ in range(3)]


def waiting(client):
    """How many pairs the cluster has still to begin with."""

    def count(dask_scheduler):
        states = [x.state for x in dask_scheduler.tasks.values() if x.prefix.name == "attend"]
        return sum(state in ("waiting", "queued", "processing", "no-worker") for state in states)

    return client.run_on_scheduler(count)


def test_killed_worker(client):
    """What it had is computed again, to the bit."""
    arrays = drawn(2048, 128)
    output, pullback = aa.dot_product_attention_vjp(*arrays, is_causal=True)
    wanted = [output, *pullback(output)[:3]]
    undisturbed = computed(client, *wanted)
    processes, futures = client.run(os.getpid), client.compute(wanted)
    deadline = time.monotonic() + WAIT
    while not 0 < waiting(client) < 100:  # of 136
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(next(iter(processes.values())), signal.SIGKILL)
    found = [x.result(timeout=WAIT) for x in futures]
    assert all(np.array_equal(x, y) for x, y in zip(found, undisturbed, strict=True))
    client.wait_for_workers(2, timeout=WAIT)
    assert len({*processes.values()} & {*client.run(os.getpid).values()}) == 1


@pytest.mark.parametrize("kind", ["full", "dropout of each head"])
def test_memory(client, kind):
    """All logits are 512 MiB, of dropout 32: a chunk of queries and keys has a 64th of them."""
    from benchmarks.scale import dask_side

    client.run(dask_side.forget)
    before = dask_side.events(client)
    length = 8192 if kind == "full" else 2048
    output, pullback = aa.dot_product_attention_vjp(*drawn(length, length // 8), **KINDS.get(kind, {}))
    computed(client, *((x**2).sum() for x in (output, *pullback(output)[:3])))
    after = dask_side.events(client)
    assert after == before  # nothing spilled, no pause, no new process
    assert max(client.run(dask_side.peak_mib).values()) < 0.75 * MEMORY / 2**20  # at 0.8 of it Dask pauses


def test_one_thread(client):
    """A worker of one thread computes on one."""

    def threads():
        import threading

        from threadpoolctl import threadpool_info

        blas = {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}
        return blas, [x.name for x in threading.enumerate() if x.name.startswith("anyattention")]

    computed(client, aa.dot_product_attention(*drawn(2048, 1024)))
    assert {str(x) for x in client.run(threads).values()} == {"({1}, [])"}


def test_equal_calls_share_their_tasks(client):
    """What one has computed, and still has, no other computes again."""
    one, two, other = (aa.dot_product_attention(*drawn(64, 16), scale=scale) for scale in (None, None, 0.3))
    counts, kept = [], []
    for x in (one, two, other):
        with distributed.get_task_stream(client) as stream:
            kept.append(client.persist(x))
            distributed.wait(kept, timeout=WAIT)
        counts.append(sum("attend" in str(task["key"]) for task in stream.data))
    assert counts == [16, 0, 16]


def test_benchmark(client):
    from benchmarks.scale import dask_side

    found = dask_side.measure(512, 128, keys=2048, keys_chunk=256, turns=1, client=client)
    assert [(x["case"], x["gradient"]) for x in found] == [(x.what, x.gradient) for x in dask_side.cases()]
    for x in found:
        assert x["error"] < 1e-5
        assert x["build_seconds"] > 0
        assert x["seconds"] > 0
        assert x["pauses"] == x["spilled_bytes"] == x["restarts"] == 0
        assert 0 < x["rest_mib"] <= x["peak_mib"] < MEMORY / 2**20
        assert x["tasks"] >= (x["q_length"] // x["chunk"]) * (x["kv_length"] // x["chunk"]) / (
            1 + ("causal" in x["case"])
        )
        assert (x["ratio"] is None) == (x["case"] == "few queries")
