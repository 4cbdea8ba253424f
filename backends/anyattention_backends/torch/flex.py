"""PyTorch's FlexAttention on CUDA, for masks by rule, of which it leaves out whole blocks.

Bands and lengths become, for each query, the first key that it sees and the one after the last, so that one compiled
program serves them all. Where it sees none, the logarithm of the sum is minus infinity, and the gradients are zero.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from anyattention.extend import Call, Structure
from anyattention_backends.torch import compat
from anyattention_backends.torch.fused import FirstOnly, TorchKernel, bounds


class Flex(TorchKernel):
    """The kernel, compiled; PyTorch has no gradient of it on CPU."""

    name = "flex"
    serves = TorchKernel.serves - {"bias"} | {"logits_soft_cap"}
    platforms = ("cuda",)
    dtypes = ("float32", "bfloat16", "float16")
    dense = False
    compiled = True

    def fitted(self, call: Call) -> tuple[Structure, dict[str, str]]:
        return call.structure, {}  # it has all parts of a mask, and knows which queries see no key

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        yield from super().limits(call, mask)
        depths = call.operands.query.shape[-1], call.operands.value.shape[-1]
        if call.options.dtype == "float32" and not compat.full_precision():
            yield "float32 products are in TF32, but for torch.set_float32_matmul_precision('highest')"
        if not 16 <= min(depths) <= max(depths) <= 256:
            yield "depths are not from 16 to 256"
        if len(mask.rest) > len(mask.moved):
            yield "the mask is no band, lengths and segments, joined by &"

    def attend(self, call: Call) -> Tensor:
        arrays, keys = call.operands[:3], self.keys(call)
        if call.options.precision is not None:
            call.backend.steps.check_precision(call.options.precision, None, arrays[0])
        mask, ends = call.structure, bounds(call)
        whole = mask.kv_lengths is None and mask.kv_ids is None and not mask.rest and mask.band_shows(*call.lengths)
        cap = call.options.logits_soft_cap
        cap = None if cap is None else torch.full((), cap, device=arrays[0].device)  # numbers would be constants of it
        program = _compiled() if self.compiled and not torch.compiler.is_compiling() else _program
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(x.requires_grad for x in arrays):
            return program(*arrays, keys, whole, call.options.scale, cap, *ends)
        return FirstOnly.apply(lambda *x: program(*x, keys, whole, call.options.scale, cap, *ends), call, *arrays)


def _program(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor | None,
    whole: bool,
    scale: float | None,
    cap: Tensor | None,
    first: Tensor,
    last: Tensor,
    *ids: Tensor,
) -> Tensor:
    """The output, mended unless the `whole` mask shows each query a key; bounds and ids are ``[batch, length]``."""
    shown = (key, value) if keys is None else [torch.where(keys, x, 0.0) for x in (key, value)]
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention  # slow, and rarely used

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        within = (first[b, i] <= j) & (j < last[b, i])
        return within & (ids[0][b, i] == ids[1][b, j]) if ids else within

    if scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)  # rounded once, as in exact
    heads = [[len(range(size)) for size in x.shape[-2:]] for x in (query, key, value)]  # no symbols: to a compiler too
    four = [x.reshape(-1, x.shape[-3], *y).transpose(1, 2) for x, y in zip((query, *shown), heads, strict=True)]
    group = heads[0][0] // heads[1][0]
    blocks = create_block_mask(visible, len(first), None, query.shape[-3], key.shape[-3], device=query.device)
    options = {"block_mask": blocks, "enable_gqa": group != 1, "return_aux": AuxRequest(lse=True)}
    if cap is not None:
        options["score_mod"] = lambda score, b, h, i, j: torch.tanh(score / cap) * cap
    output, more = flex_attention(*four, **options)
    if not whole:
        mean = value.reshape(-1, *value.shape[-3:]).mean(dim=1)[:, :, None].repeat_interleave(group, dim=1)
        output = torch.where((more.lse.detach() > -torch.inf)[..., None], output, mean)
    return output.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


@cache
def _compiled() -> Callable[..., Tensor]:
    """The program without all logits, which raises where it would be run step by step."""
    return torch.compile(_program, fullgraph=True)
