"""The architecture, held: which module may import which, and what an import brings in."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"anyattention": ROOT / "src", "anyattention_backends": ROOT / "backends"}
FILES = {
    ".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__"): path
    for name, home in HOMES.items()
    for path in sorted((home / name).rglob("*.py"))
}
ENGINES = ("jax.cudnn", "jax.tokamax", "jax.splash", "torch.sdpa", "torch.flex", "mlx.sdpa", "ndonnx.attention")
FRAMEWORKS = {"jax", "flax", "torch", "dask", "mlx", "ndonnx", "numpy", "ml_dtypes", "array_api_strict"}
# What an integration may import; of Hugging Face's its private files alone.
SERVED = {"_huggingface": {"torch", "transformers"}, "keras": {"keras"}, "equinox": {"equinox", "jax"}}


def imported(path):
    """The module of every import in a file, lazy ones too; of ``from package import module`` the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module


GRAPH = {name: {module for module in imported(path) if module in FILES} for name, path in FILES.items()}


def test_no_circle():
    """No file imports, at whatever distance and however late, one that imports it."""
    order = list(TopologicalSorter(GRAPH).static_order())
    assert len(order) == len(FILES) > 40


def test_the_registry_alone_imports_backends():
    importers = {name for name, modules in GRAPH.items() if any(x.startswith("anyattention_backends") for x in modules)}
    assert {name for name in importers if name.startswith("anyattention.")} == {"anyattention._src.registry"}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("anyattention.")])
def test_source_imports_no_framework(name):
    """But for an integration, the framework that it serves."""
    home, _, file = name.rpartition(".")
    kind = "_huggingface" if file.startswith("_huggingface_") else file
    served = SERVED.get(kind, set()) if home == "anyattention.integrations" else set()
    frameworks = FRAMEWORKS.union(*SERVED.values()) - served
    assert not {module.partition(".")[0] for module in imported(FILES[name])} & frameworks


def test_nothing_imports_an_integration():
    """But for the package itself, whose public modules import nothing of a framework before they are called."""
    inside = "anyattention.integrations"
    importers = {name for name, modules in GRAPH.items() if any(x.startswith(inside) for x in modules)}
    assert {name for name in importers if not name.startswith(inside)} == {"anyattention"}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("anyattention_backends.")])
def test_libraries_do_not_know_each_other(name):
    library = name.split(".")[1]
    others = {x for x in GRAPH[name] if x.startswith("anyattention_backends") and x.split(".")[1] != library}
    assert not others


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_needs_what_is_public(engine):
    """Its file is short, and imports what a third party's may, and its library's own folder."""
    name = f"anyattention_backends.{engine}"
    own = name.rpartition(".")[0]
    assert {x for x in GRAPH[name] if not x.startswith(own)} <= {"anyattention.extend"}
    assert len(FILES[name].read_text().splitlines()) <= 100


@pytest.mark.parametrize("name", FILES)
def test_files_and_classes_are_small(name):
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert sum(isinstance(x, ast.FunctionDef) for x in node.body) <= 20, node.name


def test_public_names_only():
    import anyattention

    public = {name for name in dir(anyattention) if not name.startswith("_")}
    assert public == set(anyattention.__all__)
    modules = anyattention.masks, anyattention.biases, anyattention.random, anyattention.partials, anyattention.extend
    for module in (*modules, anyattention.integrations, anyattention.integrations.huggingface):
        names = {name for name in dir(module) if not name.startswith("_")} - {"keras", "equinox"}  # once imported
        assert names == set(module.__all__)


@pytest.mark.parametrize("path", sorted((ROOT / "conformance").rglob("*.py")), ids=lambda path: path.stem)
def test_conformance_uses_public_names_only(path):
    assert not [module for module in imported(path) if module.startswith(("anyattention.", "anyattention_backends"))]


def frameworks_after(code):
    """The frameworks that a fresh interpreter has imported after running the code."""
    code += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & FRAMEWORKS.union(*SERVED.values())


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
