"""`--libraries` selects the tests for the libraries that one has: each other one is counted, none passes unseen."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = '''
"""
>>> import torch
"""
from functools import partial
import numpy as np
import pytest
import torch
from torch.nn import Module

MAKE = {"numpy": np.ones, "torch": torch.ones}

class Net(Module):
    weight = torch.ones(2)[0] * 3 > 2

def through_a_helper():
    return [torch.ones(x) for x in (1, 2)]

@pytest.fixture
def put():
    return torch.asarray

@pytest.mark.parametrize("make", [*MAKE.values(), partial(torch.linspace, 1, 1)], ids=["numpy", "torch", "partial"])
def test_value(make): assert make(2).sum() == 2

@pytest.mark.parametrize("name", MAKE)
def test_name(name): assert MAKE[name](2).sum() == 2

@pytest.mark.parametrize("kind", ["numpy_int32", "torch_int32", "PyTorch-arrays"])
def test_kind(kind): torch.ones(2) if "orch" in kind else np.ones(2)

def test_fixture_of_libraries(library): assert library.get(library.put(np.ones(2))).sum() == 2
def test_no_library(): pass
def test_helper(): through_a_helper()
def test_class(): Net()
def test_fixture(put): put(2)
def test_import(): import torch.nn
def test_script(): exec("import sys, torch")
@pytest.mark.needs("torch")
def test_marked(): exec("im" + "port torch")
'''
UNMARKED = """
import pytest, torch
@pytest.mark.parametrize("name", ["numpy"])
def test_unmarked(name): torch.ones(2)
"""


@pytest.fixture
def suite(tmp_path):
    """A run of a suite with this one's conftest.py."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)

    def run(sample, *options):
        (tmp_path / "test_sample.py").write_text(sample)
        (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --doctest-modules --import-mode=importlib\n")
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done, set(re.findall(r"(?:::(\S+) PASSED|PASSED \S+::(\S+))", done.stdout))

    return run


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["one process", "two"])
def test_others_are_deselected_and_counted(suite, options):
    done, passed = suite(SAMPLE, "--libraries", "numpy", *options)
    assert done.returncode == 0, done.stdout
    names = {first or second for first, second in passed}
    whole = {"test_no_library", "test_kind[numpy_int32]"}
    assert names == {f"test_{x}[numpy]" for x in ("value", "name", "fixture_of_libraries")} | whole
    assert "deselected: 13 tests that need torch" in done.stdout
    assert "deselected: 1 tests that need jax" in done.stdout


@pytest.mark.needs("jax", "torch")
@pytest.mark.parametrize("options", [[], ["--libraries", "numpy,torch,jax"]], ids=["default", "all named"])
def test_with_all_libraries_all_run(suite, options):
    done, passed = suite(SAMPLE, *options)
    assert done.returncode == 0, done.stdout
    assert len(passed) == 19
    assert "deselected" not in done.stdout


def test_a_test_that_hides_what_it_needs_fails(suite):
    done, _ = suite(UNMARKED, "--libraries", "numpy")
    assert done.returncode == 1
    assert "a selected test uses torch: mark it with pytest.mark.needs" in done.stdout


def test_a_library_that_is_named_must_be_there(suite, tmp_path):
    done, _ = suite(SAMPLE, "--libraries", "numpy,pytorch")
    assert (done.returncode, "'pytorch' is not one of numpy, jax, torch" in done.stderr) == (4, True)
    (hide := tmp_path / "conftest.py").write_text(f"import sys; sys.modules['mlx'] = None\n{hide.read_text()}")
    done, _ = suite(SAMPLE, "--libraries", "numpy,mlx")
    assert (done.returncode, "mlx is not installed: install it, or leave it out" in done.stderr) == (4, True)
