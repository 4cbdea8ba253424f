"""The benchmark on a CPU: a model's case asks the same of us and of Transformers, and a wrong answer gets no time."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.needs("torch", "transformers", "ml_dtypes")


@pytest.fixture
def program(monkeypatch):
    """Its parts, which stand beside the packages; each call is timed once."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import cases, models, worker

    monkeypatch.setattr(worker, "SECONDS", 0.0)
    found = {case.name: case for case in cases.CASES if case.of_model}
    return SimpleNamespace(cases=found, contestants=cases.CONTESTANTS, models=models, measure=worker.measure)


def small(case):
    return replace(case, q_length=160, depth=16, heads=4, kv_heads=2)


@pytest.mark.parametrize(
    "name", ["Gemma 2, 1024", "Gemma 2, 1024, training", "gpt-oss, 1024", "gpt-oss, 1024, training"]
)
def test_everyone_who_has_a_model_is_right(program, name):
    case, who = small(program.cases[name]), program.contestants
    found = {name: program.measure(case, *how) for name, how in who.items() if how[0] != "jax"}
    right = {name for name, figures in found.items() if "seconds" in figures}
    assert right == {"anyattention, NumPy", "anyattention, PyTorch", "Transformers eager"}


@pytest.mark.parametrize("wrong", [{"logits_soft_cap": 40.0}, {"scale": 0.3}, {"mask": None}])
def test_a_wrong_answer_gets_no_time(program, wrong, monkeypatch):
    options = program.models.our_options
    monkeypatch.setattr(program.models, "our_options", lambda case, put: options(case, put) | wrong)
    figures = program.measure(small(program.cases["Gemma 2, 1024"]), "numpy", "ours")
    assert figures["wrong"]
    assert "seconds" not in figures


def test_the_window_of_gpt_oss(program):
    """Of 128 keys, its own among them, as the mask of Transformers has it."""
    seen = program.models.visible(program.cases["gpt-oss, 1024"], np.arange(300))
    assert seen.sum(axis=-1).max() == 128
    assert seen[200].nonzero()[0].tolist() == list(range(73, 201))
