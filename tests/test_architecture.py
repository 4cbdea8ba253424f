"""The architecture, held: which module may import which, and what an import brings in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {  # module: what it may import of the package
    "__init__": {"api", "errors", "masks", "plan", "random", "settings"},
    "api": {"attention", "backend", "dispatch", "engine", "errors", "layout", "masks", "plan", "request", "settings"},
    "attention": {"backend", "request"},
    "backend": {"blocks", "dtypes", "random"},
    "blocks": set(),
    "dispatch": {"backend"},
    "dtypes": set(),
    "engine": {"backend", "masks", "request", "settings"},
    "errors": set(),
    "layout": {"backend", "blocks", "dtypes", "masks", "random", "request", "tiled"},
    "masks": {"backend", "dispatch", "dtypes", "errors"},
    "partials": {"backend"},
    "plan": {"settings"},
    "random": {"dtypes"},
    "request": set(),
    "settings": set(),
    "structure": {"masks"},
    "tiled": {"backend", "blocks", "masks", "partials", "random"},
}
BELOW = {"backend", "blocks", "dtypes", "engine", "masks", "request", "structure"}  # what backends may import
PARTS = {  # modules that are part of a backend
    ("numpy", "anyattention_backends", "threads"),
    ("jax", "anyattention_backends.jax_cudnn", "CuDNN"),
    ("jax", "anyattention_backends.jax_splash", "Splash"),
    ("jax", "anyattention_backends.jax_tokamax", "Tokamax"),
    ("jax_cudnn", "anyattention_backends.jax_kernel", "Kernel"),
    ("jax_cudnn", "anyattention_backends.jax_kernel", "plain"),
    ("jax_cudnn", "anyattention_backends.jax_once", "alike"),
    ("jax_kernel", "anyattention_backends.jax_once", "once"),
    ("jax_splash", "anyattention_backends.jax_kernel", "Kernel"),
    ("jax_tokamax", "anyattention_backends.jax_kernel", "Kernel"),
    ("jax_tokamax", "anyattention_backends.jax_kernel", "plain"),
    ("mlx", "anyattention_backends.mlx_sdpa", "MLXFast"),
    ("torch", "anyattention_backends.torch_flex", "Flex"),
    ("mlx", "anyattention_backends.mlx_sdpa", "MLXFast"),
    ("torch", "anyattention_backends.torch_flex", "Flex"),
    ("torch", "anyattention_backends.torch_sdpa", "SDPA"),
    ("torch_flex", "anyattention_backends.torch_sdpa", "Kernel"),
    ("torch_flex", "anyattention_backends.torch_sdpa", "Kernel"),
}
FRAMEWORKS = {"jax", "flax", "torch", "dask", "mlx", "ndonnx", "numpy", "ml_dtypes", "array_api_strict"}


def imported(path):
    """(module, name) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "src/anyattention").glob("*.py")), ids=lambda path: path.stem)
def test_source_imports_only_what_lies_below(path):
    for module, name in imported(path):
        root, _, inner = module.partition(".")
        assert root not in FRAMEWORKS, f"{path.name} imports {module}"
        if root == "anyattention":
            assert (inner or name) in LAYERS[path.stem], f"{path.name} imports {inner or name}"


@pytest.mark.parametrize("path", sorted((ROOT / "backends/anyattention_backends").glob("*.py")), ids=lambda p: p.stem)
def test_backends_do_not_know_each_other(path):
    for module, name in imported(path):
        if module.startswith("anyattention_"):
            assert (path.stem, module, name) in PARTS, f"{path.name} imports {module}"
        elif module.startswith("anyattention"):
            assert (module.partition(".")[2] or name) in BELOW


@pytest.mark.parametrize("path", sorted((ROOT / "conformance").rglob("*.py")), ids=lambda path: path.stem)
def test_conformance_uses_public_names_only(path):
    assert not [module for module, _ in imported(path) if module.startswith(("anyattention.", "anyattention_backends"))]


def frameworks_after(code):
    """The frameworks that a fresh interpreter has imported after running the code."""
    code += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & FRAMEWORKS


@pytest.mark.parametrize("package", ["anyattention", "anyattention_backends"])
def test_import_brings_in_no_framework(package):
    assert not frameworks_after(f"import {package}")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ("import numpy as np; x = np.ones((2, 1, 4), 'f4')", {"numpy"}),
        ("import torch; x = torch.ones(2, 1, 4)", {"torch", "numpy"}),
        ("import jax.numpy as jnp; x = jnp.ones((2, 1, 4))", {"jax", "numpy", "ml_dtypes"}),
        ("import array_api_strict as xp; x = xp.ones((2, 1, 4))", {"array_api_strict", "numpy"}),
    ],
    ids=["numpy", "torch", "jax", "strict"],
)
def test_use_brings_in_no_other_framework(make, expected):
    code = f"{make}\nfrom anyattention import dot_product_attention, random"
    code += "\ndot_product_attention(x, x, x, dropout_rng=random.key(0), dropout_rate=0.1)"
    assert frameworks_after(code) <= expected
