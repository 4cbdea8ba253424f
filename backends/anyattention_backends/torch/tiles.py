"""Tiles in PyTorch: all heads at once, in place where nothing is differentiated, one step of autograd."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from anyattention._src.blocks import Block, leaves, tree_map
from anyattention._src.interfaces import Function
from anyattention.extend import Tiles
from anyattention_backends.torch import compat, operators

Array = Any


class TorchTiles(Tiles):
    def sizes(self, block: Block, ruled: bool) -> tuple[int, int]:
        """All heads at once, so that their keep bits are drawn once, in a few megabytes."""
        heads = max(math.prod(block.lead), 1)
        most = 512 if block.pairs.counts is None or heads > 4 else 256  # bits are drawn in int64
        return max(64, min(most, 2**22 // (512 * heads))), 512

    def transpose(self, x: Array) -> Array:
        return x.mT

    def logits(self, query: Array, key: Array, precision: Any, precise: bool) -> Array:
        """BLAS sums one term after the other, and loses twice what XLA does: large sums are float64."""
        if not precise:
            return super().logits(query, key, precision, precise)
        return torch.matmul(query.double(), key.double().mT).to(query.dtype)

    def row_max(self, x: Array) -> Array:
        """The weights do not depend on what is subtracted, so no derivative of it is needed."""
        return torch.amax(x.detach(), dim=-1, keepdim=True)

    def exp_minus(self, x: Array, shift: Array | None) -> Array:
        if not _is_plain(x):
            return super().exp_minus(x, shift)
        return (x if shift is None else x.sub_(shift)).exp_()

    def power(self, x: Array) -> Array:
        return self.exp_minus(x, None)

    def times_minus(self, x: Array, y: Array, shift: Array) -> Array:
        return y.sub_(shift).mul_(x) if _is_plain(x, y) else super().times_minus(x, y, shift)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        """In place where possible, unless the mask enlarges it."""
        if not _is_plain(x, visible) or torch.broadcast_shapes(x.shape, visible.shape) != x.shape:
            return torch.where(visible, x, value)
        return x.masked_fill_(~visible, value)

    def key_words(self, key: Any, like: Array) -> Array:
        return key.to(like.device)

    def differentiable(self, forward: Function, backward: Function, tiling: Any, block: Block) -> Array:
        """The backward pass is the written one; autograd would keep every tile."""
        if torch.compiler.is_compiling():  # one operator, not a program that grows with the number of tiles
            return operators.tiled(tiling, block)
        arrays = leaves(block)
        if any(forward_ad.unpack_dual(x).tangent is not None for x in arrays):  # forward mode, which does not nest
            return forward(tiling, block)[0]
        numbers = iter(range(len(arrays)))
        structure = tree_map(lambda _: next(numbers), block)
        return _Tiled.apply(forward, backward, tiling, structure, *arrays)[0]


def _is_plain(*arrays: Array) -> bool:
    """Whether the tensors may be overwritten: not to be differentiated, nor seen by a transformation."""
    return not any(x.requires_grad or compat.is_wrapped(x) for x in arrays)


def _pick(structure: Any, arrays: Sequence[Array]) -> Any:
    return tree_map(lambda index: arrays[index], structure)


class _Tiled(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(forward: Any, backward: Any, tiling: Any, structure: Any, *arrays: Array) -> tuple[Array, ...]:
        return forward(tiling, _pick(structure, arrays))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, ...]) -> None:
        *ctx.how, ctx.structure = inputs[:4]
        ctx.save_for_backward(*output, *inputs[4:])
        ctx.save_for_forward(*output, *inputs[4:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, doutput: Array, *_: Any) -> tuple[Any, ...]:
        forward, backward, tiling = ctx.how
        results, arrays = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        block = _pick(ctx.structure, arrays)
        if torch.is_grad_enabled():  # a second derivative may follow, through the row statistics too
            results = forward(tiling, block)
        gradients = backward(tiling, block, *results, doutput)
        wanted = (ctx.structure.rows[0], *ctx.structure.columns, ctx.structure.pairs.bias)
        by_index = dict(zip(wanted, gradients, strict=True))
        return (None, None, None, None, *(by_index.get(index) for index in range(len(arrays))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """PyTorch's own forward mode, which keeps nothing, through the tiles."""
        forward, _, tiling = ctx.how
        arrays = list(ctx.saved_tensors[3:])
        moved = {i: tangent for i, tangent in enumerate(tangents[4:]) if tangent is not None}

        def output(*primals: Array) -> Array:
            given = dict(zip(moved, primals, strict=True))
            return forward(tiling, _pick(ctx.structure, [given.get(i, x) for i, x in enumerate(arrays)]))[0]

        primals = tuple(arrays[i] for i in moved)
        return torch.func.jvp(output, primals, tuple(moved.values()))[1], None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        """The mapped axis becomes one more lead axis."""
        return _Tiled.apply(*inputs[:4], *operators.leading(inputs[4:], in_dims[4:])), (0, 0, 0)
