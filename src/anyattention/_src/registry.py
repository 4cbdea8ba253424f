"""From arrays to the backend of their library: the one room that knows which libraries and implementations there are.

No library is imported before an array of it is seen. query, key and value decide. NumPy arrays, Python scalars and
lists are guests of any other library for bias, mask and dropout key, and for query, key and value beside JAX, as in
Flax. Two other libraries in one call are an error.

Other packages add a library by an entry point of the group ``anyattention.backends``, whose name is the root module of
the array type, and an engine by one of the group ``anyattention.implementations``, whose name is "library.engine".
"""

import sys
from functools import cache
from importlib import metadata
from typing import Any

import array_api_compat

from anyattention._src.implementations.base import Broken, Implementation
from anyattention._src.implementations.exact import Exact
from anyattention._src.implementations.tiled import TILED
from anyattention._src.interfaces import Backend
from anyattention._src.later import when_imported
from anyattention._src.rules import ByRule
from anyattention._src.shards import Home

Array = Any
#: The project's own engines, each a vendor's kernel for "fused".
ENGINES = ("cudnn", "tokamax", "splash", "sdpa", "flex", "mlx", "onnx")
EXACT = Exact()
#: The root modules of the array types of the project's own libraries.
LIBRARIES = ("numpy", "jax", "jaxlib", "torch", "mlx", "ndonnx", "dask")
_BY_TYPE: dict[type, Backend | None] = dict.fromkeys((type(None), bool, int, float, complex, list, tuple))


def backend_of(x: Any, name: str = "an argument") -> Backend | None:
    """The backend of an array's library; None for what has no library: None, Python scalars, lists and tuples.

    Raises:
        TypeError: something that is no array, with the argument's name.
    """
    kind = type(x)
    if kind not in _BY_TYPE:
        _BY_TYPE[kind] = _find(x, name)
    return _BY_TYPE[kind]


def load(library: str) -> Backend:
    """The backend of a library of the project's own.

    Import statements, since torch.compile traces those, and since a checkout that is not installed has no entry points.
    """
    if library == "torch":
        from anyattention_backends.torch import backend

        for kind in backend.arrays.guests:  # torch.compile cannot take the names of these types apart, as `_find` does
            _BY_TYPE.setdefault(kind, load("numpy"))
    elif library in ("jax", "jaxlib"):
        from anyattention_backends.jax import backend
    elif library == "mlx":
        from anyattention_backends.mlx import backend
    elif library == "ndonnx":
        from anyattention_backends.ndonnx import backend
    elif library == "dask":
        from anyattention_backends.dask import backend
    else:
        from anyattention_backends.numpy import backend
    return backend


def _find(x: Any, name: str) -> Backend:
    if isinstance(x, type):
        raise TypeError(f"{name} is the class {x.__name__} itself: pass an instance, as {x.__name__}(...) makes it")
    if isinstance(x, ByRule):
        raise TypeError(f"{name} must be an array, got the {x.kind} by rule {x}: pass it as {x.kind}")
    roots = _roots(type(x))
    for root in roots:
        if root in LIBRARIES:
            return load(root)
        for entry in metadata.entry_points(group="anyattention.backends", name=root):
            return _backend_elsewhere(entry)
    if hasattr(type(x), "__jax_array__"):
        return load("jax")
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    try:
        xp = array_api_compat.array_namespace(x)
    except (TypeError, AttributeError):
        raise TypeError(
            f"{name}: {kind} is not an array of a library that follows the array API standard: convert it first, for "
            "example with numpy.asarray"
        ) from None
    lacking = [f"namespace.{part}" for part in _FUNCTIONS.split() if not hasattr(xp, part)]
    lacking += [part for part in _METHODS.split() if not hasattr(x, part)]
    if lacking:
        raise TypeError(
            f"{name}: {kind} has __array_namespace__, but not all of the array API standard: it lacks "
            f"{', '.join(lacking)}. Convert it first, for example with numpy.asarray"
        )
    return _standard(xp)


# Some of what attention asks of the standard, by which a namespace that is only begun is told.
_FUNCTIONS = "arange asarray astype broadcast_to exp expand_dims matmul max permute_dims reshape sum where zeros"
_METHODS = "dtype ndim shape __add__ __getitem__ __mul__ __sub__ __truediv__"


def _roots(kind: type) -> list[str]:
    """The root modules of a class and of those that it inherits from."""
    return [x.__module__.partition(".")[0] for x in kind.__mro__]


vars(_roots)["_dynamo_marked_constant"] = True  # the compiler of PyTorch 2.11 knows no names of modules


@cache
def _standard(xp: Any) -> Backend:
    """The backend of a library that has none of its own: the standard's terms alone."""
    return Backend(xp)


def _backend_elsewhere(entry: Any) -> Backend:
    """The backend of another package, or an error that names the package."""
    try:
        return entry.load()
    except Exception as error:
        package = f"the package {entry.dist.name}" if entry.dist else "a package"
        raise ImportError(
            f"{package} makes {entry.value} the backend of {entry.name} in anyattention, but that does not import "
            f"({type(error).__name__}: {error}): mend or uninstall it, or convert the arrays, for example to NumPy's"
        ) from error


@cache
def _elsewhere() -> tuple[Any, ...]:
    """The entry points of engines, read once."""
    return tuple(metadata.entry_points(group="anyattention.implementations"))


def engine_names() -> tuple[str, ...]:
    """The names of all engines, those of other packages too, none of which is imported."""
    return tuple(dict.fromkeys([*ENGINES, *(entry.name.partition(".")[2] or entry.name for entry in _elsewhere())]))


@cache
def _engines_of_packages(library: str) -> tuple[Implementation, ...]:
    """The engines that other packages have for a library; one that cannot be imported refuses, and says why."""
    found: list[Implementation] = []
    for entry in _elsewhere():
        home, _, name = entry.name.partition(".")
        if not name:
            found.append(Broken(home, f"its entry point, {entry.name!r}, names no library: call it 'library.{home}'"))
        elif home == library:
            try:
                engine = entry.load()()
                engine.name = name
                found.append(engine)
            except Exception as error:
                found.append(Broken(name, f"{entry.value} cannot be imported: {type(error).__name__}: {error}"))
    return tuple(found)


def _engines_elsewhere(library: str) -> tuple[Implementation, ...]:
    return _engines_of_packages(library)


# As `torch.compiler.assume_constant_result` marks it: torch.compile cannot trace entry points, nor caches.
vars(_engines_elsewhere)["_dynamo_marked_constant"] = True


def engines(backend: Backend) -> tuple[Implementation, ...]:
    """The engines of a library, the best first, those of other packages last."""
    return backend.engines + _engines_elsewhere(backend.name)


def named(backend: Backend, name: str, chosen: tuple[str, ...] | None = None) -> tuple[Implementation, ...]:
    """The implementations of this name: for "fused" the engines, `chosen` ones in this order."""
    if name != "fused":
        return (EXACT,) if name == "exact" else (TILED,)
    found = engines(backend)
    return found if chosen is None else tuple([x for name in chosen for x in found if x.name == name])


def backend_for(**arrays: Any) -> Backend:
    """The one backend that serves these arguments, named for the error message.

    Raises:
        TypeError: arrays of two libraries of which neither is NumPy, or NumPy query, key or value beside a
            library other than JAX.
    """
    found = None
    mixed = False
    for name, x in arrays.items():
        backend = backend_of(x, name)
        if backend is None or backend is found:
            continue
        mixed = mixed or found is not None
        if found is None or found.name == "numpy":
            found = backend
        elif backend.name != "numpy":
            raise _mixed(arrays)
    if mixed and found is not None and found.name != "jax":
        for name in ("query", "key", "value"):
            other = backend_of(arrays.get(name))
            if other is not None and other is not found:
                raise _mixed(arrays)
    return found or load("numpy")


def _mixed(arrays: dict[str, Any]) -> TypeError:
    kinds = ", ".join(
        f"{name} is {type(x).__module__.partition('.')[0]}.{type(x).__name__}"
        for name, x in arrays.items()
        if backend_of(x) is not None
    )
    return TypeError(f"arrays of different libraries in one call: {kinds}. Convert them to one library first")


def compiling() -> bool:
    """Whether torch.compile is tracing, which cannot look at everything."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.compiler.is_compiling())


def _jax_in_use() -> bool:
    """Whether JAX is imported; never within torch.compile, which cannot trace what depends on that."""
    return "jax" in sys.modules and not compiling()


def _made(kind: type) -> None:
    """Make a class of masks known to JAX's transformations; if JAX is not in use, as soon as it is."""
    if not compiling() and "jax" not in sys.modules:
        when_imported("jax", lambda: load("jax"))  # which registers all classes of masks
    if _jax_in_use():
        from anyattention_backends.jax.arrays import register

        register(kind)


def trace_under(settings: Any) -> None:
    """Let what JAX traces on this thread from now on be found again under these settings alone, if JAX is in use."""
    if _jax_in_use():
        from anyattention_backends.jax.settings import trace_under

        trace_under(settings)


ByRule._made = staticmethod(_made)
Home.backend_of = staticmethod(backend_of)  # type: ignore[assignment]
