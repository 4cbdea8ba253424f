"""Attentions of other libraries are certified, each with what it declares and nothing else."""

import re
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache

import numpy as np
import pytest

from anyattention_conformance import claims, suite, targets
from anyattention_conformance.adapters import ADAPTERS, FOLDER, layouts
from anyattention_conformance.claims import Difference
from anyattention_conformance.workers import Recipe, Workers

SLOW = ("*jax*", "flax-*", "torch-flex")  # they compile
TAKEN_APART = ("keras-numpy", "mlx-fast")  # they are the fastest
QUANTITIES = ("output", "error", *claims.QUANTITIES.values())


def conform(*arguments):
    command = [sys.executable, "-m", "anyattention_conformance", "conform", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def each(name):
    """The parameter of an adapter, slow where its library compiles every call."""
    marks = [pytest.mark.needs("torch", "transformers")] if name.startswith("huggingface") else []
    return pytest.param(name, marks=marks + [pytest.mark.slow] * any(fnmatchcase(name, x) for x in SLOW))


@cache
def outcomes(name):
    """What an adapter did with every run of the full tier."""
    adapter = ADAPTERS[name]
    workers = Workers(Recipe(targets.load, (adapter.target, adapter.framework)))
    return list(workers(suite.runs("full", supports=read(name).supports)))


def judged(name, declared, of=lambda run: True):
    """The report on those of the runs, by these claims."""
    chosen = [(run, outcome) for run, outcome in outcomes(name) if of(run)]
    framework = ADAPTERS[name].framework
    return suite.certify(name, framework, chosen, [run for run, _ in chosen], claims=declared, tier="full")


def read(name):
    return claims.read(FOLDER / f"{name}.toml")


def test_every_adapter_has_claims_and_every_file_an_adapter():
    assert {path.stem for path in FOLDER.glob("*.toml")} == {*ADAPTERS, "anyattention"}


@pytest.mark.parametrize("name", [each(name) for name in ADAPTERS])
def test_it_conforms(name):
    done = conform(name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", TAKEN_APART)
def test_without_one_of_its_claims_it_does_not_conform(name):
    declared = read(name)
    for difference in declared.differs:
        less = replace(declared, differs=tuple(x for x in declared.differs if x is not difference))
        assert judged(name, less, lambda run, x=difference: any(x.covers(*run[:2], q) for q in QUANTITIES)).failures
    for word in declared.unsupported:
        less = replace(declared, unsupported=declared.unsupported - {word})
        assert judged(name, less, lambda run, word=word: declared.refused(*run[:2]) == {word}).failures, word


@pytest.mark.needs("keras")
def test_without_its_meaning_it_does_not_conform():
    less = replace(read("keras-numpy"), meaning=claims.FLAX)
    assert judged("keras-numpy", less, lambda run: run.case.group == "fill").failures


@pytest.mark.parametrize("name", TAKEN_APART)
def test_a_claim_is_no_wider_than_what_differs(name):
    declared = read(name)
    report = judged(name, declared)
    assert report.conforms
    cases = {run.case.id: run.case for run, _ in outcomes(name)}
    for difference in declared.differs:
        for pattern in difference.cases:
            alone = replace(difference, cases=(pattern,))
            covered = {x.verdict for x in report.results if alone.covers(cases[x.case], x.dtype, x.quantity)}
            assert covered == {"differs as declared"}, pattern


@pytest.mark.parametrize("name", TAKEN_APART)
def test_a_claim_that_does_not_occur_is_a_problem(name):
    declared = read(name)
    wrong = Difference("never", ("plain",), quantities=("output",))
    report = judged(name, replace(declared, differs=(*declared.differs, wrong)), lambda run: run.case.id == "plain")
    assert not report.failures
    assert report.problems == ["declared, but did not occur: plain: never"]


@pytest.mark.needs("mlx")
def test_a_claim_removed_or_added_fails_on_the_command_line_as_well(tmp_path):
    text = (FOLDER / "mlx-fast.toml").read_text()
    less, more = tmp_path / "less.toml", tmp_path / "more.toml"
    less.write_text(re.sub(r"\[\[differs\]\]\ncases = \[\"hidden-nan-value\".*\n(.+\n)+", "", text))
    more.write_text(text + '\n[[differs]]\ncases = ["plain"]\nbecause = "never"\n')
    assert less.read_text() != text
    assert conform("mlx-fast", "--only", "hidden-nan-value").returncode == 0
    done = conform("mlx-fast", "--only", "hidden-nan-value", "--claims", less)
    assert (done.returncode, "BUG" in done.stdout) == (1, True)
    done = conform("mlx-fast", "--only", "plain", "--claims", more)
    assert (done.returncode, "declared, but did not occur: plain: never" in done.stdout) == (1, True)


@pytest.mark.parametrize("shape", [(2, 1, 1, 3, 5), (1, 2, 2, 1, 5), (1, 2, 1, 1, 1), (2, 1, 3, 5), (2, 3, 5), (5,)])
def test_a_mask_fits_where_several_batch_axes_become_one(shape):
    mask = np.random.default_rng(0).random(shape)
    found = layouts.one_batch_of_logits(mask, (2, 2), np.broadcast_to)
    expected = np.broadcast_to(mask, (2, 2, 2, 3, 5)).reshape(4, 2, 3, 5)
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


def test_several_batch_axes_become_one_and_come_back():
    x = np.random.default_rng(0).random((2, 3, 5, 2, 4))
    (found,) = layouts.one_batch(x)
    assert found.shape == (6, 5, 2, 4)
    np.testing.assert_array_equal(layouts.batches(found, (2, 3)), x)
    (found,) = layouts.one_batch(x[0, 0])
    assert found.shape == (1, 5, 2, 4)
    assert layouts.batches(found, ()).shape == (5, 2, 4)


def test_what_fits_is_handed_on():
    x = np.zeros((2, 5, 2, 4))
    assert layouts.one_batch(x, x[0])[1].ndim == 3
    assert layouts.batches(x, (2,)) is x
    assert layouts.one_batch_of_logits(x, (2,), np.broadcast_to) is x


def test_what_a_library_would_take_for_something_else_is_refused():
    x = np.zeros((1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="four axes"):
        layouts.four_axes(x)
    with pytest.raises(TypeError, match="pass a boolean one"):
        layouts.masks_only(x)
    with pytest.raises(TypeError, match="pass one of numbers"):
        layouts.adds_only(x > 0)
    assert layouts.masks_only(x > 0) is not None
    assert layouts.adds_only(x) is x
