"""Ranks of a process group, of which each has a part of the sequence: what they send, and autograd around it."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anyattention._src import ring
from anyattention._src.blocks import Block, leaves, tree_map
from anyattention._src.interfaces import Axis, Exchange
from anyattention._src.tiles.tiling import Tiling
from anyattention_backends.torch import compat, dtensors, operators

_FORM = (
    "pass a process group, such as torch.distributed.group.WORLD, or a one-dimensional DeviceMesh, such as mesh['seq']"
)
_SECOND = (
    "a sequence over several ranks has its first derivative in reverse mode alone: for others gather it, as "
    "DTensor.full_tensor does, and pass implementation='exact' or 'tiled' without sequence_axis"
)
#: By process group, the shapes that its ranks have compared.
_compared: Any = WeakKeyDictionary()


class Ranks(Exchange):
    """A process group. Each message that does not come is an error, after the group's timeout at the latest."""

    def __init__(self, group: Any, name: str) -> None:
        import torch.distributed as dist

        super().__init__(dist.get_world_size(group), dist.get_rank(group))
        self.group, self.name, self.turn = group, name, 0
        self.ranks = dist.get_process_group_ranks(group)

    def send(self, arrays: Sequence[Tensor]) -> Any:
        return self._exchanged(arrays, (self.index + 1) % self.size, (self.index - 1) % self.size)

    def receive(self, pending: Any) -> list[Tensor]:
        works, fresh, _, source = pending
        return self._noted(source, lambda: ([work.wait() for work in works], fresh)[1])

    def arrived(self, arrays: Sequence[Tensor]) -> Any:
        return [], list(arrays), None, self.index

    def permuted(self, x: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
        target = next(target for source, target in pairs if source == self.index)
        source = next(source for source, target in pairs if target == self.index)
        return x if target == self.index else self.receive(self._exchanged([x], target, source))[0]

    def sum(self, x: Tensor) -> Tensor:
        return self._reduced(x, "SUM")

    def maximum(self, x: Tensor) -> Tensor:
        return self._reduced(x, "MAX")

    def repeat(self, step: Callable[[Any, Any], Any], carry: Any, count: int) -> Any:
        for turn in range(count):
            carry = step(carry, turn)
            self.turn = turn + 1
        return carry

    def add(self, x: Tensor, part: Tensor, start: int, axis: int) -> Tensor:
        x.narrow(axis, start, part.shape[axis]).add_(part)
        return x

    def _exchanged(self, arrays: Sequence[Tensor], target: int, source: int) -> Any:
        """Messages that are under way, what they fill, and what has to stay till then."""
        import torch.distributed as dist

        sent = [x.contiguous() for x in arrays]
        fresh = [torch.empty_like(x) for x in sent]
        group = {"group": self.group}
        messages = [dist.P2POp(dist.isend, x, self.ranks[target], **group) for x in sent]
        messages += [dist.P2POp(dist.irecv, x, self.ranks[source], **group) for x in fresh]
        return self._noted(source, lambda: dist.batch_isend_irecv(messages)), fresh, sent, source

    def _reduced(self, x: Tensor, how: str) -> Tensor:
        import torch.distributed as dist

        x = x.clone(memory_format=torch.contiguous_format)
        self._noted(None, lambda: dist.all_reduce(x, op=getattr(dist.ReduceOp, how), group=self.group))
        return x

    def _noted(self, source: int | None, function: Callable[[], Any]) -> Any:
        """What a function returns; an error of it says where in the exchange it was."""
        try:
            return function()
        except RuntimeError as error:
            of = "all ranks" if source is None else f"rank {self.ranks[source]}"
            error.add_note(
                f"anyattention: rank {self.ranks[self.index]} of {self.name}, turn {self.turn} of {self.size}, waiting "
                f"for {of}, which has failed, is late, or was called with other shapes"
            )
            raise


def axis_of(axis: Any, query: Tensor, key: Tensor) -> Axis | None:
    """The ranks of a group or mesh, on which these are parts of the sequence.

    Raises:
        TypeError, ValueError: no group, or shapes that are not the same on every rank.
    """
    return None if axis is None else _axis_of(axis, query, key)


@compat.uncompiled
def _axis_of(axis: Any, query: Tensor, key: Tensor) -> Axis:
    if dtensors.is_spread(query):
        raise ValueError("DTensors say by their placements how the sequence is spread: leave sequence_axis out")
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if axis is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"this rank, {dist.get_rank()}, is not in the group of sequence_axis")
    if isinstance(axis, DeviceMesh):
        names = axis.mesh_dim_names
        if axis.ndim != 1:
            of = f", {' and '.join(names)}: pass one, mesh[{names[-1]!r}]" if names else ": pass one with one dimension"
            raise ValueError(f"sequence_axis is a DeviceMesh of {axis.ndim} dimensions{of}")
        group, name = axis.get_group(), f"mesh dimension {names[0]!r}" if names else ""
    elif isinstance(axis, dist.ProcessGroup):
        group, name = axis, ""
    else:
        kind = "the name of a mesh axis, which JAX has" if isinstance(axis, str) else f"a {type(axis).__name__}"
        raise TypeError(f"sequence_axis={axis!r} is {kind}: for PyTorch {_FORM}")
    size, index = dist.get_world_size(group), dist.get_rank(group)
    name = name or f"the process group of {size} ranks"
    if size > 1:
        compare(group, name, query, key)
    return Axis(group, size, name, index, local=True)


def compare(group: Any, name: str, query: Tensor, key: Tensor) -> None:
    """Raise ValueError, on every rank, if these have other shapes on one; asked once for each shape."""
    import torch.distributed as dist

    shapes = tuple((tuple(x.shape), str(x.dtype)) for x in (query, key))
    known = _compared.setdefault(group, set())
    if shapes in known:
        return
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, shapes, group=group)
    if any(x != shapes for x in every):
        told = "; ".join(
            f"rank {rank}: query {q[0]} {q[1].removeprefix('torch.')}, key {k[0]} {k[1].removeprefix('torch.')}"
            for rank, (q, k) in zip(dist.get_process_group_ranks(group), every, strict=True)
        )
        raise ValueError(f"query and key must have the same shape and dtype on every rank of {name}, got {told}")
    known.add(shapes)


class _How:
    """Both passes of a block over several ranks, and the block with numbers in place of its arrays."""

    def __init__(self, tiling: Tiling, block: Block) -> None:
        self.tiling, self.kinds = tiling, ring.kinds(tiling, block)
        numbers = iter(range(len(leaves(block))))
        self.structure = tree_map(lambda _: next(numbers), block)
        spread = tiling.options.spread
        self.exchange = Ranks(spread.axis, spread.name)
        both = (ring.reduced, ring.pulled_of_reduced) if spread.whole_queries else (ring.forward, ring.backward)
        self._forward, self._backward = both

    def forward(self, arrays: Sequence[Tensor]) -> Any:
        """Output, base and total."""
        block = tree_map(lambda index: arrays[index], self.structure)
        return operators.without_autocast(arrays[0], self._forward, self.tiling, self.exchange, block, self.kinds)

    def backward(self, arrays: Sequence[Tensor], results: Sequence[Tensor], doutput: Tensor) -> list[Tensor | None]:
        """The gradient of each array."""
        block = tree_map(lambda index: arrays[index], self.structure)
        given = self.tiling, self.exchange, block, self.kinds, tuple(results), doutput.contiguous()
        found = operators.without_autocast(doutput, self._backward, *given)
        structure, by_number = self.structure, {}
        of = structure.rows[0], *structure.columns, structure.pairs.bias, structure.parameters, structure.pairs.sinks

        def note(numbers: Any, gradients: Any) -> None:
            if isinstance(numbers, tuple):
                for x, y in zip(numbers, gradients, strict=True):
                    note(x, y)
            elif gradients is not None:
                by_number[numbers] = gradients

        note(of, found)
        return [by_number.get(index) for index in range(len(arrays))]


class _Spread(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, how: _How, block: Block, *arrays: Tensor) -> Tensor:
        output, base, total = how.forward(arrays)
        output, ctx.how = operators.as_returned(output, block), how
        ctx.save_for_backward(output, base, total, *arrays)
        return output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(_SECOND)
        saved = ctx.saved_tensors
        return (None, None, *ctx.how.backward(saved[3:], saved[:3], doutput))


@compat.uncompiled
def differentiable(tiling: Tiling, block: Block) -> tuple[Tensor]:
    """The output of this rank's rows, with the gradients of its parts."""
    if compat.is_transformed():
        raise NotImplementedError(_SECOND)
    bias = (*block.pairs.bias, *block.parameters)
    tiling = tiling._replace(of_bias=any(x.requires_grad for x in bias))
    return (_Spread.apply(_How(tiling, block), block, *leaves(block)),)
