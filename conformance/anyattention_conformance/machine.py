"""One array library on this machine, in a process of its own: what serves the usual calls, and what they return."""

from collections.abc import Callable
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import numpy as np

import anyattention
from anyattention_conformance.frameworks import Framework, framework, quiet
from anyattention_conformance.targets import TargetError
from anyattention_conformance.truth import NAMES
from anyattention_conformance.usual import Usual

Array = Any
#: The engines of anyattention's own, by library; entry points add those of other packages.
ENGINES = {"jax": ("cudnn", "tokamax", "splash"), "torch": ("sdpa", "flex"), "mlx": ("mlx",), "ndonnx": ("onnx",)}


class Served(NamedTuple):
    """What serves a call, why, and what each engine says of it: a reason against it, or nothing."""

    implementation: str  # empty where the call raises
    engine: str
    reasons: tuple[str, ...]
    engines: dict[str, str]

    @property
    def name(self) -> str:
        """The engine, or the implementation."""
        return self.engine or self.implementation or "raises"


class Machine:
    """What the process of a library serves."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.framework: Framework = framework(name)
            self.device = self._device()
        except Exception as error:
            raise TargetError(f"{type(error).__name__}: {error}") from error
        self.module: Any = self.framework.module
        if name == "jax" and self.device != "CPU":  # whose products of float32 round their factors to 10 bits or fewer
            self.module.config.update("jax_default_matmul_precision", "highest")

    @property
    def about(self) -> dict[str, str]:
        """Its version and its device, "CPU" or a name."""
        return {"version": next(iter(self.framework.versions.values())), "device": self.device}

    def run(self, job: str, *arguments: Any) -> Any:
        """The answer to a job, which is the name of a method."""
        with quiet():
            return getattr(self, job)(*arguments)

    def served(self, call: Usual, dtype: str, gradient: bool) -> Served:
        """What serves a call, on JAX within `jit`."""
        if gradient and not self.framework.differentiates:
            return Served("tiled", "", ("dot_product_attention_vjp is always tiled",), {})
        if self.name == "jax":
            outline = self.module.ShapeDtypeStruct
            arguments = {name: outline(x.shape, dtype) for name, x in call.arrays.items()}
        else:
            arguments = {name: self.put(x, dtype) for name, x in call.arrays.items()}
        arguments.pop("cotangent")
        if self.name == "torch" and gradient:
            arguments = {name: x.requires_grad_() for name, x in arguments.items()}
        arguments |= call.options()
        engines = {}
        for name in (*ENGINES.get(self.name, ()), *_engines_elsewhere(self.name)):
            with anyattention.config(engines=[name]):
                plan = anyattention.explain(**arguments, implementation="fused")
            own = [x.removeprefix(f"{name}: ") for x in plan.reasons if x.startswith(f"{name}: ")]
            engines[name] = "" if plan.implementation else "; ".join(own or plan.reasons)
        plan = anyattention.explain(**arguments)
        return Served(plan.implementation or "", plan.engine or "", plan.reasons, engines)

    def answer(self, call: Usual, dtype: str, gradient: bool) -> dict[str, Array] | str:
        """The output, or the output and its gradients, in float32; a sentence if the call raises."""
        try:
            arrays, options = {name: self.put(x, dtype) for name, x in call.arrays.items()}, call.options()
            cotangent = arrays.pop("cotangent")
            found = (
                self._gradients(arrays, options, cotangent) if gradient else {"output": self._output(arrays, options)}
            )
            return {name: self.get(x) for name, x in found.items()}
        except Exception as error:
            return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As models call it: on JAX within `jit`, with masks and keys among the arguments."""
        return self.module.jit(function) if self.name == "jax" else function

    def _output(self, arrays: dict[str, Array], options: dict[str, Any]) -> Array:
        fixed, given = _parted(options)
        return self._compiled(lambda arrays, given: _attend(arrays | given, fixed))(arrays, given)

    def _gradients(self, arrays: dict[str, Array], options: dict[str, Any], cotangent: Array) -> dict[str, Array]:
        if not self.framework.differentiates:
            output, pull = anyattention.dot_product_attention_vjp(**arrays, **options)
            found = dict(zip(NAMES, pull(cotangent), strict=False))  # without sinks there is none of these
            return {"output": output} | {name: found[name] for name in arrays}
        fixed, given = _parted(options)

        def gradients(arrays: dict[str, Array], given: dict[str, Any], cotangent: Array) -> dict[str, Array]:
            output, pullback = self.framework.vjp(lambda **arrays: _attend(arrays | given, fixed), arrays)
            return {"output": output} | pullback(cotangent)

        return self._compiled(gradients)(arrays, given, cotangent)

    def put(self, x: Array, dtype: str) -> Array:
        """An array of the library on its device, in this dtype."""
        if self.name == "numpy":
            return x.astype(_numpy_dtype(dtype))
        x = self.framework.put(x)
        if self.name == "torch":
            return x.to(self._torch_device, getattr(self.module, dtype))
        return x.astype(dtype if self.name == "jax" else getattr(self.module, dtype))

    def get(self, x: Array) -> Array:
        """A NumPy array in float32."""
        if self.name == "torch":
            return self.framework.get(x.float())
        return self.framework.get(x.astype(getattr(self.module, "numpy", self.module).float32))

    @cached_property
    def _torch_device(self) -> str:
        torch = self.framework.module
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

    def _device(self) -> str:
        """What a user's arrays are on, if he says nothing, or in PyTorch, if he takes the accelerator."""
        module = self.framework.module
        if self.name == "jax":
            device = module.devices()[0]
            return "CPU" if device.platform == "cpu" else device.device_kind
        if self.name == "torch" and self._torch_device != "cpu":
            return module.cuda.get_device_name() if self._torch_device == "cuda" else "Apple's GPU (MPS)"
        return "GPU" if self.name == "mlx" and module.default_device() == module.gpu else "CPU"


def _attend(arguments: dict[str, Any], options: dict[str, Any]) -> Array:
    return anyattention.dot_product_attention(**arguments, **options)


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that a program is made for, and those that it is given."""
    given = {name: x for name, x in options.items() if name in ("mask", "dropout_rng")}
    return {name: x for name, x in options.items() if name not in given}, given


def _numpy_dtype(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(dtype)


def _engines_elsewhere(library: str) -> list[str]:
    """The names of the engines that other packages add for a library."""
    entries = (entry.name.partition(".") for entry in entry_points(group="anyattention.implementations"))
    return [name for home, _, name in entries if home == library and name]
