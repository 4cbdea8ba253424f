"""An array library and an engine of a third party, as in the recipes of the documentation; NumPy does the work."""

import sys

import numpy as np

from anyattention.extend import Arrays, Backend, Fused

BINARY = ("add", "sub", "mul", "truediv", "and", "or", "xor", "lshift", "rshift")
OTHERS = ("eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "getitem", "bool", "int", "float")


class Array:
    """What the array API standard asks for; its namespace is this module."""

    dtype, shape, ndim = (property(lambda self, name=x: getattr(self.data, name)) for x in ("dtype", "shape", "ndim"))

    def __init__(self, data):
        self.data = np.asarray(data)

    def __array_namespace__(self, api_version=None):
        return sys.modules[__name__]

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype, copy=copy)


def _data(x):
    return type(x)(map(_data, x)) if isinstance(x, tuple | list) else x.data if isinstance(x, Array) else x


def _lifted(function):
    def call(*args, **kwargs):
        result = function(*_data(args), **kwargs)
        return Array(result) if isinstance(result, np.ndarray | np.generic) else result

    return call


for _name in (*BINARY, *OTHERS, *(f"r{name}" for name in BINARY)):
    setattr(Array, f"__{_name}__", _lifted(getattr(np.ndarray, f"__{_name}__")))


def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(name)
    found = getattr(np, name)
    return found if isinstance(found, type | float) else _lifted(found)


class TinyArrays(Arrays):
    def run(self, like, function, /, *args):
        with np.errstate(all="ignore"):  # infinities are results here, not occasions to warn
            return function(*args)

    def inspects(self, x):
        return True

    def surely(self, x, value):
        return x is not None and bool(np.all(np.asarray(x) == value))


backend = Backend(sys.modules[__name__], TinyArrays)


class Plain(Fused):
    serves = Fused.serves - {"grouped heads"}
    platforms = ("cpu",)
    dtypes = ("float32", "float64")

    def kernel(self, query, key, value, bias, mask, scale):
        xp = query.__array_namespace__()
        query, key, value = (xp.permute_dims(x, (0, 2, 1, 3)) for x in (query, key, value))
        logits = xp.matmul(query * scale, xp.matrix_transpose(key))
        if bias is not None:
            logits = logits + bias
        if mask.joined is not None:
            logits = xp.where(mask.joined, logits, -xp.inf)
        weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        return xp.permute_dims(xp.matmul(weights, value) / xp.sum(weights, axis=-1, keepdims=True), (0, 2, 1, 3))
