"""Each way to install holds all three packages: editable, wheel, and wheel from sdist."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import anyattention

ROOT = Path(__file__).parents[1]
PACKAGES = ("anyattention", "anyattention_backends", "anyattention_conformance")
BUILD = [sys.executable, "-m", "build", "--no-isolation"]
EDITABLE = [sys.executable, "-c", "import sys, hatchling.build as hatch; hatch.build_editable(sys.argv[2])"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "home"),
    [([*BUILD, "--wheel"], None), (BUILD, None), (EDITABLE, ROOT)],
    ids=["wheel", "wheel from sdist", "editable"],
)
def test_installed(tmp_path, build, home):
    source = [] if build is EDITABLE else [str(ROOT)]
    subprocess.run([*build, "--outdir", str(tmp_path), *source], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    ours = [str(ROOT / name) for name in ("src", "backends", "conformance")]  # where this very environment has them
    code = f"import site, sys; sys.path[:] = [path for path in sys.path if path not in {ours}]\n"
    code += f"site.addsitedir({str(site)!r})\nimport numpy as np, {', '.join(PACKAGES)}\n"
    code += "x = np.ones((2, 1, 4), np.float32)\nprint(anyattention.dot_product_attention(x, x, x).sum())\n"
    code += "from anyattention_conformance import Golden, adapters, claims, report_html\n"
    code += "print(len(Golden().about['runs']) and report_html.to_html([])[:15])\n"
    code += "claims.read(adapters.FOLDER / 'torch-sdpa.toml')\n"
    code += f"for package in ({', '.join(PACKAGES)}): print(package.__file__)"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    total, page, *files = done.stdout.splitlines()
    assert float(total) == 8.0
    assert page.lower() == "<!doctype html>"
    for file in map(Path, files):
        assert file.is_relative_to(home or site)
        assert (file.parent / "py.typed").exists()


@pytest.mark.slow
def test_requirements(tmp_path):
    subprocess.run([*BUILD, "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
    required = re.findall(r"^Requires-Dist: ([\w-]+)((?!.*extra ==).*)$", metadata, flags=re.MULTILINE)
    assert sorted(name for name, _ in required) == ["array-api-compat", "numpy", "threadpoolctl"]
    assert {"jax", "torch", "demo", "test", "all"} <= set(re.findall(r"Provides-Extra: (\w+)", metadata))
    assert "Requires-Python: >=3.11" in metadata
    assert f"\nVersion: {anyattention.__version__}\n" in metadata
    assert "torch==2.13.0" in metadata
