"""Dask arrays on a cluster of processes with little memory, beside NumPy in one process that has it all."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.scale.memory import forget, now_mib, peak_mib

HEADS, DEPTH, FEW = 2, 64, 256
PAUSED = "Pausing worker"  # in the log of a worker that takes no more tasks, for want of memory


@dataclass(frozen=True)
class Case:
    """What is asked of the cluster: the output, or the gradients of query, key and value too."""

    what: str
    options: dict[str, Any] = field(default_factory=dict)
    gradient: bool = False
    part: int = 1  # the length is one of so many parts
    few: bool = False  # queries, over keys that would not fit into one process


def cases() -> list[Case]:
    """All of them; dropout is shorter, since its random bits take ten times as long as all the rest."""
    from anyattention import random

    dropout = {"dropout_rng": random.key(0), "dropout_rate": 0.1, "broadcast_dropout": False}
    causal = {"is_causal": True}
    return [
        Case("full"),
        Case("causal", causal),
        Case("full", gradient=True),
        Case("causal", causal, gradient=True),
        Case("dropout of each head", dropout, part=4),
        Case("few queries", few=True),
    ]


def measure(
    length: int = 65536,
    chunk: int = 4096,
    memory: str = "1GiB",
    workers: int = 2,
    keys: int = 2**22,
    keys_chunk: int = 16384,
    turns: int = 2,
    only: tuple[str, ...] = (),
    client: Any = None,
) -> list[dict[str, Any]]:
    """The figures of every case, or of those that `only` names; few queries see so many `keys`.

    Each worker is a process with a thread of its own. The one process has as many threads as there are workers. They
    take turns, and the least of their seconds counts. Arrays are drawn on the cluster, within its seconds. A `client`
    brings a cluster of its own.
    """
    found = []
    with cluster(memory, workers) if client is None else nullcontext(client) as client:
        for case in cases():
            if only and case.what not in only:
                continue
            rows, columns = (min(FEW, keys), keys) if case.few else [length // case.part] * 2
            size = min(keys_chunk if case.few else chunk, columns)
            about = {"case": case.what, "gradient": case.gradient, "q_length": rows, "kv_length": columns}
            about |= {"chunk": size, "workers": workers, "memory": memory}
            found.append(about | figures(client, case, rows, columns, size, workers, turns))
    return found


@contextmanager
def cluster(memory: str, workers: int) -> Iterator[Any]:
    """A client of so many processes, with so much memory and one thread each."""
    from distributed import Client, LocalCluster

    sizes = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": memory}
    with LocalCluster(processes=True, dashboard_address=":0", **sizes) as place, Client(place) as client:
        yield client


def figures(client: Any, case: Case, rows: int, columns: int, size: int, threads: int, turns: int) -> dict[str, Any]:
    """One case, on a cluster and, unless its queries are few, in this process."""
    from dask import compute
    from threadpoolctl import threadpool_limits

    client.run(forget)
    before, rest = events(client), client.run(now_mib)
    there, here, cpu, error = [], [], [], None
    host = None if case.few else compute(*drawn(rows, columns, size), scheduler="threads")
    for _ in range(turns):
        start = time.perf_counter()
        wanted = called(case, drawn(rows, columns, size))
        tasks = len({key for x in wanted for key in dict(x.__dask_graph__())})
        built = time.perf_counter() - start
        start, used = time.perf_counter(), sum(client.run(time.process_time).values())
        found = client.compute([sample(x, size) for x in wanted], sync=True)
        there.append(time.perf_counter() - start)
        cpu.append(sum(client.run(time.process_time).values()) - used)
        if host is not None:
            with threadpool_limits(threads, "blas"):
                start, used = time.perf_counter(), time.process_time()
                expected = called(case, host)
                here.append((time.perf_counter() - start, time.process_time() - used))
            error = difference(found, [sample(x, size) for x in expected])
            del expected
    after, peaks = events(client), client.run(peak_mib)
    if case.few:
        error = difference([x[:, 0, 0] for x in found], [client.compute(row(drawn(rows, columns, size)), sync=True)])
    seconds, (alone, alone_cpu) = min(there), map(min, zip(*here, strict=True)) if here else (None, None)
    return {
        "tasks": tasks,
        "build_seconds": built,
        "seconds": seconds,
        "cpu_seconds": min(cpu),
        "one_process_seconds": alone,
        "one_process_cpu_seconds": alone_cpu,
        "ratio": None if alone is None else seconds / alone,
        "error": error,
        "rest_mib": max(rest.values()),
        "peak_mib": max(*peaks.values(), *rest.values()),  # Linux counts some 100 KiB late
        "pauses": after["pauses"] - before["pauses"],
        "spilled_bytes": after["spilled"] - before["spilled"],
        "restarts": len(after["processes"] - before["processes"]),
    }


def drawn(rows: int, columns: int, size: int) -> list[Any]:
    """Query, key and value, which are in no memory before they are asked for."""
    import dask.array as da

    draw = da.random.default_rng(0).standard_normal
    lengths = (rows, columns, columns)
    return [draw((1, n, HEADS, DEPTH), chunks=(1, min(size, n), HEADS, DEPTH), dtype=np.float32) for n in lengths]


def called(case: Case, arrays: Any) -> list[Any]:
    """The output, with the gradients of the sum of its squares, halved, if these are asked for."""
    from anyattention import dot_product_attention, dot_product_attention_vjp

    if not case.gradient:
        return [dot_product_attention(*arrays, **case.options, implementation="tiled")]
    output, pullback = dot_product_attention_vjp(*arrays, **case.options)
    return [output, *pullback(output)[:3]]


def sample(x: Any, size: int) -> Any:
    """A row of each chunk, for which all of it is computed."""
    size = min(size, x.shape[1])
    return x[:, size // 2 :: size]


def row(arrays: list[Any]) -> Any:
    """The first row of a sample of few queries, of the first head, by the formula in float64."""
    query, key, value = (x[0, :, 0].astype(np.float64) for x in arrays)
    logits = key @ query[len(query) // 2] / DEPTH**0.5
    weights = np.exp(logits - logits.max())
    return (weights @ value / weights.sum())[None]


def difference(found: list[Any], expected: list[Any]) -> float:
    """The largest, relative to the largest number of an array."""
    pairs = zip(found, expected, strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def events(client: Any) -> dict[str, Any]:
    """What has happened on the cluster so far: pauses, spilled bytes; and its processes."""
    logs = client.get_worker_logs().values()
    return {
        "pauses": sum(PAUSED in text for log in logs for _, text in log),
        "spilled": sum(client.run(spilled).values()),
        "processes": {*client.run(process).values()},
    }


# --- what workers run ---


def process() -> int:
    """The number of this process."""
    import os

    return os.getpid()


def spilled(dask_worker: Any) -> int:
    """How many bytes this worker has written to disk for want of memory."""
    counts = getattr(dask_worker.data, "cumulative_metrics", {})
    return int(sum(count for (label, unit), count in counts.items() if (label, unit) == ("disk-write", "bytes")))
