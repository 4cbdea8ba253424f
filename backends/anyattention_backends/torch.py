"""PyTorch: autocast is kept out, float32 softmax is PyTorch's own, and guests in bfloat16 find a way in."""

import ast
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch.autograd import forward_ad

from anyattention import dtypes
from anyattention.backend import Backend
from anyattention.blocks import Block, Group, Pairs, leaves, tree_map
from anyattention_backends.torch_flex import Flex
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
        heads = max(math.prod(block.lead), 1)
        most = 512 if block.pairs.counts is None or heads > 4 else 256  # bits are drawn in int64
        return max(64, min(most, 2**22 // (512 * heads))), 512

    def transpose(self, x: Array) -> Array:
        """Reason: speed."""
        return x.mT

    def logits(self, query: Array, key: Array, precision: Any, precise: bool) -> Array:
        """Reason: bits. BLAS sums one term after the other, and loses twice what XLA does: large sums are float64."""
        if not precise:
            return super().logits(query, key, precision, precise)
        return torch.matmul(query.double(), key.double().mT).to(query.dtype)

    def row_max(self, x: Array) -> Array:
        """Reason: speed. The weights do not depend on what is subtracted, so no derivative of it is needed."""
        return torch.amax(x.detach(), dim=-1, keepdim=True)

    def exp_minus(self, x: Array, shift: Array | None) -> Array:
        """Reason: speed. In place where possible."""
        if not _is_plain(x):
            return super().exp_minus(x, shift)
        return (x if shift is None else x.sub_(shift)).exp_()

    def power(self, x: Array) -> Array:
        """Reason: speed. As `exp_minus`."""
        return self.exp_minus(x, None)

    def times_minus(self, x: Array, y: Array, shift: Array) -> Array:
        """Reason: speed. In place where possible."""
        return y.sub_(shift).mul_(x) if _is_plain(x, y) else super().times_minus(x, y, shift)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        """Reason: speed. In place where possible, unless the mask enlarges it."""
        if not _is_plain(x, visible) or torch.broadcast_shapes(x.shape, visible.shape) != x.shape:
            return torch.where(visible, x, value)
        return x.masked_fill_(~visible, value)

    def inspects(self, x: Array) -> bool:
        """Reason: speed. The values are at hand, but for tensors without storage or in a trace."""
        return isinstance(x, torch.Tensor) and x.device.type == "cpu" and not torch.compiler.is_compiling()

    def surely(self, x: Any, value: bool) -> bool:
        """Reason: speed. As `inspects`."""
        if type(x) is not torch.Tensor or not self.inspects(x) or not _is_plain(x.detach()):
            return False
        return bool(x.all() if value else not x.any())

    def differentiable(
        self, forward: Callable[..., Any], backward: Callable[..., Any], call: Any, block: Block
    ) -> Array:
        """Reason: speed. The backward pass is the written one; autograd would keep every tile.

        Reason: speed. Compilers get one operator, not a program that grows with the number of tiles.
        """
        arrays = leaves(block)
        numbers = iter(range(len(arrays)))
        structure = tree_map(lambda _: next(numbers), block)
        if torch.compiler.is_compiling():
            text = _write((forward.__module__, *_told(call, block)))
            return _tiled(arrays, float(call.fill), float(call.keep_prob), text)[0]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in arrays):  # forward mode, which does not nest
            return forward(call, block)[0]
        return _Tiled.apply(forward, backward, call, structure, *arrays)[0]


def _is_plain(*arrays: Array) -> bool:
    """Whether the tensors may be overwritten: not to be differentiated, nor seen by a transformation."""
    return not any(x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in arrays)


def _leading(arrays: Sequence[Array], dims: Sequence[int | None]) -> list[Array]:
    """Tensors with the mapped axis first, of size 1 for those that are not mapped."""
    return [x[None] if dim is None else x.movedim(dim, 0) for x, dim in zip(arrays, dims, strict=True)]


def _pick(structure: Any, arrays: Sequence[Array]) -> Any:
    return tree_map(lambda index: arrays[index], structure)


class _Tiled(torch.autograd.Function):  # type: ignore[misc]
    """The tiled forward and backward pass as one step of autograd."""

    @staticmethod
    def forward(forward: Any, backward: Any, call: Any, structure: Any, *arrays: Array) -> tuple[Array, ...]:
        return forward(call, _pick(structure, arrays))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, ...]) -> None:
        *ctx.how, ctx.structure = inputs[:4]
        ctx.save_for_backward(*output, *inputs[4:])
        ctx.save_for_forward(*output, *inputs[4:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, doutput: Array, *_: Any) -> tuple[Any, ...]:
        forward, backward, call = ctx.how
        results, arrays = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        block = _pick(ctx.structure, arrays)
        if torch.is_grad_enabled():  # a second derivative may follow, through the row statistics too
            results = forward(call, block)
        gradients = backward(call, block, *results, doutput)
        wanted = (ctx.structure.rows[0], *ctx.structure.columns, ctx.structure.pairs.bias)
        by_index = dict(zip(wanted, gradients, strict=True))
        return (None, None, None, None, *(by_index.get(index) for index in range(len(arrays))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """PyTorch's own forward mode, which keeps nothing, through the tiles."""
        forward, _, call = ctx.how
        arrays = list(ctx.saved_tensors[3:])
        moved = {i: tangent for i, tangent in enumerate(tangents[4:]) if tangent is not None}

        def output(*primals: Array) -> Array:
            given = dict(zip(moved, primals, strict=True))
            return forward(call, _pick(ctx.structure, [given.get(i, x) for i, x in enumerate(arrays)]))[0]

        primals = tuple(arrays[i] for i in moved)
        return torch.func.jvp(output, primals, tuple(moved.values()))[1], None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, forward: Any, backward: Any, call: Any, structure: Any, *arrays: Array
    ) -> tuple[Any, Any]:
        """The mapped axis becomes one more lead axis."""
        return _Tiled.apply(forward, backward, call, structure, *_leading(arrays, in_dims[4:])), (0, 0, 0)


@torch.library.custom_op("anyattention::keep", mutates_args=())  # type: ignore[untyped-decorator]
def _keep(key: torch.Tensor, p: float, shape: Sequence[int]) -> torch.Tensor:
    return Backend(xp).keep(key, p, tuple(shape), key)


@_keep.register_fake  # type: ignore[untyped-decorator]
def _(key: torch.Tensor, p: float, shape: Sequence[int]) -> torch.Tensor:
    return key.new_empty(shape, dtype=torch.bool)


# --- the tiled implementation as an operator, which takes tensors and a text that says what to do with them ---


def _told(call: Any, block: Block) -> tuple[Any, ...]:
    """What a call knows beside its lengths, which may be symbols to a compiler, and which arrays the block has."""
    precision = None if call.precision is None else str(call.precision)
    bias, mask, counts, _ = block.pairs
    present = bias is not None, len(mask), None if counts is None else tuple(x is not None for x in counts)
    return call.dtype, call.precise, call.expression, precision, present


def _write(x: Any) -> str:
    """``repr`` of nested tuples, as compilers can trace it."""
    if isinstance(x, tuple):
        return "(" + "".join([_write(part) + "," for part in x]) + ")"
    return "'" + x + "'" if isinstance(x, str) else str(x)


def _read(arrays: Sequence[Array], fill: float, keep_prob: float, text: str) -> tuple[Any, Any, Block]:
    """The implementation, the call and the block of an operator's arguments."""
    module, dtype, precise, expression, precision, present = ast.literal_eval(text)
    has_bias, masks, has_counts = present
    query, key, value, *rest = arrays
    each = iter(rest)
    bias = next(each) if has_bias else None
    mask = tuple(next(each) for _ in range(masks))
    counts = None if has_counts is None else tuple(next(each) if here else None for here in has_counts)
    block = Block((query,), (key, value), Pairs(bias, mask, counts))
    tiled = importlib.import_module(module)
    call = tiled.Call(
        backend,
        dtype=dtype,
        root=max(query.shape[-1], 1) ** 0.5,
        fill=fill,
        keep_prob=keep_prob,
        tiles=backend.tiles(block, ruled=False),
        bias_axes=(False, False) if bias is None else tuple(size != 1 for size in bias.shape[-2:]),
        expression=expression,
        groups=(Group((0, query.shape[-2]), (0, key.shape[-2])),),
        precision=precision,
        precise=precise,
        skip=expression is not None and backend.inspects(query),
    )
    return tiled, call, block


@torch.library.custom_op("anyattention::tiled", mutates_args=())  # type: ignore[untyped-decorator]
def _tiled(arrays: Sequence[torch.Tensor], fill: float, keep_prob: float, text: str) -> list[torch.Tensor]:
    tiled, call, block = _read(arrays, fill, keep_prob, text)
    return list(tiled.forward(call, block))


@torch.library.custom_op("anyattention::tiled_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _tiled_backward(
    arrays: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    doutput: torch.Tensor,
    fill: float,
    keep_prob: float,
    text: str,
) -> list[torch.Tensor]:
    tiled, call, block = _read(arrays, fill, keep_prob, text)
    *gradients, dbias = tiled.backward(call, block, *results, doutput)
    return [x.clone() for x in (*gradients, *([] if dbias is None else [dbias]))]


def _differentiated(text: str) -> int:
    """How many of the arrays, from the first, have gradients: query, key, value, and a bias."""
    return 3 + ast.literal_eval(text)[-1][0]


@_tiled.register_fake  # type: ignore[untyped-decorator]
def _(arrays: Sequence[torch.Tensor], fill: float, keep_prob: float, text: str) -> list[torch.Tensor]:
    query, _, value = arrays[:3]
    return [query.new_empty((*query.shape[:-1], size)) for size in (value.shape[-1], 1, 1)]


@_tiled_backward.register_fake  # type: ignore[untyped-decorator]
def _(
    arrays: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    doutput: torch.Tensor,
    fill: float,
    keep_prob: float,
    text: str,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape, dtype=doutput.dtype) for x in arrays[: _differentiated(text)]]


@_tiled.register_vmap  # type: ignore[untyped-decorator]
def _(info: Any, in_dims: Any, arrays: Sequence[Array], fill: float, keep_prob: float, text: str) -> Any:
    return _tiled(_leading(arrays, in_dims[0]), fill, keep_prob, text), [0, 0, 0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Array]) -> None:
    arrays, *ctx.rest = inputs
    ctx.count = len(arrays)
    ctx.save_for_backward(*arrays, *output)


def _backward(ctx: Any, gradients: list[Array]) -> tuple[list[Array | None], None, None, None]:
    saved = list(ctx.saved_tensors)
    arrays, results = saved[: ctx.count], saved[ctx.count :]
    found = _tiled_backward(arrays, results, gradients[0], *ctx.rest)
    answer = [gradient.to(x.dtype) for gradient, x in zip(found, arrays, strict=False)]
    return [*answer, *(None for _ in arrays[len(answer) :])], None, None, None


_tiled.register_autograd(_backward, setup_context=_setup)


def _max(x: Array) -> Array:
    if not x.is_complex():
        return torch.amax(x, dim=-1, keepdim=True)
    real = torch.amax(x.real, dim=-1, keepdim=True)  # by real part, then by imaginary, as JAX orders them
    imaginary = torch.amax(torch.where(x.real == real, x.imag, -torch.inf), dim=-1, keepdim=True)
    return torch.complex(real, imaginary)


backend = TorchBackend(xp)
backend.engines = (SDPA(backend), Flex(backend))
