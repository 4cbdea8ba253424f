"""Record what the installed Flax answers to every case: ``python -m anyattention_conformance.golden``.

The recording lets people without JAX compare with Flax. It is made again when cases or versions change; what was
recorded of the same inputs by the same versions is kept.
"""

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from anyattention_conformance.cases import CASES
from anyattention_conformance.oracles import GOLDEN, Golden, Live, OracleError, digest
from anyattention_conformance.truth import Answer


def record(path: Path, old: Golden | None = None) -> None:
    """Write Flax's answers to a file; those of `old` are taken as they are."""
    import flax
    import jax

    about: dict[str, Any] = {"flax": flax.__version__, "jax": jax.__version__, "date": date.today().isoformat()}
    about["runs"], live, arrays = {}, Live(), {}
    if old is not None and [old.about[name] for name in ("flax", "jax")] != [about["flax"], about["jax"]]:
        old = None
    for case in (case for case in CASES if not case.beyond):
        for dtype in case.dtypes:
            answer: Answer | str | None = None
            if old is not None:
                try:
                    answer = old.answer(case, dtype)
                except OracleError:
                    answer = None
            answer = live.answer(case, dtype) if answer is None else answer
            entry: dict[str, Any] = {"inputs": digest(case.inputs(dtype))}
            if isinstance(answer, str):
                entry["error"] = answer
            else:
                found = {"output": answer.output, **answer.gradients}
                entry["arrays"] = {name: x.dtype.name for name, x in found.items()}
                for name, x in found.items():
                    bits = x.view(np.uint16) if x.dtype.name == "bfloat16" else x
                    arrays[f"{case.id} {dtype} {name}"] = bits
            about["runs"][f"{case.id} {dtype}"] = entry
    path.parent.mkdir(exist_ok=True)
    # Not compressed: wheels and archives compress the whole better than NumPy its 2300 arrays, by 45 kB.
    np.savez(path, about=np.asarray(json.dumps(about)), **arrays)


if __name__ == "__main__":
    record(GOLDEN, Golden() if GOLDEN.exists() else None)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 2**20:.1f} MiB")  # noqa: T201
