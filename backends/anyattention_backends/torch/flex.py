"""PyTorch's FlexAttention on CUDA, for masks by rule, of which it leaves out whole blocks.

Bands and lengths become, for each query, the first key that it sees and the one after the last, so that one compiled
program serves them all. Where it sees none, the logarithm of the sum is minus infinity, and the gradients are zero.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from anyattention.extend import Call, Structure, tiled
from anyattention_backends.torch import compat, flex_program
from anyattention_backends.torch.fused import FirstOnly, TorchKernel, differentiated, told


class Flex(TorchKernel):
    """The kernel, compiled; PyTorch has no gradient of it on CPU."""

    name = "flex"
    serves = TorchKernel.serves | {"logits_soft_cap", "sinks", "dropout", "dropout_key"}
    platforms = ("cuda",)
    dtypes = ("float32", "bfloat16", "float16")
    wider = "float32"
    dense = False
    row_sinks = True
    range_of_depths = 16, 256
    compiled = True

    def rank(self, call: Call) -> int:
        """A bias without a gradient goes to SDPA first, whose run on a device is on record."""
        return 0 if call.operands.bias is None else 2

    def fitted(self, call: Call) -> tuple[Structure, dict[str, str]]:
        return call.structure, {}  # it has all parts of a mask, and knows which queries see no key

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        yield from super().limits(call, mask)
        depths, (least, most) = (call.operands.query.shape[-1], call.operands.value.shape[-1]), self.range_of_depths
        if call.options.dtype == "float32" and not compat.full_precision():
            yield "float32 products are in TF32, but for torch.set_float32_matmul_precision('highest')"
        if not least <= min(depths) <= max(depths) <= most:
            yield f"depths are not from {least} to {most}"
        if len(mask.rest) > len(mask.moved):
            yield "the mask is no band, lengths and segments, joined by &"
        if not torch.compiler.is_compiling() and compat.is_transformed() and compat.differentiates():
            yield "it has no derivative within torch.func"
        if (dropout := call.options.dropout) is not None:
            size = math.prod(flex_program.keep_shape(call, dropout.broadcast))
            if size > self.most_elements:
                yield f"the keep bits of its dropout would be an array{told(size)}"

    def attend(self, call: Call) -> Tensor:
        if call.options.precision is not None:
            call.backend.steps.check_precision(call.options.precision, None, call.operands.query)
        if call.operands.bias is not None and self.is_low(call):
            return tiled.compute(call)
        arrays = differentiated(call).values()
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(x.requires_grad for x in arrays):
            return self.computed(call)
        return FirstOnly.apply(self.computed, call, *arrays)

    def computed(self, call: Call) -> Tensor:
        """The output, with PyTorch's own derivative."""
        given = flex_program.prepared(call, self.keys(call), self.wide(call))
        return flex_program.run(given, compiled=self.compiled and not torch.compiler.is_compiling())
