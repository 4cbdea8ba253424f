"""Memory, collectives, balance and times past one device: tables in Markdown, and a JSON file.

JAX's devices are the GPUs or TPUs that are there, else virtual ones on the CPU; PyTorch's ranks have a GPU each, else a
core; Dask has two processes with a GiB each.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.__main__ import processor
from benchmarks.scale import report
from benchmarks.scale.cases import QUICK
from benchmarks.scale.measure import Budget, of_dask, of_jax, of_torch, say
from benchmarks.scale.record import Record, load
from benchmarks.worker import cores

RESULTS = Path(__file__).parents[1] / "results"
FRAMEWORKS = ("jax", "torch", "dask")
VIRTUAL = 4  # devices of JAX on a CPU, in times


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status is 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--only", default=",".join(FRAMEWORKS), metavar="NAMES", help="of jax,torch,dask")
    parser.add_argument("--quick", action="store_true", help="tiny lengths, to try the program")
    parser.add_argument("--seconds", type=float, default=1500.0, metavar="N", help="to end after (default: 1500)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="that each contestant gets (default: 3)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="the JSON file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the tables of such a file alone")
    options = parser.parse_args(arguments)
    if options.report:
        print(*report.everything(json.loads(options.report.read_text())), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    folder = Path(tempfile.gettempdir()) if options.quick else RESULTS
    path = options.results or folder / f"scale-{date.today().isoformat()}.json"
    record = Record(path, processor(), options.quick)
    budget, scale = Budget(options.seconds, options.turns, record.save), QUICK if options.quick else None
    jobs = {
        "jax": lambda found: of_jax(found, scale, budget, 2 if scale else VIRTUAL),
        "torch": lambda found: of_torch(found, scale, budget, 2 if scale else cores()),
        "dask": lambda found: of_dask(found, options.quick, budget),
    }
    for name in FRAMEWORKS:
        if name in options.only.split(","):
            say(f"{name}:")
            found = record.part(name)
            jobs[name](found)
            found["load"].append(load())
            record.save()
    print(*report.everything(record.data), sep="\n")
    print(f"\nresults: {path}")
    return int("wrong" in json.dumps(record.data))


if __name__ == "__main__":
    sys.exit(main())
