"""PyTorch's private names that the project needs, each with the versions it was seen on."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as `torch.compiler.assume_constant_result` does, which takes a second to import (2.11, 2.13)."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant
def full_precision() -> bool:
    """Whether products in float32 are to be that, which no compiler can trace (2.11, 2.13)."""
    return torch.get_float32_matmul_precision() == "highest"


@constant
def has_autocast(device: str) -> bool:
    """Whether a device has autocast, which the compiler of 2.11 cannot trace."""
    return torch.amp.is_autocast_available(device)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Break the graph at a function, as `torch.compiler.disable` does, which takes a second to import (2.11, 2.13)."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        inside = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
        return inside(*args)

    vars(run)["_torchdynamo_disable"] = True
    vars(run)["_torchdynamo_disable_msg"] = "ranks exchange what depends on the values of masks"
    return run


# By the home of a class, what to pass instead.
_ADVICE = {
    "torch.nested": "pad it, as torch.nested.to_padded_tensor does, and pass masks.LengthMask",
    "torch.masked": "pass get_data(), and get_mask() as mask=",
    "torch.sparse": "pass to_dense()",
}


@constant
def foreign(kind: Any) -> str:
    """Why tensors of a class are not what their storage says; "causal" of `CausalBias`, empty where they are."""
    if not issubclass(kind, torch.Tensor):
        return f"a {kind.__module__}.{kind.__qualname__}, which is no tensor: pass one, or a mask of anyattention.masks"
    if (kind.__module__, kind.__name__) == ("torch.nn.attention.bias", "CausalBias"):
        return "causal"
    own = kind.__torch_function__
    plain = own is torch._C._disabled_torch_function_impl or own.__func__ is torch.Tensor.__torch_function__.__func__
    home = ".".join(kind.__module__.split(".")[:2])
    if plain and home != "torch.sparse":
        return ""
    advice = _ADVICE.get(
        home, "pass a plain tensor, as x.as_subclass(torch.Tensor) is where its storage has the values"
    )
    return f"a {kind.__module__}.{kind.__qualname__}, whose storage is not what it means: {advice}"


@constant
def exports_to_onnx() -> bool:
    """Whether `torch.onnx.export` is at work, in either of its two ways."""
    return torch.onnx.is_in_onnx_export()


def is_wrapped(x: torch.Tensor) -> bool:
    """Whether a transformation of `torch.func` sees the tensor (2.11, 2.13)."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def is_transformed() -> bool:
    """Whether any transformation of `torch.func` or forward mode is in force (2.11, 2.13); 0.1 us."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether `torch.jit.trace`, `make_fx` or `functionalize` records what is computed (2.11, 2.13); 0.1 us."""
    if torch._C._get_tracing_state() is not None:
        return True
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None and "Functionalize" in transformations()


def mapped(function: Callable[..., Sequence[Any]], *arrays: torch.Tensor) -> Sequence[Any]:
    """The function of tensors, of which `is_grads_batched` may have mapped some (2.11, 2.13).

    PyTorch does that with an older vmap than `torch.func`, which hardly any operator knows. The mapped axis is made
    the first axis of all.
    """
    is_mapped = torch._C._functorch.is_legacy_batchedtensor
    if not any(map(is_mapped, arrays)):
        return function(*arrays)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    whole = [torch._remove_batch_dim(x, level, 1, 0) if is_mapped(x) else None for x in arrays]
    size = next(len(x) for x in whole if x is not None)
    found = function(*(x.expand(size, *x.shape) if y is None else y for x, y in zip(arrays, whole, strict=True)))
    return [None if x is None else torch._add_batch_dim(x, 0, level) for x in found]


def transformations() -> list[str]:
    """Those of `torch.func` in force, the outermost first: "Grad", "Vmap", "Jvp", ... (2.11, 2.13)."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [interpreter.key().name for interpreter in stack]


def differentiates() -> bool:
    """Whether one of them is a derivative."""
    return not {"Grad", "Jvp"}.isdisjoint(transformations())


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """The tensor below all transformations (2.11, 2.13)."""
    while is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def is_symbol(size: Any) -> bool:
    """Whether a size is not known while a program is traced for many; strict export gives integers that are not."""
    if not isinstance(size, int):
        return True
    if not torch.compiler.is_exporting():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # (2.11, 2.13)

    known = [statically_known_true(size % 7 == rest) for rest in range(7)]  # of a number one is
    return not any(known)


def saved_tensor_hooks() -> Any:
    """The hooks that pack and unpack what autograd saves, as checkpoints set them; None without (2.11, 2.13)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def backward_node() -> Any:
    """The node of autograd that runs now (2.11, 2.13)."""
    return torch._C._current_autograd_node()


def keeps_graph() -> bool:
    """Whether the backward pass under way keeps the graph (2.11, 2.13)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def is_math(*arguments: Any, **options: Any) -> bool:
    """Whether SDPA would take the kernel that has all logits (2.11, 2.13); 1 us, where setting flags takes 10."""
    return int(torch._fused_sdp_choice(*arguments, **options)) == torch.nn.attention.SDPBackend.MATH.value
