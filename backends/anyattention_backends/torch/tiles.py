"""Tiles in PyTorch: all heads at once, in place where nothing is differentiated, one step of autograd."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from anyattention._src.blocks import Block, Group, Sizes, cut_lead, cut_rows, lead_parts, leaves, tree_map
from anyattention._src.interfaces import Function, OfTiles, Pair
from anyattention.extend import Call, Tiles
from anyattention_backends.torch import compat, flash, operators, ranks

Array = Any
_LOG2_E = math.log2(math.e)
_FEW_THREADS = 8  # of PyTorch, with which its tanh takes little longer than NumPy's on one thread


class TorchTiles(Tiles):
    kernel = flash

    @property
    def most_groups(self) -> int:  # type: ignore[override]
        """None in a trace, where lengths may be symbols."""
        return 0 if torch.compiler.is_compiling() or compat.is_traced() else 2**31

    def sizes(self, block: Block, ruled: bool) -> tuple[int, int]:
        """All heads at once, so that their keep bits are drawn once, in a few megabytes."""
        heads = max(block.heads, 1)
        most = 512 if block.pairs.counts is None or heads > 4 else 256  # bits are drawn in int64
        return max(64, min(most, 2**22 // (512 * heads))), 512

    def map_rows(
        self, function: OfTiles, block: Block, groups: Sequence[Group], sizes: Sizes, like: Pair, draw: Any = None
    ) -> Pair:
        """One batch entry at a time: the bits of a product depend on its strides, and on how many there are.

        Keep bits that entries share are drawn once.
        """
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in leaves(block))
        if block.pairs.bounds is None or differentiated or compat.is_transformed():
            block = block._replace(pairs=block.pairs._replace(bounds=None))
            return super().map_rows(function, block, groups, sizes, like)
        entries, parts = lead_parts(block.lead, block.heads), [x for group in groups for x in group.split(sizes[0])]
        shared = draw and len(entries) > 1 and all(set(x.shape[:-2]) == {1} for x in leaves(block.pairs.counts))
        order = [(part, lead) for part in parts for lead in entries]
        if not (shared and leaves(block.pairs.counts)):  # each entry is copied once
            order = [(part, lead) for lead in entries for part in parts]
        rows: Any = None
        sums: Any = None
        at: Any = None, None
        for part, lead in order:
            if part is not at[0]:
                tile = cut_rows(block, *part.rows)
                if shared:
                    tile = tile._replace(pairs=tile.pairs._replace(counts=_drawn(draw, tile.pairs.counts, sizes[1])))
            if lead is not at[1]:
                columns = tuple(map(Tensor.contiguous, cut_lead(block.columns, lead)))
            at = part, lead
            entry = cut_lead(tile, lead)
            entry = entry._replace(rows=tuple(map(Tensor.contiguous, entry.rows)), columns=columns)
            group = part._replace(rows=(0, part.rows[1] - part.rows[0]))
            found = super().map_rows(function, entry, (group,), sizes, like)
            rows = _added(rows, found[0], like[0], lead, block.lengths[0], part.rows)
            sums = _added(sums, found[1], like[1], lead)
        return rows, sums

    def transpose(self, x: Array) -> Array:
        return x.mT

    def logits(self, query: Array, key: Array, precision: Any, precise: bool) -> Array:
        """BLAS sums one term after the other, and loses twice what XLA does: large sums are float64."""
        if not precise:
            return super().logits(query, key, precision, precise)
        try:
            return torch.matmul(query.double(), key.double().mT).to(query.dtype)
        except TypeError:  # MPS has no float64
            return super().logits(query, key, precision, precise)

    def norms(self, x: Array) -> Array:
        """In a tenth of the time of `vecdot`, which makes an array of all products."""
        return torch.linalg.vector_norm(x.detach(), dim=-1)

    def row_max(self, x: Array) -> Array:
        """The weights do not depend on what is subtracted, so no derivative of it is needed."""
        return torch.amax(x.detach(), dim=-1, keepdim=True)

    def exp_minus(self, x: Array, shift: Array | None) -> Array:
        """By powers of two where exponents may be low: `torch.exp` takes up to 30 times as long below -87."""
        if not _is_plain(
            x, *([] if shift is None else [shift])
        ):  # of which one may be saved for the other's derivative
            return super().exp_minus(x, shift)
        return x.exp_() if shift is None else x.sub_(shift).mul_(_LOG2_E).exp2_()

    def power(self, x: Array) -> Array:
        return self.exp_minus(x, None)

    def times_minus(self, x: Array, y: Array, shift: Array) -> Array:
        return y.sub_(shift).mul_(x) if _is_plain(x, y) else super().times_minus(x, y, shift)

    def cap(self, x: Array, cap: float, again: bool) -> tuple[Array, Array | None]:
        """By NumPy's tanh on a CPU: of two million numbers 0.4 ms and 1.4 ulp, in place of 4.4 ms and 0.5 ulp.

        By `expm1` it would take 2.1 ms. By `sigmoid` it would take 0.5, but all digits of small logits would be lost.
        """
        if not _is_plain(x):
            return super().cap(x, cap, again)
        if _shares_memory_with_numpy(x) and torch.get_num_threads() <= _FEW_THREADS:
            numbers = x.numpy()
            np.tanh(numbers, out=numbers)
        else:
            x.tanh_()
        return (x * cap, x) if again else (x.mul_(cap), None)

    def uncap(self, x: Array, tanh: Array) -> Array:
        if not _is_plain(x, tanh):
            return super().uncap(x, tanh)
        return torch.addcmul(x, x, tanh.square_(), value=-1, out=tanh)

    def plus(self, x: Array, y: Array) -> Array:
        """In place where possible, unless the bias enlarges it."""
        if not _is_plain(x, y) or torch.broadcast_shapes(x.shape, y.shape) != x.shape:
            return x + y
        return x.add_(y)

    def fill(self, x: Array, visible: Array, value: float) -> Array:
        """In place where possible, unless the mask enlarges it."""
        if not _is_plain(x, visible) or torch.broadcast_shapes(x.shape, visible.shape) != x.shape:
            return torch.where(visible, x, value)
        return x.masked_fill_(~visible, value)

    def span(self, visible: Array) -> Sizes:
        """By the largest byte of each column: `any` takes 40 times as long, a millisecond for 512 rows of 8 heads."""
        rows = visible.reshape(-1, visible.shape[-1])
        return super().span(rows.view(torch.uint8).amax(dim=0, keepdim=True).bool())

    def no_tiles(self, call: Call, by_rule: bool = False) -> str:
        if not (torch.compiler.is_compiling() or compat.is_traced()):
            return ""
        for rules, rule in (("masks", call.operands.mask), ("biases", call.operands.bias)):
            if getattr(rule, "functions", ()):
                return (
                    f"in a trace it is one operator, which takes tensors but no function of {rules}.Rule: join other "
                    f"{rules}, pass the array of to_array, or implementation='exact'"
                )
        return "ONNX lacks the operator that it is in a trace" if compat.exports_to_onnx() else ""

    def key_words(self, key: Any, like: Array) -> Array:
        return operators.beside(key.to(like.device), like)

    def differentiable(self, forward: Function, backward: Function, tiling: Any, block: Block) -> Any:
        """The backward pass is the written one; autograd would keep every tile."""
        if tiling.options.spread is not None:
            return ranks.differentiable(tiling, block)
        if torch.compiler.is_compiling():  # one operator, not a program that grows with the number of tiles
            return operators.tiled(tiling, block)
        arrays = leaves(block)
        if any(forward_ad.unpack_dual(x).tangent is not None for x in arrays):  # forward mode, which does not nest
            return forward(tiling, block)
        if compat.is_traced():  # which has no Function in it, nor torch.func an operator's derivative
            return forward(tiling, block) if compat.differentiates() else operators.tiled(tiling, block)
        if not compat.is_transformed():  # a bias that is fixed needs no gradient
            tiling = tiling._replace(of_bias=any(x.requires_grad for x in (*block.pairs.bias, *block.parameters)))
        numbers = iter(range(len(arrays)))
        structure = tree_map(lambda _: next(numbers), block)
        return _Tiled.apply(How(forward, backward, tiling, structure), *arrays)


def _drawn(draw: Any, counts: Any, size: int) -> Array:
    """The keep bits of some rows, some columns at a time; None without dropout."""

    def cut(start: int) -> Any:
        return tree_map(lambda x: x if x.shape[-1] == 1 else x[..., start : start + size], counts)

    length = max((x.shape[-1] for x in leaves(counts)), default=0)
    return torch.cat([draw(cut(i)) for i in range(0, length, size)], dim=-1) if length else None


def _added(whole: Any, found: Any, like: Any, lead: Any, length: int = 0, rows: Sizes | None = None) -> Any:
    """The whole with what was found of some entries, and some rows; first it is zeros."""
    if whole is None:
        whole = tree_map(lambda x, y: x.new_zeros((*y.shape[:-2], length or x.shape[-2], x.shape[-1])), found, like)
    part = cut_lead(whole, lead)
    tree_map(lambda x, y: (x if rows is None else x[..., slice(*rows), :]).add_(y), part, found)
    return whole


def _is_plain(*arrays: Array) -> bool:
    """Whether the tensors may be overwritten: not to be differentiated, nor seen by a transformation."""
    return not any(x.requires_grad or compat.is_wrapped(x) for x in arrays)


def _shares_memory_with_numpy(x: Array) -> bool:
    """Whether what NumPy does to the tensor is what PyTorch would do: no derivative or trace is under way."""
    return type(x) is Tensor and x.device.type == "cpu" and not (compat.is_transformed() or compat.is_traced())


class How(NamedTuple):
    """Both passes, how tiles are cut, and the block with numbers in place of its arrays."""

    forward: Function
    backward: Function
    tiling: Any
    structure: Block

    def block(self, arrays: Sequence[Array]) -> Block:
        return tree_map(lambda index: arrays[index], self.structure)

    @property
    def partial(self) -> bool:
        """Whether the total has a gradient too."""
        return bool(self.tiling.options.partial)

    def differentiated(self, arrays: Sequence[Array]) -> list[int]:
        """The numbers of query, key, value and, if there are any, of those of the bias and of the sinks."""
        structure, axes = self.structure, self.tiling.bias_axes
        bias = [index for index, has in zip(structure.pairs.bias, axes, strict=True) if has is not None]
        bias += [index for index in structure.parameters if arrays[index].is_floating_point()]
        sinks = [] if structure.pairs.sinks is None else [structure.pairs.sinks]
        return [structure.rows[0], *structure.columns, *(bias if self.tiling.of_bias else []), *sinks]

    def gradients(self, results: Sequence[Array], given: Sequence[Array]) -> list[Array]:
        """Of those, from that of the output, of a partial that of the total, and the arrays; no autocast counts."""
        of, arrays = (given[:2], given[2:]) if self.partial else (given[:1], given[1:])
        block = self.block(arrays)
        found = operators.without_autocast(of[0], self.backward, self.tiling, block, *results, *of)
        return [*(operators.as_returned(x, block) for x in found[:3]), *leaves(found[3:])]


class _Tiled(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(how: How, *arrays: Array) -> tuple[Array, ...]:
        block = how.block(arrays)
        output, base, total = how.forward(how.tiling, block)
        return operators.as_returned(output, block), base, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, ...]) -> None:
        ctx.how, *arrays = inputs
        ctx.save_for_backward(*output, *arrays)
        ctx.save_for_forward(*output, *arrays)
        ctx.mark_non_differentiable(*(output[1:2] if ctx.how.partial else output[1:]))

    @staticmethod
    def backward(ctx: Any, doutput: Array, _: Any, dtotal: Any) -> tuple[Any, ...]:
        how, saved = ctx.how, ctx.saved_tensors  # read once: a checkpoint unpacks each tensor only once
        results, arrays = saved[:3], saved[3:]
        given = (doutput, *([dtotal] if how.partial else []), *arrays)
        if not torch.is_grad_enabled():
            found = compat.mapped(lambda *x: how.gradients(x[:3], x[3:]), *results, *given)
        elif compat.is_transformed():  # a second derivative may follow, through the row statistics too
            found = how.gradients(how.forward(how.tiling, how.block(arrays)), given)
        else:
            found = compat.mapped(lambda *x: _Gradient.apply(how, *x), *results, *given)
        by_index = dict(zip(how.differentiated(arrays), found, strict=True))
        return (None, *(by_index.get(index) for index in range(len(arrays))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """PyTorch's own forward mode, which keeps nothing, through the tiles."""
        how, arrays = ctx.how, list(ctx.saved_tensors[3:])
        moved = {i: tangent for i, tangent in enumerate(tangents[1:]) if tangent is not None}

        def results(*primals: Array) -> tuple[Array, Array]:
            given = dict(zip(moved, primals, strict=True))
            return how.forward(how.tiling, how.block([given.get(i, x) for i, x in enumerate(arrays)]))[::2]

        primals = tuple(arrays[i] for i in moved)
        output, total = torch.func.jvp(results, primals, tuple(moved.values()))[1]
        return output, None, total if how.partial else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, how: How, *arrays: Any) -> tuple[Any, Any]:
        """The mapped axis becomes one more lead axis."""
        return _Tiled.apply(how, *operators.leading(arrays, in_dims[1:])), (0, 0, 0)


class _Gradient(torch.autograd.Function):  # type: ignore[misc]
    """The gradients, which can be differentiated again: by autograd through the tiles, once that is asked for."""

    @staticmethod
    def forward(ctx: Any, how: How, *arrays: Array) -> tuple[Array, ...]:
        ctx.how = how
        ctx.save_for_backward(*arrays[3:])
        return tuple(how.gradients(arrays[:3], arrays[3:]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> tuple[Any, ...]:
        how, saved = ctx.how, ctx.saved_tensors
        first = 2 if how.partial else 1
        wanted = [*range(first), *(index + first for index in how.differentiated(saved[first:]))]

        def found(*given: Array) -> list[Array | None]:
            with torch.enable_grad():  # each a tensor of its own, of which none depends on another
                inputs = [x.view_as(x) if again else x.detach() for x in given[: len(saved)]]
                for x in [] if again else [inputs[index] for index in wanted]:
                    x.requires_grad_()
                results = run(inputs[0], how.forward, how.tiling, how.block(inputs[first:]))  # row statistics too
                gradients = how.gradients(results, inputs)
                of = [inputs[index] for index in wanted if inputs[index].requires_grad]
                both = [pair for pair in zip(gradients, given[len(saved) :], strict=True) if pair[0].requires_grad]
                each = iter(run(inputs[0], _grad, *zip(*both, strict=True), of, again))
                return [next(each) if inputs[index].requires_grad else None for index in wanted]

        again, run = torch.is_grad_enabled(), operators.without_autocast
        by_index = dict(zip(wanted, compat.mapped(found, *saved, *cotangents), strict=True))
        return (None, None, None, None, *(by_index.get(index) for index in range(len(saved))))


def _grad(outputs: Any, cotangents: Any, inputs: Any, again: bool) -> Any:
    return torch.autograd.grad(outputs, inputs, cotangents, create_graph=again, allow_unused=True)
