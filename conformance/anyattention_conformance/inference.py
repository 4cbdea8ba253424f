"""Which library's arrays a function takes, as far as its annotations, its class, its code and its file show it."""

import dis
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from anyattention_conformance.frameworks import framework

ARRAYS = ("numpy", "jax", "torch", "mlx")  # whose arrays have methods of their own
ROOTS = {  # packages, and the framework that their arrays are of
    **{name: name for name in (*ARRAYS, "cupy", "array_api_strict", "ndonnx")},
    **dict.fromkeys(("jaxlib", "flax", "haiku", "equinox", "optax"), "jax"),
    "dask": "dask.array",
}
NUMPY = "numpy"  # which functions for other arrays use as well


class UnclearError(ValueError):
    """It cannot be seen which arrays a function takes; the message says what was found."""


def infer(function: Callable[..., Any]) -> tuple[str, str]:
    """The name of the framework, and what shows it. UnclearError where nothing does."""
    functions = list(_functions(function))
    code = [code for x in functions for code in _codes(x.__code__)]
    seen: list[str] = []
    for found in (
        _named(_annotated(functions), "its annotations name {}"),
        _named(_classes(function), "its class is from {}"),
        _named([getattr(function, "__module__", None) or ""], "it is from {}"),
        _named(_used(functions, code), "it uses {}"),
        _named(_imported(functions), "its file imports {}"),
    ):
        if len(found) > 1:
            found.pop(NUMPY, None)
        if len(found) == 1:
            ((name, why),) = found.items()
            if name != NUMPY or not _beyond_numpy(code):
                return name, why
            try:
                return _by_methods(code)
            except UnclearError:
                return name, why
        seen = seen or sorted(found.values())
    try:
        return _by_methods(code)
    except UnclearError as error:
        raise UnclearError(", ".join(seen) or str(error)) from None


def _functions(function: Callable[..., Any]) -> Iterator[FunctionType]:
    """The functions that run in a call, as far as they are of one file: also what it wraps, and helpers."""
    waiting: list[Any] = [function]
    done: set[int] = set()
    home: str | None = None
    while waiting:
        x = waiting.pop(0)
        if id(x) in done:
            continue
        done.add(id(x))
        if isinstance(x, partial):
            waiting.append(x.func)
        elif inspect.ismethod(x):
            waiting.append(x.__func__)
        elif not isinstance(x, FunctionType):
            kind = x if isinstance(x, type) else type(x)
            waiting += [getattr(kind, name, None) for name in ("__call__", "forward", "call")]
            waiting += [getattr(x, "__wrapped__", None)]
        else:
            home = home or x.__module__
            yield x
            waiting.append(getattr(x, "__wrapped__", None))
            waiting += [y for y in _values([x], _codes(x.__code__)) if getattr(y, "__module__", None) == home]
        waiting = [y for y in waiting if y is not None]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _codes(x)


def _values(functions: Iterable[FunctionType], codes: Iterable[CodeType]) -> Iterator[Any]:
    """What the names in the code stand for: globals, and variables of the functions around."""
    names = dict.fromkeys(name for code in codes for name in code.co_names)
    for function in functions:
        yield from (function.__globals__[name] for name in names if name in function.__globals__)
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # empty
                continue


def _named(names: Iterable[str], sentence: str) -> dict[str, str]:
    """The frameworks of what is named, each with the sentence that says so."""
    found: dict[str, str] = {}
    for name in names:
        root = name.partition(".")[0]
        root = _keras() if root == "keras" else root
        if root in ROOTS:
            found.setdefault(ROOTS[root], sentence.format(root))
    return found


def _keras() -> str:
    keras = sys.modules.get("keras")
    return str(keras.backend.backend()) if keras is not None else ""


def _annotated(functions: Iterable[FunctionType]) -> Iterator[str]:
    for function in functions:
        for annotation in getattr(function, "__annotations__", {}).values():
            if isinstance(annotation, str):
                for name in re.findall(r"[A-Za-z_][\w.]*", annotation):
                    yield from _origin(function.__globals__.get(name.partition(".")[0]))
            else:
                yield from _origin(annotation)


def _origin(x: Any) -> Iterator[str]:
    """Where a module, a class or a function is from; of a type with arguments, all of them."""
    if isinstance(x, ModuleType):
        yield x.__name__
    else:
        yield from (y for part in getattr(x, "__args__", ()) for y in _origin(part))
        if isinstance(module := getattr(x, "__module__", None), str):
            yield f"{module}.{getattr(x, '__qualname__', '')}".strip(".")


def _classes(function: Any) -> Iterator[str]:
    for x in (function, getattr(function, "__self__", None)):
        if not isinstance(x, FunctionType | type | None) and not inspect.isbuiltin(x):
            yield from (f"{kind.__module__}.{kind.__qualname__}" for kind in type(x).__mro__)


def _used(functions: Iterable[FunctionType], codes: Iterable[CodeType]) -> Iterator[str]:
    codes = list(codes)
    for code in codes:
        yield from (str(x.argval) for x in dis.get_instructions(code) if x.opname == "IMPORT_NAME")
    for x in _values(functions, codes):
        yield from _origin(x)


def _imported(functions: list[FunctionType]) -> Iterator[str]:
    for function in functions[:1]:
        yield from (x.__name__ for x in function.__globals__.values() if isinstance(x, ModuleType))


def _attributes(codes: Iterable[CodeType]) -> set[str]:
    """The names after a dot, but those that dtypes have, since x.dtype.type is no method of x."""
    found = {
        str(x.argval) for code in codes for x in dis.get_instructions(code) if x.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }
    return {x for x in found if not hasattr(np.dtype, x)}


def _beyond_numpy(codes: list[CodeType]) -> bool:
    """Whether the code uses attributes that neither NumPy nor its arrays have."""
    return any(not hasattr(np.ndarray, x) and not hasattr(np, x) for x in _attributes(codes))


def _by_methods(codes: list[CodeType]) -> tuple[str, str]:
    """The only library whose arrays have all the methods in the code that any library's arrays have."""
    kinds = {}
    for name in ARRAYS:
        if importlib.util.find_spec(name) is not None:
            kinds[name] = type(framework(name).put(np.zeros((), np.float32)))
    used = _attributes(codes)
    found = {name: {x for x in used if hasattr(kind, x)} for name, kind in kinds.items()}
    for name, methods in found.items():
        others = [x for other, x in found.items() if other != name]
        if others and all(methods > x for x in others):
            own = sorted(methods.difference(*others))
            said = " and ".join(f".{x}" for x in own[:3])
            return name, f"of the arrays of {', '.join(kinds)}, only those of {name} have {said}"
    raise UnclearError("nothing in it names a library")
