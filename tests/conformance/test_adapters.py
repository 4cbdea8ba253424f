"""Attentions of other libraries are certified, each with what it declares and nothing else."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache

import numpy as np
import pytest
import torch

from anyattention_conformance import claims, suite, targets
from anyattention_conformance.adapters import ADAPTERS, FOLDER, layouts, torch_flex, torch_sdpa
from anyattention_conformance.claims import Difference
from anyattention_conformance.workers import Recipe, Workers

LIBRARIES = {"huggingface": "transformers"}  # where a name does not start with that of its library
SLOW = ("*jax*", "flax-*", "torch-flex")  # they compile
TAKEN_APART = ("torch-sdpa", "keras-numpy")
QUANTITIES = ("output", "error", *claims.QUANTITIES.values())


def conform(*arguments):
    command = [sys.executable, "-m", "anyattention_conformance", "conform", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def each(name):
    """The parameter of an adapter, slow where its library compiles every call."""
    return pytest.param(name, marks=[pytest.mark.slow] if any(fnmatchcase(name, x) for x in SLOW) else [])


def needs(name):
    """Skip the test where a library is not installed."""
    for part in name.split("-"):
        library = LIBRARIES.get(part, part)
        if library in ("keras", "mlx", "transformers") and importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")


@cache
def outcomes(name):
    """What an adapter did with every run of the full tier."""
    needs(name)
    adapter = ADAPTERS[name]
    workers = Workers(Recipe(targets.load, (adapter.target, adapter.framework)))
    return list(workers(suite.runs("full")))


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
    needs(name)
    done = conform(name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", TAKEN_APART)
def test_without_one_of_its_claims_it_does_not_conform(name):
    declared = read(name)
    assert judged(name, declared).conforms
    for difference in declared.differs:
        others = tuple(x for x in declared.differs if x is not difference)
        report = judged(
            name,
            replace(declared, differs=others),
            lambda run, found=difference: any(found.covers(run.case, run.dtype, x) for x in QUANTITIES),
        )
        assert report.failures, difference.because
    for word in declared.unsupported:
        others = declared.unsupported - {word}
        report = judged(name, replace(declared, unsupported=others), lambda run, word=word: word in run.case.needs)
        assert report.failures, word
    report = judged(name, replace(declared, meaning=claims.FLAX), lambda run: run.case.mask is not None)
    assert report.failures


@pytest.mark.parametrize("name", TAKEN_APART)
def test_a_claim_is_no_wider_than_what_differs(name):
    declared = read(name)
    report = judged(name, declared)
    cases = {run.case.id: run.case for run, _ in outcomes(name)}
    for difference in declared.differs:
        for pattern in difference.cases:
            alone = replace(difference, cases=(pattern,))
            for quantity in difference.quantities or ("output", "error"):
                covered = [
                    x
                    for x in report.results
                    if x.quantity == quantity and alone.covers(cases[x.case], x.dtype, quantity)
                ]
                assert {x.verdict for x in covered} <= {"differs as declared"}, (pattern, quantity)
                assert covered or not difference.quantities, (pattern, quantity)


@pytest.mark.parametrize("name", TAKEN_APART)
def test_a_claim_that_does_not_occur_is_a_problem(name):
    declared = read(name)
    wrong = Difference("never", ("plain",), quantities=("output",))
    report = judged(name, replace(declared, differs=(*declared.differs, wrong)), lambda run: run.case.id == "plain")
    assert not report.failures
    assert report.problems == ["declared, but did not occur: never"]


def test_a_file_of_claims_is_taken_apart_on_the_command_line_as_well(tmp_path):
    text = (FOLDER / "torch-sdpa.toml").read_text()
    less = tmp_path / "less.toml"
    less.write_text(re.sub(r"\[\[differs\]\]\ncases = \[\"hidden-nan-key\"\]\n(.+\n)+", "", text))
    assert less.read_text() != text
    assert conform("torch-sdpa", "--only", "hidden-nan-key").returncode == 0
    done = conform("torch-sdpa", "--only", "hidden-nan-key", "--claims", less)
    assert done.returncode == 1
    assert "BUG" in done.stdout

    more = tmp_path / "more.toml"
    more.write_text(text + '\n[[differs]]\ncases = ["plain"]\nbecause = "never"\n')
    done = conform("torch-sdpa", "--only", "plain", "--claims", more)
    assert done.returncode == 1
    assert "declared, but did not occur: never" in done.stdout


def draw(*shape):
    return torch.tensor(np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("shape", [(2, 1, 1, 3, 5), (1, 2, 2, 1, 5), (2, 1, 3, 5), (2, 3, 5), (3, 5), (5,)])
@pytest.mark.parametrize("batch", [(2, 2), (1, 2)])
def test_masks_and_biases_fit_where_several_batch_axes_become_one(shape, batch):
    query, key, value, bias = draw(*batch, 3, 2, 4), draw(*batch, 5, 2, 4), draw(*batch, 5, 2, 4), draw(*shape)
    if len(shape) == 5 and shape[0] > batch[0]:
        pytest.skip("the mask has more batches")
    for options in ({"bias": bias}, {"mask": (bias > 0) | (torch.arange(5) == 0)}):
        native = torch_sdpa.attention(query, key, value, **options)
        flat = torch_flex.attention(query, key, value, **options)
        assert flat.shape == native.shape
        torch.testing.assert_close(flat, native)


def test_layouts_that_fit_are_handed_on():
    arrays = draw(2, 3, 2, 4), draw(5, 2, 4)
    assert layouts.one_batch(*arrays) is arrays
    assert layouts.batches(arrays[0], (2,)) is arrays[0]
    assert layouts.one_batch_of_logits(arrays[0], (2,), torch.broadcast_to) is arrays[0]
    with pytest.raises(ValueError, match="four axes"):
        layouts.four_axes(draw(1, 1, 1, 1, 1))
