"""A framework in a process of its own, which is started again where it dies."""

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

from anyattention_conformance.workers import DiedError, Worker
from benchmarks.gpu.cases import CARD, PRETEND, Case, every
from benchmarks.gpu.measure import choosing, matrix_product, measure, reasons
from benchmarks.gpu.ours import explainer

STEP_SECONDS = 150.0  # that one step of a job may take


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
            plan = explain()
            found = choosing(explain) if plan.implementation else f"refused: {'; '.join(plan.reasons)}"
            yield f"{case.kind}, {implementation}", found
        except NotImplementedError as error:
            yield f"{case.kind}, {implementation}", f"refused: {reasons(str(error))}"


class Server:
    """What a process serves: the jobs of one framework."""

    def __init__(self, framework: str, pretend: bool) -> None:
        self.kind, self.pretend, self.scale = side_of(framework), pretend, PRETEND if pretend else CARD
        self.about = self.kind.about() | {"engines": list(self.kind.engines), "rows": list(self.kind.rows)}

    @cached_property
    def side(self) -> Any:
        return self.kind(self.pretend)

    def run(self, job: str, *arguments: Any) -> Any:
        """The answer to a job, which is the name of a method."""
        return getattr(self, job)(*arguments)

    def peak(self) -> float:
        """TFLOP/s of a matrix product."""
        return matrix_product(self.side, self.side.product(self.scale.matrix), self.scale.matrix)

    def choosing(self) -> dict[str, Any]:
        """What the choice costs, by kind of call."""
        cases = {case.kind: case for case in every(self.scale, quick=True) if not case.gradient}
        return {name: cost for case in cases.values() for name, cost in costs(self.side, case)}

    def case(self, case: Case, without: Collection[str]) -> None:
        """Begin a case; its messages are then asked for one by one."""
        functions = self.side.functions(case)
        functions = {name: function for name, function in functions.items() if name not in without}
        self.messages = measure(self.side, case, functions, self.scale.reading)

    def message(self) -> dict[str, Any] | None:
        """The next of the case, None after the last."""
        found = next(self.messages, None)
        if found is None:
            self.side.clear()
        return found


def figures(process: Worker, case: Case) -> dict[str, Any]:
    """Those of every contestant of a case; one that brings the process down is left out and the rest repeated."""
    without: dict[str, Any] = {}
    while True:
        found: dict[str, Any] = {}
        at = ""
        try:
            process.ask("case", case, list(without), seconds=STEP_SECONDS)
            while (message := process.ask("message", seconds=STEP_SECONDS)) is not None:
                at = message.get("at", at)
                if "row" in message:
                    found[message["row"]] = message["figures"]
        except DiedError as error:
            process.start()
            rest = [name for name in process.about["rows"] if name not in found and name not in without]
            without |= {name: {"failed": str(error)} for name in ([at] if at else rest)}
            if at:
                continue
        return {name: (found | without)[name] for name in process.about["rows"]}
