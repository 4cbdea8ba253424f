"""A framework in a process of its own: reads a job a line, answers with messages in JSON, a line each."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.cases import CARD, PRETEND, Case, every
from benchmarks.gpu.measure import choosing, matrix_product, measure, reasons
from benchmarks.gpu.ours import explainer


def side_of(framework: str) -> Any:
    """The class of a framework's side."""
    if framework == "jax":
        from benchmarks.gpu.jax_side import JAXSide

        return JAXSide
    from benchmarks.gpu.torch_side import TorchSide

    return TorchSide


def costs(side: Any, case: Case) -> Iterator[tuple[str, Any]]:
    """Microseconds of choosing, for each kind of call, asked for by name or not; or why the call is refused."""
    for implementation in (None, "fused"):
        explain = explainer(case, side.inputs(case), implementation)
        try:
            yield f"{case.kind}, {implementation}", choosing(explain)
        except NotImplementedError as error:
            yield f"{case.kind}, {implementation}", f"refused: {reasons(str(error))}"


def messages(framework: str, pretend: bool) -> Iterator[dict[str, Any]]:
    """The answers to all jobs."""
    kind = side_of(framework)
    yield kind.about() | {"rows": kind.rows}
    side = None
    scale = PRETEND if pretend else CARD
    for line in sys.stdin:
        job = json.loads(line)
        side = side or kind(pretend)
        if job["job"] == "peak":
            yield {"tflops": matrix_product(side, side.product(scale.matrix), scale.matrix)}
        if job["job"] == "choosing":
            cases = {case.kind: case for case in every(scale, quick=True) if not case.gradient}
            yield {"microseconds": {name: cost for case in cases.values() for name, cost in costs(side, case)}}
        if job["job"] == "case":
            case = Case(**job["case"])
            functions = side.functions(case)
            functions = {name: function for name, function in functions.items() if name not in job["without"]}
            yield from measure(side, case, functions, scale.reading)
            side.clear()
        yield {"done": True}


def main() -> None:
    """Serve the framework named on the command line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    for message in messages(sys.argv[1], "--pretend" in sys.argv):
        answers.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    main()
