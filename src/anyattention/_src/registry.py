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

from anyattention._src import dtypes
from anyattention._src.errors import ShapeError
from anyattention._src.implementations.base import Broken, Implementation
from anyattention._src.implementations.exact import Exact
from anyattention._src.implementations.tiled import TILED
from anyattention._src.interfaces import Backend
from anyattention._src.later import when_imported
from anyattention._src.rules import Mask, conjunction

Array = Any
#: The project's own engines, each a vendor's kernel for "fused".
ENGINES = ("cudnn", "tokamax", "splash", "sdpa", "flex", "mlx")
EXACT = Exact()


#: The root modules of the array types of the project's own libraries.
LIBRARIES = ("numpy", "jax", "jaxlib", "torch", "mlx", "ndonnx")
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
    else:
        from anyattention_backends.numpy import backend
    return backend


def _find(x: Any, name: str) -> Backend:
    if isinstance(x, type):
        raise TypeError(f"{name} is the class {x.__name__} itself: pass an instance, as {x.__name__}(...) makes it")
    if isinstance(x, Mask):
        raise TypeError(f"{name} must be an array, got the mask by rule {x}: pass it as mask")
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
def _load(library: str) -> tuple[Implementation, ...]:
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
    return _load(library)


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


def array_of(backend: Backend, name: str, x: Any) -> Array:
    """A query, key or value as an array of the backend's library."""
    if x is None:
        raise TypeError(f"{name} must be an array, got None")
    home = backend_of(x, name)
    if home is None:
        return backend.arrays.adopt(x, None)
    if home is not backend and home.name != "numpy":
        raise TypeError(f"{name} is an array of {home.name}, beside arrays of {backend.name}: convert it first")
    x = _checked(home, name, x, None)
    return x if home is backend else backend.arrays.adopt(x, None)


def _checked(backend: Backend, name: str, x: Any, like: Any) -> Any:
    """An argument of this name as `Arrays.check_array` takes it."""
    if backend.name == "numpy" and compiling():  # to torch.compile NumPy's arrays are tensors
        return x
    try:
        return backend.arrays.check_array(x, like)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # a library's own, which may be made in another way
            raise
        raise type(error)(f"{name}: {error}") from None


def guest_of(backend: Backend, name: str, x: Any, like: Array | None) -> Any:
    """A bias or dense mask as an array of the backend's library, beside `like`."""
    if isinstance(x, list | tuple):
        raise TypeError(
            f"{name} must be an array or a scalar, got a {type(x).__name__}: convert it first, as with numpy.asarray"
        )
    home, jax = backend_of(x, name), backend.name == "jax"
    if home is None:
        return backend.arrays.adopt(x if jax or name == "bias" else bool(x), like)
    x = _checked(home, name, x, like if home is backend else None)
    if isinstance(x, Mask):
        if name == "bias":
            raise TypeError(f"{name}: a mask by rule, {x}, is no array: pass it as mask=")
        return x
    if home is not backend and (jax or compiling()):  # torch.compile cannot ask NumPy for a dtype
        return backend.arrays.adopt(x, like)
    if not jax:  # which knows more dtypes, and refuses the others itself
        dtypes.promote(home.arrays.dtype_name(x))
    if home is backend:
        return x
    return backend.arrays.adopt(x if name == "bias" else home.arrays.truth(x), like)


def dense_of(backend: Backend, name: str, x: Any, like: Array | None) -> Array:
    """A dense mask, or an array of a mask, where it can meet `like`; a mask by rule is expanded."""
    found = guest_of(backend, name, x, like)
    return guest_of(backend, name, found.to_array(*x.shape[-2:]), like) if isinstance(found, Mask) else found


def _is_wide(x: Any) -> bool:
    """Whether an array of NumPy's has integers beyond 32 bits."""
    if (
        isinstance(x, int | list | tuple)
        or backend_of(x) is not load("numpy")
        or x.dtype.kind not in "iu"
        or not x.size
    ):
        return False
    return int(x.max()) >= 2**31 or int(x.min()) < -(2**31)


def mask_of(backend: Backend, mask: Any, like: Array | None, key: Array | None = None) -> Any:
    """A mask, by rule or dense, with its arrays in the backend's library, beside `like`."""
    if not isinstance(mask, Mask):
        found = guest_of(backend, "mask", mask, like)
        if isinstance(found, Mask) and like is not None and key is not None:
            lengths, given = (like.shape[-3], key.shape[-3]), tuple(mask.shape[-2:])
            if lengths != given:
                raise ShapeError(f"mask is for lengths {given}, but those of query and key are {lengths}")
        return found

    def integers(x: Any) -> Array:
        home = backend_of(x, "mask")
        x = _checked(home, "mask", x, like if home is backend else None) if home else x
        return x if home is backend else backend.arrays.adopt(x, like)

    fitting = mask.within_32_bits(_is_wide) if backend.name == "jax" else mask
    return fitting.with_arrays(integers, lambda x: dense_of(backend, "mask", x, like))


def additive(mask: Any) -> bool:
    """Whether a mask has numbers as one has that is added to logits, as far as values can be looked at."""
    for x in conjunction(mask):
        backend = None if isinstance(x, Mask) else backend_of(x, "mask")
        if backend is None or not (backend.arrays.inspects(x) or backend.name == "jax"):
            continue
        kind = backend.arrays.dtype_name(x)
        if kind.startswith(("float", "bfloat", "int")):
            try:
                odd = x < 0 if kind.startswith("int") else (x < 0) | backend.xp.isinf(x)
                if bool(backend.xp.any(odd)):
                    return True
            except (TypeError, RuntimeError):  # of a tracer
                pass
    return False


def boolean(bias: Any) -> bool:
    """Whether a bias has the dtype of a mask."""
    home = backend_of(bias, "bias")
    return home is not None and home.arrays.dtype_name(bias) == "bool"


def rate_of(rate: Any) -> Any:
    """A dropout rate as a Python number, or of an array of one element, whose dtype counts, the NumPy scalar."""
    if isinstance(rate, int | float):
        return rate
    if rate is None or not hasattr(rate, "shape"):
        raise TypeError(f"dropout_rate must be a number in [0, 1), got {rate!r}; pass 0.0 for no dropout")
    home = backend_of(rate, "dropout_rate") or load("numpy")
    rate, numpy = home.xp.reshape(_checked(home, "dropout_rate", rate, None), ()), load("numpy").arrays
    value = rate.tolist() if hasattr(rate, "tolist") else float(rate)  # which PyTorch warns of, where it has a gradient
    return numpy.cast(numpy.adopt(value, None), home.arrays.dtype_name(rate))[()]


def _has_shape(kind: type) -> bool:
    """Asked of the class, since some tensors raise."""
    return hasattr(kind, "shape")


vars(_has_shape)["_dynamo_marked_constant"] = True  # torch.compile does not know it of a class


def key_of(backend: Backend, key: Any) -> Any:
    """A dropout key as the backend takes it. A key never changes the library of the call.

    Raises:
        TypeError: no key, or a key whose bits the library cannot reproduce.
    """
    home = backend_of(key, "dropout_rng")
    if home is None or not (hasattr(key, "shape") if home.name == "numpy" else _has_shape(type(key))):
        raise TypeError(
            f"dropout_rng must be a key, got {type(key).__name__}: make one with anyattention.random.key(seed)"
        )
    key = _checked(home, "dropout_rng", key, None)
    return key if home is backend else backend.arrays.adopt_key(home.arrays.key_data(key))


def _home(mask: Mask) -> tuple[Backend, Mask, Any]:
    """The backend of a mask's arrays, the mask in its library, and an array of it, if any."""
    arrays = mask.arrays()
    backend = backend_for(**{f"mask[{i}]": x for i, x in enumerate(arrays)})
    like = next((x for x in arrays if backend_of(x) is backend), None)
    return backend, mask_of(backend, mask, like), like


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


Mask._home, Mask._made = staticmethod(_home), staticmethod(_made)
