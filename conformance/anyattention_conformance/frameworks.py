"""Array libraries: arrays to them from NumPy and back, and their gradients."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from anyattention_conformance.oracles import x64

Array = Any
Function = Callable[..., Any]
Pullback = Callable[[Array], dict[str, Array]]


class Framework:
    """A library that follows the array API standard, by the name of its module; the subclasses know theirs better."""

    differentiates = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: ModuleType = importlib.import_module(name)

    @property
    def versions(self) -> dict[str, str]:
        """The library's version, and NumPy's."""
        root = importlib.import_module(self.name.partition(".")[0])
        version = getattr(root, "__version__", None) or getattr(self.module, "__version__", "unknown")
        return {self.name: str(version), "numpy": np.__version__}

    def put(self, x: Array) -> Array:
        """An array of the library with the values and dtype of a NumPy array."""
        if x.dtype.name == "bfloat16":
            return self.module.asarray(x.astype(np.float32)).astype(self.module.bfloat16)
        return self.module.asarray(x)

    def get(self, x: Array) -> Array:
        """A NumPy array with the values and dtype of an array of the library."""
        if hasattr(x, "compute"):  # Dask
            x = x.compute()
        elif hasattr(x, "get"):  # CuPy
            x = x.get()
        return np.asarray(x)

    def like(self, x: Array, example: Array) -> None:
        """TypeError if `x` is no array of the library, or on another device than `example`."""
        if not isinstance(x, type(example)):
            raise TypeError(f"returned {_type(x)} instead of {_type(example)}")
        devices = [device for device in (getattr(y, "device", None) for y in (x, example)) if not callable(device)]
        if len(devices) == 2 and devices[0] != devices[1]:
            raise TypeError(f"returned an array on {devices[0]}, for arrays on {devices[1]}")

    def scope(self, dtype: str) -> Any:
        """The context in which the library has this dtype."""
        return nullcontext()

    def vjp(self, function: Function, arrays: dict[str, Array]) -> tuple[Array, Pullback]:
        """The output, and what turns its cotangent into the gradients of `arrays`."""
        raise NotImplementedError(f"{self.name} has no gradients; give the function an attribute `vjp`")


class NumPy(Framework):
    def put(self, x: Array) -> Array:
        return x

    def get(self, x: Array) -> Array:
        return x


class Jax(Framework):
    differentiates = True

    def __init__(self, name: str) -> None:
        super().__init__("jax")

    @property
    def versions(self) -> dict[str, str]:
        return super().versions | {"jaxlib": importlib.import_module("jaxlib").__version__}

    def put(self, x: Array) -> Array:
        return self.module.numpy.asarray(x)

    def get(self, x: Array) -> Array:
        return np.asarray(x)

    def scope(self, dtype: str) -> Any:
        return x64(dtype == "float64")

    def vjp(self, function: Function, arrays: dict[str, Array]) -> tuple[Array, Pullback]:
        output, pullback = self.module.vjp(lambda arrays: function(**arrays), arrays)
        return output, lambda cotangent: pullback(cotangent)[0]


class Torch(Framework):
    differentiates = True

    def __init__(self, name: str) -> None:
        super().__init__("torch")

    def put(self, x: Array) -> Array:
        if x.dtype.name == "bfloat16":
            return self.module.tensor(x.astype(np.float32)).to(self.module.bfloat16)
        return self.module.tensor(x)

    def get(self, x: Array) -> Array:
        x = x.detach().cpu()
        if x.dtype == self.module.bfloat16:
            import ml_dtypes

            return x.float().numpy().astype(ml_dtypes.bfloat16)
        return x.numpy()

    def vjp(self, function: Function, arrays: dict[str, Array]) -> tuple[Array, Pullback]:
        arrays = {name: x.detach().requires_grad_() for name, x in arrays.items()}
        output = function(**arrays)

        def pullback(cotangent: Array) -> dict[str, Array]:
            if not output.requires_grad:
                raise TypeError("returned a tensor without a gradient: the graph is cut")
            found = self.module.autograd.grad(output, list(arrays.values()), cotangent, allow_unused=True)
            return {
                name: self.module.zeros_like(x) if gradient is None else gradient
                for (name, x), gradient in zip(arrays.items(), found, strict=True)
            }

        return output, pullback


class MLX(Framework):
    differentiates = True

    def __init__(self, name: str) -> None:
        super().__init__("mlx.core")

    @property
    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"mlx": version("mlx"), "numpy": np.__version__}

    def put(self, x: Array) -> Array:
        if x.dtype.name == "bfloat16":
            return self.module.array(x.astype(np.float32)).astype(self.module.bfloat16)
        return self.module.array(x, self.module.float64 if x.dtype == np.float64 else None)

    def get(self, x: Array) -> Array:
        if x.dtype == self.module.bfloat16:
            import ml_dtypes

            return np.array(x.astype(self.module.float32)).astype(ml_dtypes.bfloat16)
        return np.array(x)

    def vjp(self, function: Function, arrays: dict[str, Array]) -> tuple[Array, Pullback]:
        names, values = list(arrays), list(arrays.values())

        def positional(*values: Array) -> Array:
            return function(**dict(zip(names, values, strict=True)))

        def pullback(cotangent: Array) -> dict[str, Array]:
            return dict(zip(names, self.module.vjp(positional, values, [cotangent])[1], strict=True))

        return positional(*values), pullback


KNOWN: dict[str, type[Framework]] = {"numpy": NumPy, "jax": Jax, "torch": Torch, "mlx": MLX, "mlx.core": MLX}


def framework(name: str) -> Framework:
    """The framework of this name: numpy, jax, torch, mlx, or a module that follows the array API standard."""
    return KNOWN.get(name, Framework)(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, and without NumPy's about overflow: infinities are among the cases."""
    import warnings

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _type(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
