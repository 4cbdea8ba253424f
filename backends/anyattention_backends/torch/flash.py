"""The kernel beneath SDPA on a CPU, with the row statistics that PyTorch's public function keeps to itself.

PyTorch's own `context_parallel` calls it by the same name.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anyattention.extend import Block, Call, tiled
from anyattention_backends.torch.fused import TorchKernel

_PARTS = {"spread", "origin", "whole", "mask", "grouped heads", "scale", "sinks", "precision", "force_fp32_for_softmax"}


class OfParts(TorchKernel):
    """What serves a sequence over several devices: the kernel where each query sees each key, else tiles."""

    def refusals(self, call: Call) -> Iterator[str]:
        if call.options.spread is None:
            yield from super().refusals(call)
            return
        yield from tiled.refusals(call)
        if lacking := sorted(call.needs - _PARTS):
            yield f"parts on several devices are computed without {' and '.join(lacking)}"
        if call.operands.query.device.type != "cpu":
            yield "its row statistics have been tested on CPU alone"
        if call.operands.query.shape[-1] != call.operands.value.shape[-1]:
            yield "depth and v_depth differ"
        if call.scale <= 0.0:
            yield "the scale is not positive"

    def remarks(self, call: Call) -> list[str]:
        return super().remarks(call) if call.options.spread is None else tiled.remarks(call)

    def compute(self, call: Call) -> Tensor:
        if call.options.spread is None:
            return super().compute(call)
        way = call.options.spread._replace(kernel=True)
        return tiled.compute(replace(call, options=replace(call.options, spread=way)))


def fits(block: Block) -> bool:
    """Whether query and key have the same lead axes, but for a group of query heads."""
    lead, of_keys = block.rows[0].shape[:-2], block.columns[0].shape[:-2]
    return bool(lead == of_keys or (lead[:-1] == of_keys[:-1] and of_keys[-1] == 1))


def forward(tiling: Any, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Base, total and output of every row over all columns, not divided: the base is the log-sum-exp."""
    query, key, value = _four(tiling, block)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = attend(query, key, value, scale=1.0 / tiling.root)
    rows = block.rows[0]
    base = lse.to(rows.dtype).reshape((*rows.shape[:-1], 1))
    return base, torch.ones_like(base), output.to(rows.dtype).reshape(rows.shape)


def backward(
    tiling: Any, block: Block, output: Tensor, base: Tensor, total: Tensor, doutput: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, from the results of whole rows."""
    four = _four(tiling, block)
    lse = (base + total.log()).to(torch.promote_types(four[0].dtype, torch.float32))
    own = [x.to(four[0].dtype).reshape(four[0].shape) for x in (doutput, output)]
    pull = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = pull(own[0], *four, own[1], lse.reshape(four[0].shape[:-1]), 0.0, False, scale=1.0 / tiling.root)
    arrays = (block.rows[0], *block.columns)
    return tuple(x.to(y.dtype).reshape(y.shape) for x, y in zip(found, arrays, strict=True))


def _four(tiling: Any, block: Block) -> list[Tensor]:
    """Query, key and value in the compute dtype, ``[key heads of all batch entries, 1, length, depth]``.

    The query heads that share a key head are so many more rows of it.
    """
    dtype, many = getattr(torch, tiling.options.dtype), block.columns[0].shape[:-2].numel()
    return [x.to(dtype).reshape((many, 1, -1, x.shape[-1])) for x in (*block.rows, *block.columns)]
