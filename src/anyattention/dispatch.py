"""From arrays to the backend of their library, without importing a library that is not in use.

query, key and value decide. NumPy arrays, Python scalars and lists are guests of any other library for bias, mask
and dropout key, and for query, key and value beside JAX, as in Flax. Two other libraries in one call are an error.
"""

import sys
from typing import Any

import array_api_compat

from anyattention.backend import Backend

Array = Any


def _numpy() -> Backend:
    from anyattention_backends.numpy import backend

    return backend


def _jax() -> Backend:
    from anyattention_backends.jax import backend

    return backend


def _torch() -> Backend:
    from anyattention_backends.torch import backend

    for kind in backend.guests:  # torch.compile cannot take the names of these types apart, as `_find` does
        _BY_TYPE.setdefault(kind, _numpy())
    return backend


def _mlx() -> Backend:
    from anyattention_backends.mlx import backend

    return backend


def _ndonnx() -> Backend:
    from anyattention_backends.ndonnx import backend

    return backend


# Root module of an array type -> how to get its backend. Import statements, since torch.compile traces those.
_LOADERS = {"numpy": _numpy, "jax": _jax, "jaxlib": _jax, "torch": _torch, "mlx": _mlx, "ndonnx": _ndonnx}
_BY_TYPE: dict[type, Backend | None] = dict.fromkeys((type(None), bool, int, float, complex, list, tuple))


def backend_of(x: Any) -> Backend | None:
    """The backend of an array's library; None for what has no library: None, Python scalars, lists and tuples.

    Raises:
        TypeError: something that is no array.
    """
    kind = type(x)
    if kind not in _BY_TYPE:
        _BY_TYPE[kind] = _find(x)
    return _BY_TYPE[kind]


def _find(x: Any) -> Backend:
    root = type(x).__module__.partition(".")[0]
    if root in _LOADERS:
        return _LOADERS[root]()
    roots = [kind.__module__.partition(".")[0] for kind in type(x).__mro__]
    for root in roots:
        if root in _LOADERS:
            return _LOADERS[root]()
    if hasattr(type(x), "__jax_array__"):
        return _jax()
    from importlib.metadata import entry_points  # slow, so only for a type nobody here knows

    for entry in entry_points(group="anyattention.backends"):
        if entry.name in roots:
            return entry.load()
    try:
        return Backend(array_api_compat.array_namespace(x))
    except TypeError:
        raise TypeError(
            f"{type(x).__module__}.{type(x).__qualname__} is not an array of a library that follows the array API "
            "standard: convert it first, for example with numpy.asarray"
        ) from None


def register(kind: type) -> None:
    """Make a dataclass of arrays known to JAX's transformations, if JAX is in use; torch.compile cannot trace that."""
    torch = sys.modules.get("torch")
    if "jax" in sys.modules and not (torch and torch.compiler.is_compiling()):
        _jax().register(kind)


def backend_for(**arrays: Any) -> Backend:
    """The one backend that serves these arguments, named for the error message.

    Raises:
        TypeError: arrays of two libraries of which neither is NumPy, or NumPy query, key or value beside a
            library other than JAX.
    """
    found = None
    mixed = False
    for x in arrays.values():
        backend = backend_of(x)
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
    return found or _numpy()


def _mixed(arrays: dict[str, Any]) -> TypeError:
    kinds = ", ".join(
        f"{name} is {type(x).__module__.partition('.')[0]}.{type(x).__name__}"
        for name, x in arrays.items()
        if backend_of(x) is not None
    )
    return TypeError(f"arrays of different libraries in one call: {kinds}. Convert them to one library first")


def key_for(backend: Backend, key: Any) -> Any:
    """A dropout key as `backend` takes it. A key never changes the library of the call.

    Raises:
        TypeError: no key, or a key whose bits the library cannot reproduce.
    """
    home = backend_of(key)
    if home is None or not hasattr(key, "shape"):
        raise TypeError(
            f"dropout_rng must be a key, got {type(key).__name__}: make one with anyattention.random.key(seed)"
        )
    return key if home is backend else backend.adopt_key(home.key_data(key))
