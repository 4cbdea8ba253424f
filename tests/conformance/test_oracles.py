"""Flax's recorded answers against the Flax that is installed."""

import numpy as np
import pytest

from anyattention_conformance import CASES, Golden, Live, truth
from anyattention_conformance.budgets import c2, c3
from anyattention_conformance.oracles import OracleError

GOLDEN, LIVE = Golden(), Live()


def marked(case, dtype):
    """A run of the full tier takes JAX seconds to compile."""
    quick = (dtype, case.gradients) in case.runs("smoke")
    return pytest.param(case, dtype, id=f"{case.id}-{dtype}", marks=() if quick else pytest.mark.slow)


RUNS = [marked(case, dtype) for case in CASES for dtype in case.dtypes]


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

    assert PATH.stat().st_size < 4 * 2**20
