"""PyTorch's FlexAttention on CUDA, for masks by rule, of which it leaves out whole blocks.

A band and lengths become, for each query, the first key that it sees and the one after the last, so that one compiled
program serves them all. Where the kernel sees no key, the logarithm of its sum is minus infinity, and its gradients
are zero; Flax's output, the mean of all values, is put in its place.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from anyattention import masks
from anyattention.backend import Backend
from anyattention.engine import SWITCH
from anyattention.request import Request
from anyattention.structure import Structure, structure
from anyattention_backends.torch_sdpa import Kernel

Array = Any


class Flex(Kernel):
    """The kernel, compiled; PyTorch has no gradient of it on CPU."""

    name = "flex"
    platform = "cuda"
    compiled = True
    once = True

    def refusals(self, request: Request) -> list[str]:
        dtype, query, _, value, bias, mask = request[:6]
        if (platform := self.backend.platform(query)) != self.platform:
            return [f"it runs on {self.platform}, not on {platform}"]
        found = structure(mask)
        depths = query.shape[-1], value.shape[-1]
        checks = self.missing(request) | {
            f"there is no kernel for {dtype}": dtype not in ("float32", "bfloat16", "float16"),
            "float32 products are in TF32, but for torch.set_float32_matmul_precision('highest')": dtype == "float32"
            and not _full_precision(),
            "depths are not from 16 to 256": not 16 <= min(depths) <= max(depths) <= 256,
            "it is for calls without a bias": bias is not None,
            "the mask is no band, lengths and segments, joined by &": bool(found.rest),
        }
        return [reason for reason, holds in checks.items() if holds]

    def call(self, request: Request, query: Array, key: Array, value: Array) -> Array:
        lengths = query.shape[-3], key.shape[-3]
        found = structure(request.mask)
        whole = found.kv_lengths is None and found.kv_ids is None and found.band_shows(*lengths)
        bounds = _bounds(self.backend, request.mask, found, query, lengths)
        program = _compiled() if self.compiled and not torch.compiler.is_compiling() else _program
        try:
            return program(query, key, value, whole, *bounds)
        except Exception as error:
            error.add_note(f"This is the engine {self.name!r}. {SWITCH.format(self.name)}")
            raise


def _program(query: Array, key: Array, value: Array, whole: bool, first: Array, last: Array, *ids: Array) -> Array:
    """The output, mended unless the `whole` mask shows each query a key; bounds and ids are ``[batch, length]``."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention  # slow, and rarely used

    def visible(b: Array, h: Array, i: Array, j: Array) -> Array:
        within = (first[b, i] <= j) & (j < last[b, i])
        return within & (ids[0][b, i] == ids[1][b, j]) if ids else within

    heads = [[len(range(size)) for size in x.shape[-2:]] for x in (query, key, value)]  # no symbols: to a compiler too
    four = [x.reshape(-1, x.shape[-3], *y).transpose(1, 2) for x, y in zip((query, key, value), heads, strict=True)]
    group = heads[0][0] // heads[1][0]
    blocks = create_block_mask(visible, len(first), None, query.shape[-3], key.shape[-3], device=query.device)
    options = {"block_mask": blocks, "enable_gqa": group != 1, "return_aux": AuxRequest(lse=True)}
    output, more = flex_attention(*four, **options)
    if not whole:
        mean = four[2].mean(dim=-2, keepdim=True).repeat_interleave(group, dim=1)
        output = torch.where((more.lse.detach() > -torch.inf)[..., None], output, mean)
    return output.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


@cache
def _compiled() -> Callable[..., Array]:
    """The program without all logits, which raises where it would be run step by step."""
    return torch.compile(_program, fullgraph=True)


def _bounds(backend: Backend, mask: Any, found: Structure, query: Array, lengths: tuple[int, int]) -> tuple[Array, ...]:
    """The first key that each query may see and the one after the last, int32, and ids; all ``[batch, length]``."""
    batch = tuple(query.shape[:-3])
    to = masks.Lowering(backend, batch, lengths, query)
    if mask is not None:
        mask.lower(to)  # which checks the shapes
    rows = torch.arange(lengths[0], device=query.device)
    first = torch.zeros_like(rows) if found.left is None else (rows - _small(found.left)).clamp(min=0)
    last = torch.full_like(rows, lengths[1]) if found.right is None else rows + _small(found.right) + 1
    if found.kv_lengths is not None:
        last = torch.minimum(last, to.adopt(found.kv_lengths).long()[..., None])
    if found.query_lengths is not None:
        last = torch.where(rows < to.adopt(found.query_lengths)[..., None], last, 0)

    def flat(x: Array) -> Array:
        return x.expand(*batch, x.shape[-1]).reshape(-1, x.shape[-1]).contiguous()

    ids = () if found.kv_ids is None else tuple(flat(to.adopt(x)) for x in (found.query_ids, found.kv_ids))
    return flat(first).int(), flat(last).int(), *ids


def _full_precision() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


# As `torch.compiler.assume_constant_result` marks it, which is slow to import.
vars(_full_precision)["_dynamo_marked_constant"] = True


def _small(offset: int) -> int:
    """An offset that does not overflow, and shows the same."""
    return min(max(offset, -(2**30)), 2**30)
