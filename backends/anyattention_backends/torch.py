"""PyTorch: autocast is kept out, float32 softmax is PyTorch's own, and guests in bfloat16 find a way in."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from anyattention import dtypes
from anyattention.backend import Backend
from anyattention.blocks import Block, leaves, tree_map
from anyattention_backends.torch_sdpa import SDPA

Array = Any
_NAMES = {
    getattr(torch, name): name
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
    )
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_STEPWISE = (torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


class TorchBackend(Backend):
    """Overrides for PyTorch tensors."""

    guests = (np.ndarray, np.bool_, np.uint32, np.int32, np.int64, np.float16, np.float32, np.float64)

    def platform(self, x: Array) -> str:
        return x.device.type

    def adopt(self, guest: Any, like: Array | None) -> Array:
        """Reason: missing. PyTorch cannot read NumPy's bfloat16, nor arrays it may not write to without a warning."""
        device = None if like is None else like.device
        if torch.compiler.is_compiling():  # NumPy arrays are tensors there already, and have no dtype
            return torch.as_tensor(guest, device=device)
        if not hasattr(guest, "dtype"):
            return torch.tensor(guest, device=device)
        name = dtypes.name_of(guest.dtype)
        if name == "bfloat16":
            return torch.tensor(guest.astype("float32"), dtype=torch.bfloat16, device=device)
        if any(stride < 0 for stride in getattr(guest, "strides", ())):
            guest = guest.copy()
        try:
            return torch.tensor(guest, device=device)
        except ValueError as error:  # bytes in the other order
            raise TypeError(f"PyTorch cannot take over an array of {name}: {error}") from None

    def adopt_key(self, words: Any) -> Any:
        """Reason: missing. uint32 has no arithmetic in PyTorch."""
        words = torch.tensor(words)
        if words.dtype != torch.uint32:
            raise TypeError(f"a dropout key must have dtype uint32, got {str(words.dtype).removeprefix('torch.')}")
        return words.to(torch.int64)

    def key_data(self, key: Any) -> Any:
        """Reason: missing. A key in int64 is unsigned words elsewhere."""
        words = key.cpu().numpy()
        return words.astype("uint32") if words.dtype == "int64" else words

    def dtype_name(self, x: Array) -> str:
        """Reason: speed."""
        return _NAMES.get(x.dtype) or str(x.dtype)

    def cast(self, x: Array, name: str) -> Array:
        """Reason: speed."""
        dtype = _DTYPES[name]
        return x if x.dtype is dtype else x.to(dtype)

    def run(self, like: Array, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Reason: bits. Autocast would compute the products in 16 bits."""
        if like.is_cpu and not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        device = like.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    def scale(self, query: Array, depth: int, dtype: str) -> Array:
        """Reason: missing. Under ``torch.compile(dynamic=True)`` the depth is a symbol until it is used as a length."""
        return super().scale(query, len(range(depth)), dtype)

    def check_precision(self, precision: Any, dot_general: Any, x: Array) -> None:
        """Reason: missing. On an accelerator PyTorch's own switch decides how float32 products are computed."""
        if precision is not None and x.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
            raise ValueError(
                f"precision={precision!r} is decided by PyTorch on {x.device.type}: call "
                "torch.set_float32_matmul_precision('highest') and pass None"
            )
        super().check_precision(precision, dot_general, x)

    def matmul(self, x: Array, y: Array, precision: Any = None, scratch: str = "") -> Array:
        """Reason: speed."""
        return torch.matmul(x, y)

    def permute_dims(self, x: Array, axes: tuple[int, ...]) -> Array:
        """Reason: speed."""
        return torch.permute(x, axes)

    def where(self, mask: Array, x: Array, fill: float) -> Array:
        """Reason: missing. ``torch.where`` refuses a complex array beside a real scalar."""
        return torch.where(self.truth(mask), x, complex(fill) if x.is_complex() else fill)

    def softmax(self, logits: Array) -> Array:
        """Reason: speed, and the gradient: the maximum must not take part in it. 16 bits are rounded step by step."""
        if logits.dtype not in _STEPWISE:
            return torch.softmax(logits, dim=-1)
        if logits.shape[-1] == 0:
            return logits
        weights = torch.exp(logits - _max(logits.detach()))
        return self.divide(weights, torch.sum(weights, dim=-1, keepdim=True))

    def keep(self, key: Any, keep_prob: Any, shape: tuple[int, ...], like: Array) -> Array:
        """Reason: missing. The key is brought to the device of the weights.

        Reason: speed. To inductor, twenty rounds of threefry are one expression, which takes forever to compile.
        """
        key = key.to(like.device)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return _keep(key, float(keep_prob), shape)
        return super().keep(key, keep_prob, shape, like)

    # --- tiles ---

    def tiles(self, block: Block, ruled: bool) -> tuple[int, int]:
        """Reason: speed. All heads at once, so that their keep bits are drawn once, in a few megabytes."""
        return max(64, min(512, 2**22 // (512 * max(math.prod(block.lead), 1)))), 512

    def transpose(self, x: Array) -> Array:
        """Reason: speed."""
        return x.mT

    def row_max(self, x: Array) -> Array:
        """Reason: speed. The weights do not depend on what is subtracted, so no derivative of it is needed."""
        return torch.amax(x.detach(), dim=-1, keepdim=True)

    def exp_minus(self, x: Array, shift: Array | None) -> Array:
        """Reason: speed. In place, unless it is to be differentiated."""
        if x.requires_grad:
            return super().exp_minus(x, shift)
        return (x if shift is None else x.sub_(shift)).exp_()

    def power(self, x: Array) -> Array:
        """Reason: speed. As `exp_minus`."""
        return self.exp_minus(x, None)

    def times_minus(self, x: Array, y: Array, shift: Array) -> Array:
        """Reason: speed. In place, unless it is to be differentiated."""
        if x.requires_grad or y.requires_grad:
            return super().times_minus(x, y, shift)
        return y.sub_(shift).mul_(x)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        """Reason: speed. In place, unless it is to be differentiated or is enlarged by the mask."""
        if x.requires_grad or torch.broadcast_shapes(x.shape, visible.shape) != x.shape:
            return torch.where(visible, x, value)
        return x.masked_fill_(~visible, value)

    def inspects(self, x: Array) -> bool:
        """Reason: speed. The values are at hand, but for tensors without storage or in a trace."""
        return isinstance(x, torch.Tensor) and x.device.type == "cpu" and not torch.compiler.is_compiling()

    def surely(self, x: Any, value: bool) -> bool:
        """Reason: speed. As `inspects`."""
        if type(x) is not torch.Tensor or not self.inspects(x):
            return False
        return bool(x.all() if value else not x.any())

    def differentiable(
        self, forward: Callable[..., Any], backward: Callable[..., Any], call: Any, block: Block
    ) -> Array:
        """Reason: speed. The backward pass is the written one; autograd would keep every tile."""
        arrays = leaves(block)
        numbers = iter(range(len(arrays)))
        structure = tree_map(lambda _: next(numbers), block)
        return _Tiled.apply(forward, backward, call, structure, *arrays)[0]


def _block(structure: Any, arrays: Sequence[Array]) -> Block:
    return tree_map(lambda index: arrays[index], structure)


class _Tiled(torch.autograd.Function):  # type: ignore[misc]
    """The tiled forward and backward pass as one step of autograd."""

    @staticmethod
    def forward(forward: Any, backward: Any, call: Any, structure: Any, *arrays: Array) -> tuple[Array, ...]:
        return forward(call, _block(structure, arrays))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, ...]) -> None:
        *ctx.how, ctx.structure = inputs[:4]
        ctx.save_for_backward(*output, *inputs[4:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, doutput: Array, *_: Any) -> tuple[Any, ...]:
        forward, backward, call = ctx.how
        results, arrays = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        block = _block(ctx.structure, arrays)
        if torch.is_grad_enabled():  # a second derivative may follow, through the row statistics too
            results = forward(call, block)
        gradients = backward(call, block, *results, doutput)
        wanted = (ctx.structure.rows[0], *ctx.structure.columns, ctx.structure.pairs.bias)
        by_index = dict(zip(wanted, gradients, strict=True))
        return (None, None, None, None, *(by_index.get(index) for index in range(len(arrays))))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, forward: Any, backward: Any, call: Any, structure: Any, *arrays: Array
    ) -> tuple[Any, Any]:
        """The mapped axis becomes one more lead axis."""
        dims = in_dims[4:]
        moved = [x[None] if d is None else x.movedim(d, 0) for x, d in zip(arrays, dims, strict=True)]
        return _Tiled.apply(forward, backward, call, structure, *moved), (0, 0, 0)


@torch.library.custom_op("anyattention::keep", mutates_args=())  # type: ignore[untyped-decorator]
def _keep(key: torch.Tensor, p: float, shape: Sequence[int]) -> torch.Tensor:
    return Backend(xp).keep(key, p, tuple(shape), key)


@_keep.register_fake  # type: ignore[untyped-decorator]
def _(key: torch.Tensor, p: float, shape: Sequence[int]) -> torch.Tensor:
    return key.new_empty(shape, dtype=torch.bool)


def _max(x: Array) -> Array:
    if not x.is_complex():
        return torch.amax(x, dim=-1, keepdim=True)
    real = torch.amax(x.real, dim=-1, keepdim=True)  # by real part, then by imaginary, as JAX orders them
    imaginary = torch.amax(torch.where(x.real == real, x.imag, -torch.inf), dim=-1, keepdim=True)
    return torch.complex(real, imaginary)


backend = TorchBackend(xp)
backend.engines = (SDPA(backend),)
