"""The wheel holds all three packages, also when it is built from the sdist."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--wheel"], []], ids=["wheel", "wheel from sdist"])
def test_wheel(tmp_path, options):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), *options, str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for package in ("anyattention", "anyattention_backends", "anyattention_conformance"):
        assert (site / package / "py.typed").exists()
    code = (
        "import anyattention, anyattention_backends, anyattention_conformance, numpy as np;"
        "x = np.ones((2, 1, 4), np.float32);"
        f"print(anyattention.dot_product_attention(x, x, x).sum(), anyattention.__file__.startswith({str(site)!r}))"
    )
    environment = {"PYTHONPATH": str(site), "PATH": ""}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8.0", "True"]
