"""Arguments as the backend of their call takes them: arrays of its library, beside the query."""

from typing import Any

from anyattention._src import dtypes
from anyattention._src.errors import ShapeError
from anyattention._src.interfaces import Backend
from anyattention._src.registry import backend_for, backend_of, compiling, load
from anyattention._src.rules import Bias, ByRule, Mask, conjunction

Array = Any


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
    """A bias, sinks or a dense mask as an array of the backend's library, beside `like`."""
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
    return backend.arrays.adopt(x if name in ("bias", "sinks") else home.arrays.truth(x), like)


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


def bias_of(backend: Backend, bias: Any, like: Array | None) -> Any:
    """A bias, by rule or dense, with its arrays in the backend's library, beside `like`."""
    if not isinstance(bias, Bias):
        return guest_of(backend, "bias", bias, like)

    def number(x: Any) -> Array:
        return backend.arrays.adopt(x, like) if isinstance(x, list) else guest_of(backend, "bias", x, like)

    fitting = bias.within_32_bits(_is_wide) if backend.name == "jax" else bias
    return fitting.with_arrays(number)


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
    home = None if isinstance(bias, Bias) else backend_of(bias, "bias")
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


def _home(rule: ByRule) -> tuple[Backend, Any, Any]:
    """The backend of a rule's arrays, the rule in its library, and an array of it, if any."""
    arrays, of_kind = rule.arrays(), mask_of if isinstance(rule, Mask) else bias_of
    backend = backend_for(**{f"{rule.kind}[{i}]": x for i, x in enumerate(arrays)})
    like = next((x for x in arrays if backend_of(x) is backend), None)
    return backend, of_kind(backend, rule, like), like


ByRule._home = staticmethod(_home)
