"""The benchmark on a CPU: a model's case asks the same of us and of Transformers, and a wrong answer gets no time."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("transformers")

from benchmarks import models, worker
from benchmarks.cases import CASES, CONTESTANTS, Case

pytestmark = pytest.mark.needs("torch", "jax", "transformers")
MODELS = [case for case in CASES if case.of_model]


def small(case: Case) -> Case:
    return replace(case, q_length=160, depth=16, heads=4, kv_heads=2)


def test_models_have_cases():
    assert {(case.kind, case.gradient) for case in MODELS} == {(m, g) for m in models.WINDOW for g in (False, True)}


@pytest.mark.parametrize("case", [case for case in MODELS if case.q_length == 1024], ids=lambda case: case.name)
def test_everyone_who_has_a_model_is_right(case, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 0.0)
    found = {name: worker.measure(small(case), *who) for name, who in CONTESTANTS.items() if who[0] != "jax"}
    assert {name for name, figures in found.items() if "seconds" in figures} == {
        "anyattention, NumPy",
        "anyattention, PyTorch",
        "Transformers eager",
    }


@pytest.mark.parametrize("wrong", [{"logits_soft_cap": 40.0}, {"scale": 0.3}, {"mask": None}])
def test_a_wrong_answer_gets_no_time(wrong, monkeypatch):
    options = models.our_options
    monkeypatch.setattr(models, "our_options", lambda case, put: options(case, put) | wrong)
    case = small(next(case for case in MODELS if case.kind == "Gemma 2" and not case.gradient))
    figures = worker.measure(case, "numpy", "ours")
    assert figures["wrong"]
    assert "seconds" not in figures


def test_the_window_of_gpt_oss():
    """Of 128 keys, its own among them, as the mask of Transformers has it."""
    seen = models.visible(MODELS[-1], np.arange(300))
    assert seen.sum(axis=-1).max() == 128
    assert seen[200].nonzero()[0].tolist() == list(range(73, 201))
