"""An example is run as a stranger runs it, and imported to look at its functions."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def load():
    """Import an example by its file's name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def printed():
    """What an example prints to a terminal, where it ends well and has nothing to complain of."""

    def printed(name):
        command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return printed
