"""PyTorch's `scaled_dot_product_attention` on CPU, where its flash kernel has Flax's meaning.

The kernel gives zero to a query that sees no key; Flax gives it the mean of all values. Such queries are shown every
key, and their output is replaced, so that their gradients are Flax's too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from anyattention import dtypes, masks
from anyattention.backend import Backend
from anyattention.engine import Engine
from anyattention.request import Request

Array = Any


class SDPA(Engine):
    """The flash kernel for CPU."""

    name = "sdpa"

    def refusals(self, request: Request) -> list[str]:
        dtype, query, key, value, bias, mask = request[:6]
        ruled = isinstance(mask, masks.Mask)
        checks = {
            f"it is not checked on {query.device.type}": query.device.type != "cpu",
            f"there is no kernel for {dtype}": dtype not in ("float32", "float64", "bfloat16", "float16"),
            "a softmax in float32 of 16-bit arrays returns float32": request.force_fp32 and "16" in dtype,
            "dropout bits are its own": request.dropout is not None,
            "something is empty": 0 in (*query.shape, *key.shape, *value.shape),
            "beside a bias, finfo.min is no mask": bias is not None and mask is not None,
            "bias or mask has axes that query and key lack": not _fits(request),
            f"{type(mask).__name__} would be expanded": ruled and not _known(mask),
            "torch.func and forward mode need derivatives that it lacks": _transformed(query, key, value),
        }
        if hasattr(bias, "shape"):
            wide = dtypes.promote(dtype, self.backend.dtype_name(bias))
            checks["the bias needs a gradient"] = bias.requires_grad
            checks[f"the bias makes logits {wide}"] = wide not in (dtype, "float32")
        return [reason for reason, holds in checks.items() if holds]

    def attention(self, request: Request, fallback: Callable[[Array, Array, Array], Array]) -> Array:
        query, key, value = request.query, request.key, request.value
        if request.precision is not None:
            self.backend.check_precision(request.precision, None, query)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return _attention(self.backend, request, query, key, value)
        if not (query.requires_grad or key.requires_grad or value.requires_grad):
            return _attention(self.backend, request, query, key, value)
        return _Fused.apply(
            self.backend, request._replace(query=None, key=None, value=None), fallback, query, key, value
        )


class _Fused(torch.autograd.Function):  # type: ignore[misc]
    """The kernel with its own gradient, unless a second derivative may follow: then the fallback's."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, request: Request, fallback: Any, *arrays: Array) -> Array:
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in arrays]
        with torch.enable_grad():
            output = _attention(backend, request, *inputs)
        ctx.fallback, ctx.graph = fallback, (output, inputs)
        ctx.save_for_backward(*arrays)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, doutput: Array) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()
        output, inputs = ctx.graph
        if again:
            inputs = ctx.saved_tensors
            output = ctx.fallback(*inputs)
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[3:], strict=True) if needed]
        gradients = iter(torch.autograd.grad(output, wanted, doutput, create_graph=again, retain_graph=True))
        return (None, None, None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[3:]))


def _attention(backend: Backend, request: Request, query: Array, key: Array, value: Array) -> Array:
    *batch, _, heads, depth = query.shape
    four = [x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (query, key, value)]
    options: dict[str, Any] = {"enable_gqa": True} if heads != key.shape[-2] else {}
    if value.shape[-1] != depth:  # the kernel knows one depth
        wide = max(depth, value.shape[-1])
        four = [torch.nn.functional.pad(x, (0, wide - x.shape[-1])) for x in four]
        options["scale"] = depth**-0.5
    causal = isinstance(request.mask, masks.CausalMask)
    seen = infinite = None
    if request.bias is not None:
        bias = _pairs(_bias(backend, request, query), batch)
        infinite = torch.amax(bias, dim=-1, keepdim=True) == -torch.inf
        options["attn_mask"] = bias
    elif request.mask is not None and not causal:
        visible = _pairs(_visible(backend, request.mask, query, key), batch)
        seen = visible.any(dim=-1, keepdim=True)
        if backend.surely(seen, True):
            seen = None
        options["attn_mask"] = visible if seen is None else visible | ~seen
    output = torch.nn.functional.scaled_dot_product_attention(*four, is_causal=causal, **options)
    if seen is not None:
        mean = four[2].mean(dim=-2, keepdim=True).repeat_interleave(heads // key.shape[-2], dim=1)
        output = torch.where(seen, output, mean)
    if infinite is not None and not backend.surely(infinite, False):
        output = output * torch.where(infinite, torch.nan, 1.0).to(output.dtype)  # as a softmax, gradient and all
    return output.transpose(1, 2)[..., : value.shape[-1]].reshape(*query.shape[:-1], value.shape[-1])


def _bias(backend: Backend, request: Request, query: Array) -> Array:
    if not hasattr(request.bias, "shape"):
        return torch.full((1, 1), float(request.bias), dtype=query.dtype)
    return backend.cast(request.bias, dtypes.promote(request.dtype, backend.dtype_name(request.bias)))


def _visible(backend: Backend, mask: Any, query: Array, key: Array) -> Array:
    """Where a query sees a key, ``[batch..., 1, q_length or 1, kv_length or 1]``."""
    if not isinstance(mask, masks.Mask):
        return backend.truth(mask)
    to = masks.Lowering(backend, tuple(query.shape[:-3]), (query.shape[-3], key.shape[-3]), query)
    return masks.visible(backend, mask.lower(to), tuple(to.arrays))


def _pairs(x: Array, batch: list[int]) -> Array:
    """A bias or mask with one batch axis."""
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + tuple(x.shape))
    if len(batch) != 1:
        same = all(size == 1 for size in x.shape[: len(batch)])
        x = x.reshape(1, *x.shape[-3:]) if same else x.expand(*batch, *x.shape[-3:]).reshape(-1, *x.shape[-3:])
    return x


def _fits(request: Request) -> bool:
    query, key = request.query, request.key
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    for x in (request.bias, request.mask):
        if hasattr(x, "shape") and not isinstance(x, masks.Mask):
            sizes = zip(reversed(x.shape), reversed(shape), strict=False)
            if x.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
                return False
    return True


def _known(mask: Any) -> bool:
    """Masks that the kernel has, or that are small."""
    if isinstance(mask, masks.CausalMask):
        return mask.offset == 0
    return isinstance(mask, masks.LengthMask) and mask.query_lengths is None


def _transformed(*arrays: Array) -> bool:
    if torch.compiler.is_compiling():
        return False
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None
        for x in arrays
    )
