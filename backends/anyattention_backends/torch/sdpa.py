"""PyTorch's `scaled_dot_product_attention` on CPU and CUDA: transposition, kernel, transposition where that is all."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anyattention.extend import Call, CausalMask, Structure, tiled
from anyattention_backends.torch import operators
from anyattention_backends.torch.flash import OfParts
from anyattention_backends.torch.fused import beyond, for_cuda, told, with_second_derivative

_FULL, _CAUSAL, _SIMPLE = Structure(), Structure(right=0), frozenset(("mask", "scale", "grouped heads"))


class SDPA(OfParts):
    """Flash on CPU; flash, memory-efficient or cuDNN's on CUDA, but never the one that has all logits."""

    name = "sdpa"
    platforms = ("cpu", "cuda")
    dtypes = ("float32", "float64", "bfloat16", "float16")
    on_cuda = ("bfloat16", "float16")  # of float32 its kernel is up to 6 times less accurate than Flax (H100)
    most_depth = 256  # on CUDA
    one_depth = True
    broadcasts = True
    alone = ("cpu",)
    wider = "float32"

    def rank(self, call: Call) -> int:
        return 0 if _is_plain(call) else int(self.elements(call, self.fit(call)[0]) > 0)

    def refusals(self, call: Call) -> Iterator[str]:
        query, key, value, *_ = call.operands
        platform, dtype = call.backend.arrays.platform(query), call.options.dtype
        known = platform == "cpu" and dtype in self.dtypes
        if platform == "cuda":
            known = dtype in self.on_cuda and max(query.shape[-1], value.shape[-1]) <= self.most_depth
        full = known and _is_plain(call) and query.numel() and key.numel() and value.numel()
        if full and call.needs <= _SIMPLE and not beyond(call):
            return iter(())  # what the long way finds too, in a tenth of its 20 us
        return super().refusals(call)

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        yield from super().limits(call, mask)
        query, _, value, bias, *_ = call.operands
        if call.backend.arrays.platform(query) == "cuda":
            if call.options.dtype not in self.on_cuda or self.wide(call) != call.options.dtype:
                yield f"on cuda no kernel for {self.wide(call)} is as accurate as Flax"
            if max(query.shape[-1], value.shape[-1]) > self.most_depth:
                yield f"there is no kernel for depths beyond {self.most_depth}"
        elif (size := self.elements(call, mask)) > 0:
            yield f"the mask would be an array{told(size)}, where tiled skips what is hidden"
        if getattr(bias, "requires_grad", False):
            yield "the bias needs a gradient"

    def lacks(self, call: Call, mask: Structure) -> dict[str, str]:
        found = super().lacks(call, mask)
        if mask.causal and list(found) == ["band"] and not mask.rest and call.operands.bias is None:
            return {}
        return found | ({"band": "of bands it has CausalMask() alone"} if mask.banded else {})

    def depths(self, call: Call) -> list[int]:
        multiple = 8 if call.backend.arrays.platform(call.operands.query) == "cuda" else 1
        return [-(-max(x.shape[-1] for x in call.operands[:3]) // multiple) * multiple] * 3

    def attend(self, call: Call) -> Tensor:
        query, key, value, bias, mask, *_ = call.operands
        if call.options.precision is not None:
            call.backend.steps.check_precision(call.options.precision, None, query)
        if bias is not None and self.is_low(call):
            return tiled.compute(call)
        fits = query.shape[-1] % 8 == 0 or call.backend.arrays.platform(query) == "cpu"
        hides = mask is not None and key.shape[-3] > query.shape[-3]  # keys from all queries
        if not hides and fits and query.shape[-1] == value.shape[-1] and query.ndim == 4 and _is_plain(call):
            return self.kernel(query, key, value, None, _FULL if mask is None else _CAUSAL, call.scale)
        return self.mended(call)

    def kernel(self, query: Tensor, key: Tensor, value: Tensor, bias: Any, mask: Structure, scale: float) -> Tensor:
        causal, shown = mask.causal and bias is None and not mask.rest, mask.joined
        if bias is not None:
            shown = bias if shown is None else torch.where(shown, bias, -torch.inf)
        if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        if scale <= 0.0:  # it scales what is causally hidden too, minus infinity: NaN
            query, scale = query * scale, 1.0
        four = [query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)]
        grouped = {"enable_gqa": True} if query.shape[2] != key.shape[2] else {}  # a symbol is no bool
        options = {"attn_mask": shown, "is_causal": causal, "scale": scale, **grouped}
        if operators.backend.arrays.platform(query) == "cuda":
            four, options = for_cuda(four, options)
        attend = torch.nn.functional.scaled_dot_product_attention
        return with_second_derivative(attend, *four, **options).transpose(1, 2)


def _is_plain(call: Call) -> bool:
    """Whether the kernel has all that the call asks for: causality, or nothing."""
    bias, mask = call.operands[3:5]
    causal = type(mask) is CausalMask and type(mask.offset) is int and mask.offset == 0
    return bias is None and (mask is None or causal)
