"""DTensors: what our own code makes beside them, and what callers pass as plain tensors, is the same on every rank."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAKE = {torch.arange, torch.asarray, torch.as_tensor, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros}
# The operators give DTensors back as they were (2.11, 2.13).
_SHIFTS = {Tensor.__lshift__: torch.bitwise_left_shift, Tensor.__rshift__: torch.bitwise_right_shift}


def is_spread(x: Any) -> bool:
    """Whether it is a DTensor, whose module takes half a second to import."""
    kind = type(x)
    return kind is not Tensor and kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed.")


def beside(x: Tensor, like: Any) -> Tensor:
    """A plain tensor as a DTensor of the mesh of `like`, whole on every rank."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_spread(x):
        return x
    mesh = like.device_mesh
    return DTensor.from_local(x.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)


class Beside(TorchFunctionMode):  # type: ignore[misc]
    """Makes new tensors DTensors beside `like`, and shifts right."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.like = like

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = _SHIFTS.get(function, function)(*args, **(kwargs or {}))
        return beside(found, self.like) if function in _MAKE else found
