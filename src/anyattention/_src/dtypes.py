"""JAX's dtype rules as data, by name: promotion, compute dtype, the masking fill, rounding of scalars.

Every library names its dtypes alike ("float32"), but no two promote them alike, so promotion is never left
to the library. Source of the lattice: the type promotion page of JAX's documentation.
"""

import math
from typing import Any

# Each name with the names directly above it in JAX's promotion lattice. "int*", "float*" and "complex*" are
# the kinds of Python's own scalars, which do not widen an array of their kind.
_ABOVE: dict[str, tuple[str, ...]] = {
    "bool": ("int*",),
    "int*": ("uint8", "int8"),
    "uint8": ("uint16", "int16"),
    "uint16": ("uint32", "int32"),
    "uint32": ("uint64", "int64"),
    "uint64": ("float*",),
    "int8": ("int16",),
    "int16": ("int32",),
    "int32": ("int64",),
    "int64": ("float*",),
    "float*": ("bfloat16", "float16", "complex*"),
    "bfloat16": ("float32",),
    "float16": ("float32",),
    "float32": ("float64", "complex64"),
    "float64": ("complex128",),
    "complex*": ("complex64",),
    "complex64": ("complex128",),
    "complex128": (),
}

# Explicit mantissa bits and largest exponent.
_FORMATS = {"bfloat16": (7, 127), "float16": (10, 15), "float32": (23, 127), "float64": (52, 1023)}
_PART = {"complex64": "float32", "complex128": "float64"}
# What JAX has with x64 off.
NARROW = {"float64": "float32", "complex128": "complex64"}
# NumPy's other names of floating and complex dtypes.
_ALIASES = {
    **dict.fromkeys(("f2", "e", "half"), "float16"),
    **dict.fromkeys(("f4", "f", "single"), "float32"),
    **dict.fromkeys(("f8", "d", "double", "float"), "float64"),
    **dict.fromkeys(("c8", "F", "csingle"), "complex64"),
    **dict.fromkeys(("c16", "D", "cdouble", "complex"), "complex128"),
}
# What other programs call them.
_ELSEWHERE = {"bf16": "bfloat16"} | {f"{kind}{bits}": f"float{bits}" for kind in ("fp", "f") for bits in (16, 32, 64)}
# Lattice names of Python's scalars, which never widen an array of their own kind.
PYTHON_SCALARS: dict[Any, str] = {bool: "bool", int: "int*", float: "float*", complex: "complex*"}


def _closure(name: str) -> frozenset[str]:
    return frozenset({name}.union(*(_closure(above) for above in _ABOVE[name])))


_REACH = {name: _closure(name) for name in _ABOVE}
_JOIN = {(a, b): min(_REACH[a] & _REACH[b], key=lambda name: -len(_REACH[name])) for a in _ABOVE for b in _ABOVE}


def name_of(dtype: Any) -> str:
    """Name of a dtype of any library, of a scalar type (``numpy.float16``, ``float``), or of a string.

    >>> name_of("float32"), name_of(float), name_of(int)
    ('float32', 'float64', 'int64')
    """
    if isinstance(dtype, str) and dtype in _ALIASES:
        return _ALIASES[dtype]
    if isinstance(dtype, type):
        name = {float: "float64", complex: "complex128", int: "int64"}.get(dtype) or dtype.__name__
    else:
        name = str(dtype).rpartition(".")[2]  # "torch.float32", "mlx.core.float32"
    return name.removesuffix("_")  # "bool_"


def refused(dtype: Any, why: Exception) -> TypeError:
    """What to raise for a `dtype` that a library does not take."""
    if name_of(dtype) in _FORMATS:  # which this library lacks
        return TypeError(f"dtype={dtype!r}: {why}; 'float32' is one that every library has")
    meant = _ELSEWHERE.get(dtype, "float32") if isinstance(dtype, str) else "float32"
    return TypeError(f"dtype={dtype!r} is no dtype to compute in ({why}): pass one by its name, such as {meant!r}")


def promote(*names: str) -> str:
    """The least dtype that holds them all, by JAX's lattice.

    >>> promote("float16", "int64"), promote("float16", "bfloat16"), promote("float32", "int64")
    ('float16', 'float32', 'float32')

    Raises:
        TypeError: a dtype that has no place in the lattice (float8, int4, strings, objects, swapped bytes).
    """
    result = names[0]
    for name in names:
        if (result, name) not in _JOIN:
            raise TypeError(
                f"attention cannot compute with dtypes {', '.join(names)}: cast to one of bfloat16, float16, "
                "float32, float64 (in native byte order) first"
            )
        result = _JOIN[result, name]
    return result


def is_inexact(name: str) -> bool:
    """Whether the name is of a floating or complex dtype that attention computes in."""
    return name in _FORMATS or name in _PART


def compute_dtype(names: tuple[str, ...], dtype: Any = None) -> str:
    """The dtype in which Flax computes on arrays of these dtypes; `dtype`, where given, decides alone.

    >>> compute_dtype(("int64", "int8")), compute_dtype(("float16", "int32")), compute_dtype(("int8",), "bfloat16")
    ('float32', 'float16', 'bfloat16')

    Raises:
        ValueError: an explicit `dtype` that is neither floating nor complex.
        TypeError: as in `promote`.
    """
    if dtype is None:
        name = promote(*names)
        return name if is_inexact(name) else promote("float32", name)
    name = name_of(dtype)
    if name not in _ABOVE:
        raise TypeError("attention computes in bfloat16, float16, float32 and float64")
    if not is_inexact(name):
        raise ValueError(f"Dtype must be inexact: {dtype!r}; pass a floating or complex dtype, or None to infer it")
    return name


def lowest(name: str) -> float:
    """The most negative finite value, which is what Flax puts in place of a masked logit: ``finfo(dtype).min``."""
    bits, largest = _FORMATS[_PART.get(name, name)]
    return -((2 - 2.0**-bits) * 2.0**largest)


def round_to(value: float, name: str) -> float:
    """`value` rounded to nearest, ties to even, in the dtype called `name`; still a Python float.

    Libraries disagree on whether a Python scalar is rounded before it meets a 16-bit array. A scalar that
    is already exact in the array's dtype has one meaning everywhere.

    >>> round_to(96**0.5, "bfloat16"), round_to(1e5, "float16")
    (9.8125, inf)
    """
    bits, largest = _FORMATS[_PART.get(name, name)]
    if bits == 52 or value == 0 or not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    bits = min(bits, bits + exponent - 2 + largest)  # below the smallest normal number, 2**(1 - largest), fewer
    rounded = math.ldexp(round(math.ldexp(mantissa, bits + 1)), exponent - bits - 1)
    return rounded if abs(rounded) <= -lowest(name) else math.copysign(math.inf, value)
