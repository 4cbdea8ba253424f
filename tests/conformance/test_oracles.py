"""Flax's recorded answers against the Flax that is installed."""

import ast
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import anyattention_conformance
from anyattention_conformance import CASES, Golden, Live, truth
from anyattention_conformance.budgets import c2, c3
from anyattention_conformance.oracles import Asserting, OracleError

GOLDEN, LIVE = Golden(), Live()


def marked(case, dtype):
    """A run of the full tier takes JAX seconds to compile."""
    quick = (dtype, case.gradients) in case.runs("smoke")
    return pytest.param(case, dtype, id=f"{case.id}-{dtype}", marks=() if quick else pytest.mark.slow)


RUNS = [marked(case, dtype) for case in CASES if not case.beyond for dtype in case.dtypes]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_the_recording_is_the_live_flax(case, dtype):
    recorded, live = GOLDEN.answer(case, dtype), LIVE.answer(case, dtype)
    if case.error:
        assert recorded == live == case.error
        return
    arguments, compute = case.inputs(dtype), case.compute_dtype(dtype)
    assert not c2(recorded.output, live.output, arguments, compute).message
    cotangent = case.cotangent(live.output.shape, live.output.dtype) if case.gradients else None
    right, size = truth(arguments, compute, cotangent)
    assert recorded.gradients.keys() == live.gradients.keys() == right.gradients.keys()
    for name, x in recorded.gradients.items():
        assert x.dtype == live.gradients[name].dtype
        assert not c3(x, live.gradients[name], right.gradients[name], size.gradients[name], compute).message


def test_other_inputs_than_those_recorded_are_refused(monkeypatch):
    case = next(case for case in CASES if case.id == "bias")
    usual = case.inputs("float32")
    monkeypatch.setattr(type(case), "inputs", lambda self, dtype: usual | {"key": np.nextafter(usual["key"], 9)})
    with pytest.raises(OracleError, match="--oracle live"):
        GOLDEN.answer(case, "float32")


def test_the_recording_is_small():
    from anyattention_conformance.oracles import GOLDEN as PATH

    assert len(zlib.compress(PATH.read_bytes())) < 3e6  # as a wheel has it


def test_without_asserts_the_live_flax_answers_as_with_them():
    chosen = [case for case in CASES if case.error or case.id == "bias"]
    code = (
        "import pickle, sys\n"
        "from anyattention_conformance import CASES, Live\n"
        "cases, live = {case.id: case for case in CASES}, Live()\n"
        "answers = {name: live.answer(cases[name], 'float32') for name in sys.argv[1:]}\n"
        "sys.stdout.buffer.write(pickle.dumps((__debug__, answers)))\n"
    )
    command = [sys.executable, "-O", "-W", "error::ResourceWarning", "-c", code, *(case.id for case in chosen)]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    assert b"ResourceWarning" not in done.stderr
    debug, answers = pickle.loads(done.stdout)
    assert not debug
    for case in chosen:
        live = LIVE.answer(case, "float32")
        if case.error:
            assert answers[case.id] == live == case.error
        else:
            np.testing.assert_array_equal(answers[case.id].output, live.output)


def test_a_flax_that_cannot_be_asked_is_said():
    asserting = Asserting()
    asserting._process.kill()
    with pytest.raises(OracleError, match="its process ended with"):
        asserting.answer(CASES[0], "float32")


def test_no_verdict_depends_on_asserts():
    """`python -O` takes them away."""
    for path in Path(anyattention_conformance.__file__).parent.rglob("*.py"):
        found = [x.lineno for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Assert)]
        assert not found, f"{path}: lines {found}"


def test_the_recording_leaves_no_file_open():
    collected = "oracle.itself = oracle; del oracle; gc.collect()"
    code = f"import gc; from anyattention_conformance import Golden; oracle = Golden(); {collected}"
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, check=True)
    assert "ResourceWarning" not in done.stderr
