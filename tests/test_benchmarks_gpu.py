"""The benchmark for GPUs, which pretends on a CPU: what it records, and that a wrong answer gets no time."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anyattention import dot_product_attention
from anyattention_conformance.workers import DiedError

pytestmark = pytest.mark.needs("jax", "flax", "torch")
ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "backends", "conformance")
LAZY = "--xla_backend_optimization_level=0"  # as XLA is to compile, where speed is not the matter
SHAPE = "2x128x2x128"  # every kind of call, forward and with the gradient, of one shape


def python(*arguments, **environment):
    """An interpreter that finds the packages as docs/gpu.md says it."""
    path = os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | environment,
        timeout=300,
    )


def run(*arguments, **environment):
    """The program, in a process of its own."""
    return python("-m", "benchmarks.gpu", *arguments, **environment)


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """What it prints, and what it records."""
    path = tmp_path_factory.mktemp("gpu") / "results.json"
    done = run("--pretend", "--quick", "--only", SHAPE, "--results", str(path), XLA_FLAGS=LAZY)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout, json.loads(path.read_text()), path


@pytest.fixture
def gpu(monkeypatch):
    """The parts of the program that tests call."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu import cases, correctness, measure, record, torch_side, worker

    class Parts:
        Case, Record, OtherMachineError = cases.Case, record.Record, record.OtherMachineError
        side = torch_side.TorchSide(pretend=True)

        @staticmethod
        def figures(case, functions):
            messages = measure.measure(Parts.side, case, functions, 0.001)
            return {message["row"]: message["figures"] for message in messages if "row" in message}

        survivors = staticmethod(worker.figures)

    Parts.correctness = correctness
    return Parts


@pytest.mark.slow
def test_correctness(pretended):
    printed, data, _ = pretended
    found = data["correctness"]
    assert {name: list(engines) for name, engines in found.items()} == {
        name: [*about["engines"], "tiled", "exact"] for name, about in data["frameworks"].items()
    }
    for framework in ("jax", "torch"):
        for implementation in ("tiled", "exact"):
            assert {x["verdict"] for x in found[framework][implementation].values()} == {"conforms"}
    for engine in ("cudnn", "tokamax"):
        refused = [x["why"] for x in found["jax"][engine].values() if x["verdict"] == "refused"]
        assert len(refused) > 10
        assert set(refused) == {"it runs on gpu, not on cpu"}
    sdpa = found["torch"]["sdpa"]
    assert sdpa["plain bfloat16"] == {"verdict": "conforms", "why": ""}
    assert not [x for x in sdpa.values() if x["verdict"] == "wrong"]
    assert re.search(r"^JAX, cudnn( +\d+){5}$", printed, re.MULTILINE)


@pytest.mark.slow
def test_speed(pretended):
    _, data, _ = pretended
    assert len(data["speed"]) == 10
    times = 0
    for case, frameworks in data["speed"].items():
        assert "refused" in frameworks["jax"]["ours, fused"]
        for figures in (figures for rows in frameworks.values() for figures in rows.values()):
            if "seconds" in figures:
                times += 1
                assert figures["error_eps"] <= 8
                assert 0 < figures["tflops"] < 100 * max(data["peak_tflops"].values())
            else:
                assert {"refused", "skipped", "failed"} & set(figures)
        fused = frameworks["torch"]["ours, fused"]
        assert fused["engine"] == "sdpa"
        assert fused["of_direct"] > 0
        assert ("seconds" in frameworks["jax"]["Flax"]) == ("gradient" not in case)  # its logits would not fit
    assert times == 10 * 4 + 5
    assert all(isinstance(data["choosing_us"]["torch"][f"{kind}, fused"], float) for kind in ("full", "bias"))
    assert data["choosing_us"]["jax"]["full, fused"].startswith("refused: cudnn: it runs on gpu, not on cpu")


@pytest.mark.slow
def test_report(pretended):
    printed, data, path = pretended
    assert data["pretend"] is True
    assert {"jax", "torch"} <= set(data["frameworks"]["jax"]["versions"]) | set(data["frameworks"]["torch"]["versions"])
    header, rule, *rows = re.findall(r"^\|.*\|$", printed, re.MULTILINE)
    assert len(rows) == 10
    assert {line.count("|") for line in (header, rule, *rows)} == {10}
    assert "GB of logits" in printed
    assert path.with_suffix(".png").exists()
    again = run("--pretend", "--part", "report", "--results", str(path))
    assert again.stdout == printed


def test_report_of_the_committed_run(tmp_path):
    """It is printed as it is: the file stays the same, and the text has its counts and its fastest call."""
    committed = ROOT / "benchmarks" / "results" / "gpu-2026-11-26-h100.json"
    path = tmp_path / committed.name
    path.write_bytes(committed.read_bytes())
    done = run("--part", "report", "--results", str(path))
    assert not done.returncode, done.stderr[-2000:]
    assert path.read_bytes() == committed.read_bytes()
    for engine, counts in (("JAX, cudnn", 196), ("JAX, tokamax", 119), ("PyTorch, sdpa", 195)):
        (found,) = re.findall(rf"^{engine}((?: +\d+){{5}})$", done.stdout, re.MULTILINE)
        assert sum(map(int, found.split())) == counts
    assert "NVIDIA H100 80GB HBM3: a matrix product in bfloat16 runs at 783.9 TFLOP/s" in done.stdout
    assert "| bfloat16 4x4096x16x128 lengths | 645 (82 %) |" in done.stdout


def test_no_gpu():
    done = run("--framework", "torch", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "benchmarks.gpu: there is no NVIDIA GPU to measure on, since torch finds no NVIDIA GPU; try --pretend"
    ]


def test_nothing_needs_installing():
    """Where array-api-compat is missing, the copy in SciPy, which JAX needs, does; nor is threadpoolctl needed."""
    script = """
from importlib import util
find = util.find_spec
missing = ("array_api_compat", "threadpoolctl")
util.find_spec = lambda name, *rest: None if name in missing else find(name, *rest)
import benchmarks.gpu, array_api_compat
assert "scipy" in array_api_compat.__file__
import threadpoolctl
assert not hasattr(threadpoolctl, "threadpool_info")
import jax.numpy, numpy, torch
from anyattention import dot_product_attention
for library in (jax.numpy, numpy, torch):
    x = library.ones((2, 3, 1, 4))
    print(type(dot_product_attention(x, x, x)).__name__, end=" ")
"""
    done = python("-c", script)
    assert done.stdout.split() == ["ArrayImpl", "ndarray", "Tensor"], done.stderr[-2000:]


def test_masks_are_made_after_their_framework():
    """Where the module is imported first, as in the kit's processes: JAX takes masks apart that are made after it."""
    script = """
import sys
from benchmarks.gpu import correctness
assert "jax" not in sys.modules
correctness.make("jax", pretend=True)
import jax
for case in correctness.rules.CASES:
    if case.rule and not case.constant:
        mask = case.given(lambda mask: mask)()
        assert not any(leaf is mask for leaf in jax.tree.leaves(mask)), case.id
"""
    done = python("-c", script)
    assert not done.returncode, done.stderr[-2000:]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", ["full", "causal", "lengths", "keys", "bias"])
def test_wrong_answer_gets_no_time(gpu, kind, gradient):
    """Off by a scale, by the mask or bias, or not finite."""
    case = gpu.Case("", 2, 64, 2, 32, kind=kind, dtype="bfloat16", gradient=gradient)
    right = gpu.side.functions(case)["sdpa"]
    plain = gpu.side.functions(replace(case, kind="full"))["sdpa"]
    wrong = {
        "scale": lambda query, *rest: right(query * 1.25, *rest),
        "nan": lambda *arguments: right(*arguments) * torch.nan,
        "all heads alike": lambda query, key, value, extras: right(
            query, key, value[:, :, :1].expand_as(value), extras
        ),
    }
    if kind != "full":
        wrong["no mask"] = lambda query, key, value, extras: plain(query, key, value, {})
    figures = gpu.figures(case, {"sdpa": right, **wrong})
    assert figures["sdpa"]["seconds"] > 0
    for name in wrong:
        assert "wrong" in figures[name], name
        assert "seconds" not in figures[name]


def test_failure_gets_no_time(gpu):
    case = gpu.Case("", 1, 64, 2, 32, dtype="float16")
    figures = gpu.figures(case, {"sdpa": lambda *arguments: 1 / 0})
    assert figures == {"sdpa": {"failed": "ZeroDivisionError: division by zero"}}


def test_process_that_dies(gpu):
    """The contestant that brought it down is left out, the others are measured again."""

    class Process:
        about, started = {"rows": ["a", "b", "c"]}, 0

        def ask(self, job, *arguments, seconds):
            if job == "message":
                return next(self.messages, None)
            self.messages = self.case(*arguments)

        def case(self, case, without):
            for name in self.about["rows"]:
                if name in without:
                    continue
                yield {"at": name}
                if name == "b":
                    raise DiedError("no answer")
                yield {"row": name, "figures": {"seconds": 1.0}}

        def start(self):
            self.started += 1

    process = Process()
    found = gpu.survivors(process, gpu.Case("", 1, 64, 2, 32))
    assert found == {"a": {"seconds": 1.0}, "b": {"failed": "no answer"}, "c": {"seconds": 1.0}}
    assert process.started == 1


def test_gradient_that_is_refused(gpu, monkeypatch):
    """The output is judged all the same."""

    def attention(query, key, value):
        if query.requires_grad:
            raise NotImplementedError("it cannot serve this call: flex: none; sdpa: no gradient. Pass None for another")
        return dot_product_attention(query, key, value)

    correctness = gpu.correctness
    monkeypatch.setattr(correctness, "attention", lambda name: attention)
    task = next(x for x in correctness.tasks("sdpa", quick=True) if x.case.id == "plain" and x.dtype == "bfloat16")
    assert task.gradients
    judge = correctness.Judge(correctness.rules.Answers(), correctness.claims_of("torch", "sdpa"))
    found = correctness.verdict(judge, task, correctness.make("torch", pretend=True).run(*task))
    assert found == {"verdict": "conforms", "why": "without its gradient: no gradient"}


@pytest.mark.parametrize("name", ["sdpa", "tiled"])
def test_cases_by_rule(gpu, name):
    """They conform, or are refused; and those with low biases catch a kernel's own gradient."""
    correctness = gpu.correctness
    judge = correctness.Judge(correctness.rules.Answers(), correctness.claims_of("torch", name))
    tasks = [x for x in correctness.tasks(name, quick=False) if isinstance(x.case, correctness.rules.Ruled)]
    device = correctness.make("torch", pretend=True)
    found = {f"{x.case.id} {x.dtype}": correctness.verdict(judge, x, device.run(*x)) for x in tasks}
    assert len(found) == len(correctness.rules.CASES) + (14 if name == "sdpa" else 0)
    assert {run: x for run, x in found.items() if x["verdict"] not in ("conforms", "refused")} == {}
    conforming = {run.split()[0] for run, x in found.items() if x["verdict"] == "conforms"}
    if name == "tiled":
        assert len(conforming) == len(found)
    else:
        assert conforming >= {"rule-causal", "rule-lengths", "rule-lengths-bias", "low-bias", "low-bias-lengths"}
        assert found["low-bias-rows bfloat16"]["why"] == ""  # with its gradient


def test_cases_by_rule_have_teeth(gpu, monkeypatch):
    """A mask that is off by one, and the gradient of a kernel with no regard to low biases."""
    correctness = gpu.correctness
    judge = correctness.Judge(correctness.rules.Answers(), correctness.claims_of("torch", "tiled"))
    tasks = {x.case.id: x for x in correctness.tasks("tiled", quick=False)}
    device = correctness.make("torch", pretend=True)
    task = tasks["low-bias-everywhere"]
    outcome = device.run(*task)
    for name, scale in (("query", 1.1), ("value", 384.0)):  # as where the sum of the weights is lost
        wrong = replace(outcome, gradients=outcome.gradients | {name: outcome.gradients[name] * scale})
        assert correctness.verdict(judge, task, wrong)["verdict"] == "wrong"
    for name, case in (("causal", "rule-causal"), ("lengths", "rule-causal-lengths"), ("window", "rule-segments")):
        other = tasks[case]
        outcome = device.run(replace(other.case, rule=name), *other[1:])
        assert correctness.verdict(judge, other, outcome)["verdict"] == (
            "conforms" if case == "rule-causal" else "wrong"
        )


def test_wrong_is_wrong(gpu, monkeypatch):
    correctness = gpu.correctness
    monkeypatch.setattr(correctness, "attention", lambda name: lambda query, key, value: value * 1.0)
    task = correctness.tasks("exact", quick=True)[0]
    judge = correctness.Judge(correctness.rules.Answers(), correctness.claims_of("torch", "exact"))
    found = correctness.verdict(judge, task, correctness.make("torch", pretend=True).run(*task))
    assert found["verdict"] == "wrong"
    assert found["why"].startswith("output: ")


def test_results_add_up(gpu, tmp_path):
    path = tmp_path / "results.json"
    about = {"jax": {"device": "card"}}
    record = gpu.Record(path, about, pretend=True)
    record.verdicts("jax", "tiled")["plain float32"] = {"verdict": "conforms", "why": ""}
    record.save()
    record = gpu.Record(path, {"torch": {"device": "card"}}, pretend=True)
    record.figures("a case")["torch"] = {"sdpa": {"seconds": 1.0}}
    record.save()
    record = gpu.Record(path, about, pretend=True)
    assert record.verdicts("jax", "tiled")
    assert record.figures("a case")
    for other, pretend in (({"jax": {"device": "another"}}, True), (about, False)):
        with pytest.raises(gpu.OtherMachineError):
            gpu.Record(path, other, pretend)
