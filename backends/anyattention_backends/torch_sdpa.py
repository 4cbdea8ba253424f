"""PyTorch's `scaled_dot_product_attention`, where its fused kernels on CPU and CUDA have Flax's meaning.

The kernels give zero to a query that sees no key; Flax gives it the mean of all values. Such queries are shown every
key, and their output is replaced, so that their gradients are Flax's too. A query all of whose biases are far below
zero, as where they stand for a mask, has wrong gradients from the kernels: such calls go to the fallback, which is
decided when the values are seen.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyattention import dtypes, masks
from anyattention.backend import Backend
from anyattention.engine import LOW, SWITCH, Engine, fits, least_bias, pairs
from anyattention.request import Request

Array = Any
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
_MULTIPLE = 8  # on CUDA, of the depth
_MOST_DEPTH = 256  # on CUDA
_MOST_EXPANDED = 2**30  # pairs of a query and a key, on CUDA
_SAMPLE = 64  # keys


class Kernel(Engine):
    """What PyTorch's kernels have in common: what none of them serves, and where other derivatives are from."""

    once = False  # its gradient can be taken once

    def call(self, request: Request, query: Array, key: Array, value: Array) -> Array:
        """The output with Flax's meaning; query, key and value are not in the request."""
        raise NotImplementedError

    def missing(self, request: Request) -> dict[str, bool]:
        """Reasons against any of the kernels, and whether they hold."""
        dtype, query, key, value = request[:4]
        return {
            "a softmax in float32 of 16-bit arrays returns float32": request.force_fp32 and "16" in dtype,
            "dropout bits are its own": request.dropout is not None,
            "something is empty": 0 in (*query.shape, *key.shape, *value.shape),
            "torch.func and forward mode need derivatives that it lacks": _transformed(query, key, value),
        }

    def attention(self, request: Request, fallback: Callable[[Request], Array]) -> Array:
        query, key, value = request.query, request.key, request.value
        if request.precision is not None:
            self.backend.check_precision(request.precision, None, query)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.call(request, query, key, value)
        if not (query.requires_grad or key.requires_grad or value.requires_grad):
            return self.call(request, query, key, value)
        return _Fused.apply(self, request._replace(query=None, key=None, value=None), fallback, query, key, value)


class SDPA(Kernel):
    """Flash on CPU; flash, memory-efficient or cuDNN's on CUDA, but never the one that has all logits.

    Of float32 on CUDA there is the memory-efficient kernel, which makes three products in TF32 of each, and so keeps
    the precision of float32, whatever `torch.backends.cuda.matmul.allow_tf32` says.
    """

    name = "sdpa"

    def rank(self, request: Request) -> int:
        return int(_expands(request))  # after the kernels that know the mask

    def refusals(self, request: Request) -> list[str]:
        dtype, query, _, value, bias, mask = request[:6]
        platform = self.backend.platform(query)
        if platform not in ("cpu", "cuda"):
            return [f"it runs on cpu and cuda, not on {platform}"]
        cuda = platform == "cuda"
        served = ("float32", "bfloat16", "float16") if cuda else ("float32", "float64", "bfloat16", "float16")
        checks = self.missing(request) | {
            f"there is no kernel for {dtype}": dtype not in served,
            f"there is no kernel for depths beyond {_MOST_DEPTH}": cuda
            and max(query.shape[-1], value.shape[-1]) > _MOST_DEPTH,
            "bias or mask has axes that query and key lack": not fits(request),
            f"{type(mask).__name__} would be expanded": _expands(request)
            and not (cuda and _pairs(request) <= _MOST_EXPANDED),
        }
        if hasattr(bias, "shape"):
            wide = dtypes.promote(dtype, self.backend.dtype_name(bias))
            checks["the bias needs a gradient"] = bias.requires_grad
            checks[f"the bias makes logits {wide}"] = wide not in (dtype, dtype if cuda else "float32")
        if bias is not None:
            checks["how low the bias goes cannot be seen here"] = not _at_hand(bias, mask)
        return [reason for reason, holds in checks.items() if holds]

    def remarks(self, request: Request) -> list[str]:
        found = [LOW] if request.bias is not None else []
        if _expands(request):
            found.append(f"{type(request.mask).__name__} is an array of {_pairs(request)} elements")
        return found

    def attention(self, request: Request, fallback: Callable[[Request], Array]) -> Array:
        if request.bias is not None and not _reached(self.backend, request):
            return fallback(request)
        return super().attention(request, fallback)

    def call(self, request: Request, query: Array, key: Array, value: Array) -> Array:
        try:
            if self.backend.platform(query) != "cuda":
                return _attention(self.backend, request, query, key, value)
            with sdpa_kernel(_FUSED):
                return _attention(self.backend, request, query, key, value)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise RuntimeError(f"the engine {self.name!r} failed: {error}. {SWITCH.format(self.name)}") from error


class _Fused(torch.autograd.Function):  # type: ignore[misc]
    """The kernel with its own gradient, or the fallback's where a second derivative, or the same again, may follow."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, request: Request, fallback: Any, *arrays: Array) -> Array:
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in arrays]
        with torch.enable_grad():
            output = kernel.call(request, *inputs)
        ctx.once, ctx.fallback, ctx.graph = kernel.once, partial(_without, fallback, request), (output, inputs)
        ctx.save_for_backward(*arrays)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, doutput: Array) -> tuple[Any, ...]:
        second, again = torch.is_grad_enabled(), torch._C._autograd._get_current_graph_task_keep_graph()
        output, inputs = ctx.graph
        if second or (again and ctx.once):
            inputs = ctx.saved_tensors
            with torch.enable_grad():
                output = ctx.fallback(*inputs)
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[3:], strict=True) if needed]
        gradients = iter(torch.autograd.grad(output, wanted, doutput, retain_graph=again, create_graph=second))
        return (None, None, None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[3:]))


def _without(fallback: Callable[[Request], Array], request: Request, query: Array, key: Array, value: Array) -> Array:
    return fallback(request._replace(query=query, key=key, value=value))


def _attention(backend: Backend, request: Request, query: Array, key: Array, value: Array) -> Array:
    *batch, _, heads, depth = query.shape
    cuda = backend.platform(query) == "cuda"
    four = [x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (query, key, value)]
    multiple = _MULTIPLE if cuda else 1
    wide = -(-max(depth, value.shape[-1]) // multiple) * multiple
    if not depth == value.shape[-1] == wide:  # the kernels know one depth
        four = [torch.nn.functional.pad(x, (0, wide - x.shape[-1])) for x in four]
    causal = request.bias is None and isinstance(request.mask, masks.CausalMask) and request.mask.offset == 0
    shown, seen = (None, None) if causal else _shown(backend, request, query, key, batch)
    if cuda:
        four, shown = _for_cuda(four, shown, causal)
    output = torch.nn.functional.scaled_dot_product_attention(
        *four,
        attn_mask=shown,
        is_causal=causal,
        scale=None if depth == wide else depth**-0.5,
        enable_gqa=heads != four[1].shape[1],
    )
    if seen is not None:
        mean = four[2].mean(dim=-2, keepdim=True).repeat_interleave(heads // four[2].shape[1], dim=1)
        output = torch.where(seen, output, mean)
    return output.transpose(1, 2)[..., : value.shape[-1]].reshape(*query.shape[:-1], value.shape[-1])


def _shown(
    backend: Backend, request: Request, query: Array, key: Array, batch: list[int]
) -> tuple[Array | None, Array | None]:
    """What the kernel gets as mask or bias, and which queries see a key; None where they all do."""
    visible = seen = None
    if request.mask is not None:
        visible = pairs(torch, _visible(backend, request.mask, query, key), batch)
        seen = visible.any(dim=-1, keepdim=True)
        if backend.surely(seen, True):
            seen = None
        else:
            visible = visible | ~seen
    if request.bias is None:
        return visible, seen
    bias = pairs(torch, _bias(backend, request, query), batch)
    return (bias if visible is None else torch.where(visible, bias, -torch.inf)), seen


def _reached(backend: Backend, request: Request) -> bool:
    """Whether every query is shown a key whose bias is not too low; first by a few keys, which mostly tell."""
    query, key = request.query, request.key
    batch = list(query.shape[:-3])
    bias = pairs(torch, _bias(backend, request, query).detach(), batch)
    visible = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device)
    if request.mask is not None:
        visible = pairs(torch, _visible(backend, request.mask, query, key), batch)

    def reached(bias: Array, visible: Array) -> bool:
        largest = torch.where(visible, bias, -torch.inf).amax(dim=-1)
        return bool((largest >= least_bias(request.dtype)).all())

    step = max(key.shape[-3] // _SAMPLE, 1)
    return reached(*(x[..., ::step] for x in (bias, visible))) or reached(
        bias, visible | ~visible.any(dim=-1, keepdim=True)
    )


def _at_hand(bias: Any, mask: Any) -> bool:
    """Whether the values can be looked at: not in a compiler's trace, nor while a CUDA graph is recorded."""
    if torch.compiler.is_compiling():
        return False
    arrays = [bias, *(mask.arrays() if isinstance(mask, masks.Mask) else [mask])]
    tensors = [x.detach() for x in arrays if isinstance(x, torch.Tensor)]
    if any(type(x) is not torch.Tensor or x.device.type == "meta" for x in tensors):
        return False
    return not (any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())


def _for_cuda(four: list[Array], shown: Array | None, causal: bool) -> tuple[list[Array], Array | None]:
    """What the kernels on CUDA ask for besides: strides of one, and, but for flash, a key head for each query head."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in four)
    if shown is not None:
        shown = shown.expand(*shown.shape[:-1], key.shape[-2])
        shown = shown if shown.stride(-1) == 1 else shown.contiguous()
    flash = query.dtype != torch.float32 and shown is None and not (causal and query.shape[-2] != key.shape[-2])
    if not flash:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return [query, key, value], shown


def _bias(backend: Backend, request: Request, query: Array) -> Array:
    if not hasattr(request.bias, "shape"):
        return query.new_full((1, 1), float(request.bias))
    return backend.cast(request.bias, dtypes.promote(request.dtype, backend.dtype_name(request.bias)))


def _visible(backend: Backend, mask: Any, query: Array, key: Array) -> Array:
    """Where a query sees a key, ``[batch..., 1, q_length or 1, kv_length or 1]``."""
    if not isinstance(mask, masks.Mask):
        return backend.truth(mask)
    to = masks.Lowering(backend, tuple(query.shape[:-3]), (query.shape[-3], key.shape[-3]), query)
    return masks.visible(backend, mask.lower(to), tuple(to.arrays))


def _expands(request: Request) -> bool:
    """Whether the mask is one by rule that the kernels do not have, and that is as large as all pairs."""
    mask, parts = request.mask, masks.conjunction(request.mask)
    if request.bias is None and isinstance(mask, masks.CausalMask):
        return mask.offset != 0
    return any(
        isinstance(x, masks.Mask) and not (isinstance(x, masks.LengthMask) and x.query_lengths is None) for x in parts
    )


def _pairs(request: Request) -> int:
    return prod(request.query.shape[:-2]) * request.key.shape[-3]


def _transformed(*arrays: Array) -> bool:
    if torch.compiler.is_compiling():
        return False
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None
        for x in arrays
    )
