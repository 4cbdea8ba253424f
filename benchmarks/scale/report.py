"""What was found, as tables in Markdown."""

from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]
NAMES = {"ring": "ring", "gather": "gather", "": "tiled, without sequence_axis"}


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """The lines of one; of none, where a machine has one device alone."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    yield from (f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines) if lines else ("None: one device.",)


def everything(data: Row) -> Iterator[str]:
    """All of it, one text after the other."""
    yield f"{data['processor']}, {data['cores']} cores"
    for part, tables in {"jax": jax, "torch": torch, "dask": dask}.items():
        if part in data:
            found = data[part]
            versions = ", ".join(f"{package} {x}" for package, x in found["versions"].items())
            load = " to ".join(str(x) for x in found["load"])  # at the end too, unless it was cut off
            yield f"\n{found['date']}, Python {found['python']}, {versions}; load of the machine {load}"
            yield from tables(found, data["cores"])


def jax(found: Row, cores: int) -> Iterator[str]:
    """Programs, balance and times."""
    about = found["about"]
    yield "\n## JAX: memory a device, forward and gradient, compiled and not run (MiB: temporaries + outputs)\n"
    programs = found["programs"]
    kinds = [("ring", "full"), ("ring", "causal"), ("gather", "full"), ("", "full")]
    head = ["length, devices", *(f"{NAMES[x]}{', causal' * (kind == 'causal')}" for x, kind in kinds)]
    sizes = dict.fromkeys((row["length"], row["devices"]) for row in programs)
    by_kind = {(row["length"], row["devices"], row["exchange"], row["kind"]): row for row in programs}

    def cells(texts: Any) -> list[list[str]]:
        return [[f"{n} on {m}", *(texts(by_kind[n, m, x, kind]) for x, kind in kinds)] for n, m in sizes]

    yield from table(head, cells(memory))
    for platform in sorted({x for row in programs for x in row} & {"gpu", "tpu"}):
        yield f"\nThe same in bfloat16 for {platform}:\n"
        yield from table(head, cells(lambda row, name=platform: memory(row.get(name, {}))))
    yield "\nCollectives in the compiled text:\n"
    yield from table(head, cells(collectives))
    yield "\nBytes that a device sends in a turn of the ring, over the least possible (key and value):\n"
    sent = [row for row in programs if row["exchange"] == "ring" and len(row.get("sent_a_turn", ())) == 2]
    yield from table(
        ["length, devices, kind", "least", "forward", "backward, where gradients travel too"],
        [
            [f"{row['length']} on {row['devices']}, {row['kind']}", f"{row['least_a_turn']:,}"]
            + [f"{x / row['least_a_turn']:.3f}" for x in sorted(row["sent_a_turn"])]
            for row in sent
        ],
    )
    yield "\n## JAX: logits computed in the forward pass, counted while it runs\n"
    yield from table(
        ["length, devices, kind", "exchange", "busiest device / mean", "all devices / one device's tiled"],
        [[f"{row['length']} on {row['devices']}, {row['kind']}", *balance(row)] for row in found["counted"]],
    )
    yield f"\n## JAX: times, {about['device']}, {found['times'][0]['dtype'] if found['times'] else ''}\n"
    if about["virtual"]:
        yield (
            f"The devices are virtual: all of them are these {cores} cores, which one device alone has as well. The "
            "ratio shows what the exchange costs, not what more devices would gain.\n"
        )
    yield "Weak scaling are the rows whose length grows with the devices, strong scaling those of one length.\n"
    rows = [[name(row), ms(row, "sharded"), ms(row, "one"), ratio(row, "one")] for row in found["times"]]
    yield from table(["call", "sharded, ms", "one device, ms", "ratio"], rows)


def torch(found: Row, cores: int) -> Iterator[str]:
    """Times, balance and memory."""
    about = found["about"]
    yield f"\n## PyTorch: times over ranks, {about['device']}\n"
    if not about["count"]:
        yield (
            f"A rank is a process with one thread, of {cores} cores; the one process has as many threads as there are "
            "ranks. Ranks on other machines would add their cores, and their network.\n"
        )
    head = ["call", "ranks, ms", "one process: tiled, ms", "SDPA, ms", "ranks / tiled"]
    head += ["busiest rank / mean: logits", "processor time", "memory of a rank, of one process, MiB"]
    rows = []
    for row in found["times"]:
        many, one = row.get("sharded", {}), row.get("tiled", {})
        texts = [most_of_mean(many.get(key)) for key in ("logits", "processor_seconds")]
        peaks = [f"{max(x['memory_mib']):.0f}" if "memory_mib" in x else "–" for x in (many, one)]
        times = [ms(row, which) for which in ("sharded", "tiled", "sdpa")]
        rows.append([name(row), *times, ratio(row, "tiled"), *texts, ", ".join(peaks)])
    yield from table(head, rows)


def dask(found: Row, cores: int) -> Iterator[str]:
    """The cluster beside one process."""
    yield "\n## Dask: worker processes with little memory, beside NumPy's tiled in one with as many threads\n"
    if why := found.get("not run"):
        yield f"Not run: {why}.\n"
    head = ["call", "tasks", "graph, s", "cluster, s", "one process, s", "ratio", "peak of a worker, MiB"]
    head += ["pauses", "spilled"]
    rows = []
    for row in found["rows"]:
        call = f"{row['case']}{', with gradient' * row['gradient']}, {row['q_length']} x {row['kv_length']}"
        seconds, alone = row["seconds"], row["one_process_seconds"]
        times = [f"{seconds:.1f}", *(("–", "–") if alone is None else (f"{alone:.1f}", f"{seconds / alone:.2f}"))]
        rows.append([call, str(row["tasks"]), f"{row['build_seconds']:.2f}", *times, f"{row['peak_mib']:.0f}"])
        rows[-1] += [str(row["pauses"]), str(row["spilled_bytes"])]
    yield from table(head, rows)


def name(row: Row) -> str:
    """A timed call."""
    return f"{row['length']} on {row['devices']}, {row['kind']}{', with gradient' * row['gradient']}"


def memory(row: Row) -> str:
    return f"{row['temporaries_mib']:.1f} + {row['outputs_mib']:.0f}" if "temporaries_mib" in row else why_not(row)


def collectives(row: Row) -> str:
    if "collectives" not in row:
        return why_not(row)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(row["collectives"].items())) or "none"


def balance(row: Row) -> list[str]:
    if "logits" not in row:
        return [why_not(row), "", ""]
    exchange = row["way"].partition(" over ")[0]
    return [exchange, most_of_mean(row["logits"]), f"{sum(row['logits']) / row['one']:.3f}"]


def most_of_mean(numbers: list[float] | None) -> str:
    return f"{max(numbers) * len(numbers) / sum(numbers):.3f}" if numbers and sum(numbers) else "–"


def ms(row: Row, which: str) -> str:
    figures = row.get(which, row)
    return f"{figures['seconds'] * 1e3:.1f}" if "seconds" in figures else why_not(figures)


def ratio(row: Row, to: str) -> str:
    times = [row.get(which, {}).get("seconds") for which in ("sharded", to)]
    return f"{times[0] / times[1]:.2f}" if all(times) else "–"


def why_not(figures: Row) -> str:
    """Why there is no figure, in a cell."""
    if "wrong" in figures:
        return f"WRONG ANSWER, no time: {figures['wrong']}"
    return " ".join(figures.get("failed", "–").split())[:120].replace("|", "/")
