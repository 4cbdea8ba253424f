"""The libraries under test, and how to take arrays to and from them."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch


@dataclass(frozen=True)
class Library:
    """A library, with arrays to it from NumPy and back."""

    name: str
    array_type: type
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]

    def put_all(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self.put(x) if isinstance(x, np.ndarray) and name != "dropout_rng" else x
            for name, x in arguments.items()
        }


def _to_torch(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.tensor(x.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(x)


def _from_torch(x: torch.Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.float().numpy().astype(ml_dtypes.bfloat16)
    return x.detach().numpy()


NUMPY = Library("numpy", np.ndarray, lambda x: x, lambda x: x)
JAX = Library("jax", jnp.ndarray, jnp.asarray, np.asarray)
TORCH = Library("torch", torch.Tensor, _to_torch, _from_torch)


LIBRARIES = {library.name: library for library in (NUMPY, JAX, TORCH)}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]


@pytest.fixture(scope="module")
def on_four_devices() -> Callable[[str], Any]:
    """What a script prints as JSON in a process in which JAX has four virtual devices; an abort there fails here."""
    return _on_four_devices


def _on_four_devices(script: str) -> Any:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture
def run_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Runs the Python examples of a Markdown file in order, all in one namespace.

    A block of ``text`` right after one of ``python`` is what the example prints.
    """

    def run(page: Path) -> None:
        text, module = page.read_text(), ModuleType("example")
        monkeypatch.setitem(sys.modules, "example", module)  # PyTorch's compiler imports the module of a function
        blocks = re.finditer(r"^( *)```python.*?\n(.*?)^ *```\n(?:\n *```text\n(.*?)^ *```\n)?", text, re.M | re.S)
        for indent, code, printed in (block.groups() for block in blocks):
            line = "\n" * text[: text.index(code)].count("\n")  # so that errors tell the line of the page
            exec(compile(line + textwrap.dedent(code), str(page), "exec"), vars(module))
            found = capsys.readouterr().out
            if printed is not None:
                assert found == textwrap.dedent(printed), f"{page.name}: {indent}{code}"

    return run
