"""The conformance kit and the cases by rule on the device: every engine, and our own implementations.

A call that an engine refuses is no error of its: it is counted, with the reasons. All others are judged by the kit,
by contract C3, "exact" by C2, against the recording of Flax on a CPU. C3 measures by Flax's own error on the same
device and in the same precision. So that the recording is that, products of float32 are in full precision here: JAX's
"highest", and no TF32 in PyTorch; the defaults of a GPU round float32 to 10 bits, and Flax's answers with it.
"""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import anyattention
from anyattention_conformance import claims, frameworks, suite
from anyattention_conformance.adapters import FOLDER, ours
from anyattention_conformance.case import Case
from anyattention_conformance.claims import Claims
from anyattention_conformance.oracles import OracleError
from anyattention_conformance.results import BUG, CONFORMS, DECLARED, NOT_RUN, UNSUPPORTED, Result
from anyattention_conformance.suite import Judge, Run
from anyattention_conformance.targets import Outcome, Target
from anyattention_conformance.workers import Recipe, Workers
from benchmarks.gpu import rules
from benchmarks.gpu.measure import REFUSAL, reasons

OURS = ("exact", "tiled")
REFUSED, WRONG = "refused", "wrong"
LOST = ("illegal memory access", "illegal address", "device-side assert", "unspecified launch failure")
QUICK = ("plain", "depth-24", "bias-heads", "mask-heads", "mask-keys", "kv-lengths-differ", "rule-causal-lengths")
SECONDS = 120.0  # that a case may take, compiling included
GIVEN_UP = "given up"


class Task(NamedTuple):
    """One case of the kit, by one engine or implementation."""

    case: Case
    dtype: str
    gradients: bool
    name: str


class OnDevice(NamedTuple):
    """What the kit's processes run tasks with."""

    framework: frameworks.Framework

    @property
    def about(self) -> dict[str, str]:
        """The versions of what it runs on."""
        return self.framework.versions

    def run(self, case: Case, dtype: str, gradients: bool, name: str) -> Outcome:
        """The outcome; without gradients, which says why, where the call is refused with them alone.

        A GPU that is lost to this process takes the process with it, so that the next case has one.
        """
        function = attention(name)
        target = Target(name, case.given(function) if isinstance(case, rules.Ruled) else function, self.framework)
        outcome = target.run(case, dtype, gradients)
        if gradients and REFUSAL in outcome.message:
            outcome = replace(target.run(case, dtype, False), no_gradients=outcome.message)
        if any(sign in f"{outcome.message} {outcome.no_gradients}" for sign in LOST):
            os._exit(70)
        return outcome


class TorchOnGPU(frameworks.Torch):
    """PyTorch, with arrays on the GPU."""

    def put(self, x: Any) -> Any:
        return super().put(x).to("cuda")


def make(framework: str, pretend: bool) -> OnDevice:
    """What runs in the kit's processes."""
    if framework == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        return OnDevice(frameworks.framework("jax"))
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return OnDevice(frameworks.framework("torch") if pretend else TorchOnGPU("torch"))


def attention(name: str) -> Callable[..., Any]:
    """Our attention by one implementation, or by "fused" with one engine."""
    if name in OURS:
        return getattr(ours, name)

    @functools.wraps(anyattention.dot_product_attention)
    def fused(*args: Any, **kwargs: Any) -> Any:
        with anyattention.config(engines=[name]):
            return ours.fused(*args, **kwargs)

    return fused


def claims_of(framework: str, name: str) -> Claims:
    """What is declared beside the kit's adapters: of exact with contract C2, of engines with C3."""
    names = {"exact": ("",), "tiled": ("-tiled",)}.get(name, (f"-{name}", "-fused"))
    files = [FOLDER / f"anyattention-{framework}{suffix}.toml" for suffix in names]
    declared = next((claims.read(path) for path in files if path.exists()), Claims())
    return replace(declared, contract="C2" if name == "exact" else "C3")


def tasks(name: str, quick: bool) -> list[Task]:
    """The smoke tier, and the cases by rule. Most engines have no float32, so that they are asked in bfloat16 too."""
    chosen = suite.runs("smoke", "C2" if name == "exact" else "C3")
    if name not in OURS:
        others = [run for run in chosen if run.dtype != "bfloat16"]
        cases = dict.fromkeys(run.case for run in chosen if "bfloat16" in run.case.dtypes)
        chosen = others + [Run(case, "bfloat16", case.gradients) for case in cases]
    chosen += [Run(case, "bfloat16", True) for case in rules.CASES]
    if name not in OURS:
        others = [case for case in rules.CASES if case.id in rules.IN_ALL_DTYPES]
        chosen += [Run(case, dtype, True) for dtype in ("float32", "float16") for case in others]
    if quick:
        chosen = [run for run in chosen if run.case.id in QUICK]
    return [Task(*run, name) for run in chosen]


def verdicts(framework: str, todo: list[Task], pretend: bool, jobs: int) -> Iterator[tuple[Task, dict[str, str]]]:
    """Each task with its verdict, as they come."""
    names = {task.name for task in todo}
    answers = rules.Answers()
    judges = {name: Judge(answers, claims_of(framework, name)) for name in names}
    for task, outcome in Workers(Recipe(make, (framework, pretend)), SECONDS, jobs)(todo):
        if not outcome.message.startswith(GIVEN_UP):  # so that it is tried again when the program is
            yield task, verdict(judges[task.name], task, outcome)


def verdict(judge: Judge, task: Task, outcome: Outcome) -> dict[str, str]:
    """The kit's verdict on a task, or that it was refused, and why."""
    if REFUSAL in outcome.message:
        return {"verdict": REFUSED, "why": own_reasons(task.name, outcome.message)}
    refused = REFUSAL in outcome.no_gradients
    try:
        results = judge.results(Run(task.case, task.dtype, task.gradients and not refused), outcome)
    except OracleError as error:
        return {"verdict": NOT_RUN, "why": str(error)}
    for kind in (BUG, DECLARED, UNSUPPORTED, NOT_RUN):
        found = [result for result in results if result.verdict == kind]
        if found and (kind in (BUG, DECLARED) or len(found) == len(results)):
            names = {BUG: WRONG, UNSUPPORTED: REFUSED}
            return {"verdict": names.get(kind, kind), "why": "; ".join(map(sentence, found))}
    why = f"without its gradient: {own_reasons(task.name, outcome.no_gradients)}" if refused else ""
    return {"verdict": CONFORMS, "why": why}


def sentence(result: Result) -> str:
    return f"{result.quantity}: {result.message}"


def own_reasons(name: str, message: str) -> str:
    """Why an engine refuses, without what is said of the others."""
    found = reasons(message).split("; ")
    own = [reason.removeprefix(f"{name}: ") for reason in found if reason.startswith(f"{name}: ")]
    return "; ".join(own or found)
