"""What the kernels on PyTorch have in common: which derivatives they have, and where others are from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anyattention.extend import Call, CausalMask, Fused, Operands, Options, Structure, tiled
from anyattention_backends.torch import compat, operators


class TorchKernel(Fused):
    serves = Fused.serves | {"precision"}  # as far as PyTorch's own switches honour it

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        if reason := beyond(call):
            yield reason
        if call.operands.bias is not None and not can_look(call):
            yield "the values of the bias cannot be inspected here, and low biases need the gradient of tiled"

    def is_low(self, call: Call) -> bool:
        """Whether some query is shown low biases alone; first by a few keys, which mostly tell."""
        step = self.sample(call)
        return not (step > 1 and bool(self.reaches(call, step).all())) and not bool(self.reaches(call).all())


def beyond(call: Call) -> str:
    """Why a transformation's derivatives are not there, but the first in reverse mode; empty where they are."""
    if torch.compiler.is_compiling() or not compat.is_transformed():
        return ""
    kinds = compat.transformations()
    arrays = [x for x in (*call.operands[:4], call.operands.sinks) if isinstance(x, Tensor)]
    if "Jvp" in kinds or any(forward_ad.unpack_dual(x).tangent is not None for x in arrays):
        return "forward mode needs a derivative that it lacks"
    if "Vmap" in kinds and arrays[0].is_cpu:
        return "PyTorch has no rule to map it on CPU, and would call it for each entry"
    outside = torch.is_grad_enabled() and any(compat.unwrapped(x).requires_grad for x in arrays)
    if kinds.count("Grad") + outside > 1:
        return "it has no second derivative within torch.func"
    return ""


def told(size: int) -> str:
    """How many elements an array has; nothing in a trace, where it may be a symbol, which has no text."""
    return "" if torch.compiler.is_compiling() else f" of {size} elements"


def can_look(call: Call) -> bool:
    """Whether values can be looked at: not in a compiler's trace, nor while a CUDA graph is recorded."""
    if torch.compiler.is_compiling() or compat.is_traced():
        return False
    tensors = [x for x in (call.operands.bias, call.operands.mask) if isinstance(x, Tensor)]
    tensors += [x for x in getattr(call.operands.mask, "arrays", list)() if isinstance(x, Tensor)]
    if any(type(x) not in (Tensor, torch.nn.Parameter) or compat.is_wrapped(x) or x.is_meta for x in tensors):
        return False
    return not (any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())


def for_cuda(four: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """What the kernels on CUDA ask for besides: a mask's stride of one and, but for flash, a key head for each head.

    Raises:
        RuntimeError: PyTorch would take the kernel that has all logits, as where others are switched off.
    """
    (query, key, value), shown = four, options["attn_mask"]
    if shown is not None:
        shown = shown.expand(*shown.shape[:-1], key.shape[-2])
        shown = shown if shown.stride(-1) == 1 else shown.contiguous()
    flash = shown is None and not (options["is_causal"] and query.shape[-2] != key.shape[-2])
    if (group := query.shape[1] // key.shape[1]) != 1 and not flash:
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    options |= {"attn_mask": shown, "enable_gqa": group != 1 and flash}
    if not torch.compiler.is_compiling() and compat.is_math(query, key, value, **options):
        raise RuntimeError("No available kernel: PyTorch would compute all logits, see torch.nn.attention.sdpa_kernel")
    return [query, key, value], options


def with_second_derivative(kernel: Callable[..., Tensor], *four: Tensor, **options: Any) -> Tensor:
    """The output of a kernel of PyTorch's; where its gradient may be differentiated again, that is tiled's."""
    if torch.compiler.is_compiling() or compat.is_transformed() or not torch.is_grad_enabled():
        return kernel(*four, **options)
    hooks = compat.saved_tensor_hooks()
    if hooks is None:
        output = kernel(*four, **options)
    else:
        once = UnpackedOnce(*hooks)
        with torch.autograd.graph.saved_tensors_hooks(once.pack, once.unpack):
            output = kernel(*four, **options)
    node = output.grad_fn
    if node is not None and node.name().startswith("ScaledDotProduct"):
        node.register_hook(_again)  # from what the node has saved: nothing else is kept
    return output


def _again(gradients: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The gradients of the kernel's node, by tiled, where they may be differentiated; None for its own."""
    if not torch.is_grad_enabled():
        return None
    return operators.without_autocast(cotangents[0], _by_tiled, compat.backward_node(), gradients, cotangents)


def _by_tiled(node: Any, gradients: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    backend = operators.backend
    query, key, value = four = node._saved_query, node._saved_key, node._saved_value
    bias = getattr(node, "_saved_attn_bias", None)  # on CUDA
    bias = getattr(node, "_saved_attn_mask", None) if bias is None else bias  # on CPU
    with torch.enable_grad():
        scaled = query * (node._saved_scale * query.shape[-1] ** 0.5)
        q, k, v = (x.transpose(1, 2) for x in (scaled, key, value))
        mask = CausalMask() if node._saved_is_causal else None
        operands = Operands(q, k, v, None if bias is None else bias.detach(), mask)
        options = Options(dtype=backend.arrays.dtype_name(query))
        output = tiled.compute(Call(backend=backend, operands=operands, options=options))
        wanted = [x for x, gradient in zip(four, gradients, strict=False) if gradient is not None]
        found = iter(torch.autograd.grad(output.transpose(1, 2), wanted, cotangents[0], create_graph=True))
    return (*(None if gradient is None else next(found) for gradient in gradients[:3]), *gradients[3:])


class UnpackedOnce:
    """Hooks on what autograd saves around the caller's own, which may refuse to unpack twice, as a checkpoint does."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        self.pack, self._unpack = pack, unpack
        self._kept: dict[int, Tensor] = {}

    def unpack(self, packed: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self._unpack(packed)
        if id(packed) in self._kept:
            return self._kept.pop(id(packed))
        x = self._kept[id(packed)] = self._unpack(packed)  # till `_again` reads what the node has unpacked before
        return x


class FirstOnly(torch.autograd.Function):  # type: ignore[misc]
    """A kernel with its own gradient, or tiled's where a second derivative, or the same again, may follow."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[Call], Tensor], call: Call, *arrays: Tensor) -> Tensor:
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in arrays]
        with torch.enable_grad():
            output = compute(_with(call, inputs))
        ctx.call, ctx.graph = call, (output, inputs)
        ctx.save_for_backward(*arrays)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Any, ...]:
        second, again = torch.is_grad_enabled(), compat.keeps_graph()
        output, inputs = ctx.graph
        if second or again:
            inputs = ctx.saved_tensors
            with torch.enable_grad():
                output = tiled.compute(_with(ctx.call, inputs))
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed]
        gradients = iter(torch.autograd.grad(output, wanted, doutput, retain_graph=again, create_graph=second))
        return (None, None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[2:]))


def differentiated(call: Call) -> dict[str, Tensor]:
    """The operands that may have a gradient, by name."""
    named = call.operands._asdict()
    names = ("query", "key", "value", "bias", "sinks")
    return {name: named[name] for name in names if isinstance(named[name], Tensor)}


def _with(call: Call, arrays: Sequence[Tensor]) -> Call:
    """The call with others in place of these."""
    return replace(call, operands=call.operands._replace(**dict(zip(differentiated(call), arrays, strict=True))))
