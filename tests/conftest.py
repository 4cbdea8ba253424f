"""The libraries under test: how to take arrays to and from them, and which tests `--libraries` selects."""

import builtins
import dis
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from inspect import getclosurevars
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest

ARRAY_LIBRARIES = ("numpy", "jax", "torch", "mlx", "dask", "ndonnx", "array_api_strict")
COMPANIONS = (  # packages that tests need beside an array library: chosen wherever they are installed
    *("flax", "ml_dtypes", "tokamax", "keras", "transformers", "onnxruntime", "safetensors", "tokenizers"),
    *("rich", "jinja2", "PIL", "matplotlib", "build", "hatchling", "packaging", "yaml", "mypy", "pyright"),
    "flatbuffers",
    "equinox",
    "onnxscript",
    "distributed",
)
PACKAGES = {*ARRAY_LIBRARIES, *COMPANIONS}
OURS = str(Path(__file__).parent)  # the tests
LAZY = ("anyattention_backends.", "anyattention.integrations")  # whose files import the package that they are for


@dataclass(frozen=True)
class Library:
    """A library, with arrays to it from NumPy and back."""

    name: str
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]

    @property
    def array_type(self) -> type:
        return type(self.put(np.zeros(1, np.float32)))

    def put_all(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self.put(x) if isinstance(x, np.ndarray) and name != "dropout_rng" else x
            for name, x in arguments.items()
        }


def _to_jax(x: np.ndarray) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(x)


def _to_torch(x: np.ndarray) -> Any:
    import torch

    if x.dtype.name == "bfloat16":
        return torch.tensor(x.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(x)


def _from_torch(x: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    if x.dtype == torch.bfloat16:
        return x.float().numpy().astype(ml_dtypes.bfloat16)
    return x.detach().numpy()


NUMPY = Library("numpy", lambda x: x, lambda x: x)
JAX = Library("jax", _to_jax, np.asarray)
TORCH = Library("torch", _to_torch, _from_torch)


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
def gpu_with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU with cuDNN and without tokamax, for choosing alone."""
    from anyattention_backends.jax import backend

    cudnn, tokamax, _ = backend.engines
    monkeypatch.setattr(backend.arrays, "platform", lambda x: "gpu")
    monkeypatch.setitem(vars(cudnn), "absent", "")
    monkeypatch.setitem(vars(cudnn), "most_depth", 256)
    monkeypatch.setitem(vars(tokamax), "absent", "tokamax is not installed: pip install 'anyattention[tokamax]'")


@pytest.fixture
def run_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Runs the Python examples of a Markdown file in order, all in one namespace.

    A block of ``text`` right after one of ``python`` is what the example prints. One with a title is a file, which the
    page runs itself.
    """

    def run(page: Path) -> None:
        text, module = page.read_text(), ModuleType("example")
        monkeypatch.setitem(sys.modules, "example", module)  # PyTorch's compiler imports the module of a function
        blocks = re.finditer(r"^( *)```python\n(.*?)^ *```\n(?:\n *```text\n(.*?)^ *```\n)?", text, re.M | re.S)
        for indent, code, printed in (block.groups() for block in blocks):
            line = "\n" * text[: text.index(code)].count("\n")  # so that errors tell the line of the page
            exec(compile(line + textwrap.dedent(code), str(page), "exec"), vars(module))
            found = capsys.readouterr().out
            if printed is not None:
                assert found == textwrap.dedent(printed), f"{page.name}: {indent}{code}"

    return run


# `--libraries numpy,jax`: test files import what is not chosen as an `Absent`. A test is deselected, and counted, if
# its parameters, its code, or the code of its helpers and fixtures reach an `Absent` or an import of such a package.
# Where a parameter names an array library, code may have branches for others: there only parameters tell which it is.
# `@pytest.mark.needs("torch")` says what code does not show, for example the needs of a file that a test executes.


class Absent:
    """A package that is not chosen, and whatever test files read from it or make with it while they are imported."""

    in_use = True  # until all files are imported

    def __init__(self, package: str) -> None:
        self.package = package

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return self()

    def __call__(self, *args: Any, **kwargs: Any) -> "Absent":
        if not Absent.in_use:
            raise AssertionError(f"a selected test uses {self.package}: mark it with pytest.mark.needs")
        return self

    __getitem__ = __setitem__ = __eq__ = __ne__ = __gt__ = __lt__ = __ge__ = __le__ = __or__ = __and__ = __call__
    __add__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __floordiv__ = __mod__ = __neg__ = __invert__ = __call__
    __hash__ = object.__hash__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--libraries",
        metavar="NAMES",
        help=f"run only the tests for these array libraries, of {', '.join(ARRAY_LIBRARIES)}; default: all",
    )


IMPORT = builtins.__import__
ABSENT, COUNTS = pytest.StashKey[Collection[str]](), pytest.StashKey[Counter]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*packages): packages that the test needs and that its code does not name")
    option = config.getoption("--libraries")
    absent = set() if option is None else _absent({"numpy", *option.replace(",", " ").split()})
    config.stash[ABSENT], config.stash[COUNTS] = absent, Counter()

    def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        package, importer = name.partition(".")[0], str((globals or {}).get("__file__"))
        if package in absent and not level and importer.startswith(OURS):
            return Absent(package)
        try:
            return IMPORT(name, globals, locals, fromlist, level)
        except ModuleNotFoundError as error:
            if error.name in absent and name.startswith(LAZY):  # of the package
                return Absent(error.name)
            raise

    if absent:
        builtins.__import__ = imported


def pytest_collection_finish() -> None:
    builtins.__import__, Absent.in_use = IMPORT, False


def _absent(chosen: Collection[str]) -> Collection[str]:
    for name in sorted(chosen):
        if name not in ARRAY_LIBRARIES:
            raise pytest.UsageError(f"--libraries: {name!r} is not one of {', '.join(ARRAY_LIBRARIES)}")
        if find_spec(name) is None:
            raise pytest.UsageError(f"--libraries: {name} is not installed: install it, or leave it out")
    absent = {x for x in ARRAY_LIBRARIES if x not in chosen} | {x for x in COMPANIONS if find_spec(x) is None}
    return absent | ({"flax"} if "jax" in absent else set())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = config.stash[ABSENT]
    wanting = {item: needs for item in items if absent and (needs := sorted(absent & _item_needs(item)))}
    config.stash[COUNTS].update(needs[0] for needs in wanting.values())
    config.hook.pytest_deselected(items=list(wanting))
    items[:] = [item for item in items if item not in wanting]


def _item_needs(item: Any) -> set[str]:
    marked = {package for mark in item.iter_markers("needs") for package in mark.args}
    marked |= {library for library in ARRAY_LIBRARIES if item.path.name.startswith(f"test_{library}")}
    if isinstance(item, pytest.DoctestItem):
        return marked | _needs([example.source for example in item.dtest.examples])
    params = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    texts = " ".join(x for x in params if isinstance(x, str)).lower().replace("pytorch", "torch")
    words = {*re.findall("[a-z_0-9]+", texts), *re.findall("[a-z]+", texts)}
    named = words & PACKAGES | ({"ml_dtypes"} if "bfloat16" in words else set())
    fixtures = [x.func for found in item._fixtureinfo.name2fixturedefs.values() for x in found]
    reached = set().union(*map(_function_needs, (item.function, *fixtures)))
    if named & {*ARRAY_LIBRARIES}:
        reached -= {*ARRAY_LIBRARIES}
    return marked | named | reached | _needs(params)


@cache
def _function_needs(function: Callable[..., Any]) -> set[str]:
    return _needs([function])


def _needs(things: list[Any]) -> set[str]:
    """The packages that objects of test files reach."""
    packages: set[str] = set()
    seen: dict[int, Any] = {}
    while things:
        thing = things.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing  # which keeps it, and so its id
            found, inner = _look(thing)
            packages |= found & PACKAGES
            things += inner
    return packages


def _look(thing: Any) -> tuple[set[str], Collection[Any]]:
    """The packages that an object names, and the objects that it uses."""
    if isinstance(thing, Absent):
        return {thing.package}, ()
    if isinstance(thing, Path):  # a page of documentation, or a script
        return set(), [thing.read_text()] if thing.is_file() and thing.suffix in (".md", ".py") else []
    if isinstance(thing, str):  # a script
        return set(re.findall(r"\w+", " ".join(re.findall(r"\b(?:import|from) ([^\n;]*)", thing)))), ()
    if isinstance(thing, dict):
        return set(), (*thing, *thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return set(), thing
    if isinstance(thing, partial):
        return set(), (thing.func, thing.args, thing.keywords)
    module = str(getattr(thing if callable(thing) else type(thing), "__module__", ""))
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    tests = file.startswith(OURS) and file != __file__
    if isinstance(thing, FunctionType) and (tests or module.startswith("anyattention_conformance.")):
        names, texts, packages = _code(thing.__code__)
        reached = [thing.__globals__[name] for name in names if name in thing.__globals__]
        return packages, (*texts, *reached, getclosurevars(thing).nonlocals)
    if not isinstance(thing, FunctionType | ModuleType) and (tests or module.startswith("anyattention")):
        return set(), (*getattr(thing, "__dict__", {}).values(), type(thing))
    return set(), ()


@cache
def _code(code: CodeType) -> tuple[set[str], set[str], set[str]]:
    """The global names and texts of code, and the packages that it imports."""
    steps = list(dis.get_instructions(code))
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    texts = {x for x in code.co_consts if isinstance(x, str)}
    packages = {step.argval.partition(".")[0] for step in steps if step.opname == "IMPORT_NAME"}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names, texts, packages = (x | y for x, y in zip((names, texts, packages), _code(inner), strict=True))
    return names, texts, packages


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every process of pytest-xdist deselects the same; the first to end tells."""
    if not node.config.stash[COUNTS]:
        node.config.stash[COUNTS].update(getattr(node, "workeroutput", {}).get("deselected", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = dict(session.config.stash[COUNTS])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for package, count in sorted(config.stash[COUNTS].items()):
        terminalreporter.write_line(f"deselected: {count} tests that need {package}, which is not chosen or not here")
