"""Keras' layers with our attention, and our function with the arguments of Keras', on three backends of Keras."""

import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "keras_answers.py"
EPS = {"float16": 2.0**-10}


@cache
def answers(backend, folder):
    """Pairs of what Keras and our layers give, from a process of its own."""
    file = folder / f"{backend}.pickle"
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # which take half of the time
    command = [sys.executable, SCRIPT, backend, file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert not done.returncode, done.stderr[-3000:]
    return pickle.loads(file.read_bytes())


@pytest.mark.needs("keras")
@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"])
def test_keras(backend, tmp_path_factory):
    found = answers(backend, tmp_path_factory.getbasetemp())
    assert len(found) > 20
    for name, (theirs, ours) in found.items():
        assert len(theirs) == len(ours), name
        unit = max(1.0, *(np.abs(x).max() for x in theirs))
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, atol=unit * 4 * EPS.get(name, 1e-6), err_msg=name)
