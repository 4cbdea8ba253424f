"""The program around FlexAttention: what a call becomes for it, and what its results become.

Dropout of Flax's bits takes two calls: weights are normalized over all keys, and summed over those that are kept. With
lse, the logarithm of a row's sum, from each,

    output = output of the kept keys * exp(lse of the kept keys - lse of all keys) / keep_prob

so that no kernel needs to know of dropout, and PyTorch differentiates all of it.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention._src import threefry
from anyattention._src.implementations import sinks
from anyattention.extend import Call, four_axes

_AT_ONCE = 2**24  # keep bits, of which each takes about 24 bytes while it is drawn


class Given(NamedTuple):
    """What the program takes; nothing in it is a number, which would be a constant of the program."""

    query: Tensor  # [batch..., length, heads, depth], as key and value
    key: Tensor
    value: Tensor
    whole: bool  # whether the mask shows each query every key
    scale: Tensor | None  # of the query, beside FlexAttention's own
    keys: Tensor | None  # which some query of their batch entry may see, [batch..., kv_length, 1, 1]; None for all
    first: Tensor  # key that each query may see, [batch, q_length], and the one after the last
    last: Tensor
    ids: tuple[Tensor, ...]  # of queries and of keys, [batch, length]; none without segments
    cap: Tensor | None
    bias: Tensor | None  # [batch or 1, heads or 1, q_length or 1, kv_length or 1], or the last of these axes
    sinks: Tensor | None  # [batch or 1, heads or 1, q_length or 1, 1], as the share of a fully masked row's weights
    share: Tensor | None
    keep: Tensor | None  # [batch or 1, heads or 1, q_length, kv_length]
    keep_prob: Tensor | None


def prepared(call: Call, keys: Tensor | None, wide: str) -> Given:
    """The call as the program takes it; `keys` as there, and `wide` the dtype of logits."""
    query, key, value, bias, *_ = call.operands
    arrays, options, mask = call.backend.arrays, call.options, call.structure
    number = partial(torch.full, (), device=query.device)
    scale, cap, dropout = options.scale, options.logits_soft_cap, options.dropout
    if bias is not None:
        bias = arrays.cast(bias if hasattr(bias, "shape") else arrays.adopt(bias, query), wide)
        if bias.ndim == 0 or bias.ndim > 3 + (len(call.batch) == 1):
            bias = four_axes(arrays.xp, bias, call.batch)
            bias = bias.clone() if bias.requires_grad else bias  # to a view a compiled program gives no gradient (2.13)
    column = share = None
    if call.operands.sinks is not None:
        columns = sinks.column(call), sinks.share_of_hidden(call)
        column, share = (four_axes(arrays.xp, x, call.batch) for x in columns)
    first, last, *ids = bounds(call)
    return Given(
        *(query, key, value),
        whole=mask.kv_lengths is None and mask.kv_ids is None and not mask.rest and mask.band_shows(*call.lengths),
        scale=None if scale is None else number(scale * query.shape[-1] ** 0.5),
        keys=keys,
        first=first,
        last=last,
        ids=tuple(ids),
        cap=None if cap is None else number(cap),
        bias=bias,
        sinks=column,
        share=share,
        keep=None if dropout is None else _keep(call, dropout.keep_prob, keep_shape(call, dropout.broadcast)),
        keep_prob=None if dropout is None else number(float(dropout.keep_prob)),
    )


def run(given: Given, compiled: bool) -> Tensor:
    """The output, ``[batch..., q_length, heads, v_depth]``; not compiled, with all logits."""
    return _compiled(tuple(map(_kind, given)))(*given) if compiled else _program(*given)


def _kind(x: Any) -> Any:
    """What of an argument PyTorch compiles a program for: all but values, and lengths that are not 1."""
    if isinstance(x, tuple):
        return tuple(map(_kind, x))
    return (x.dtype, x.device, x.requires_grad, *(n == 1 for n in x.shape)) if isinstance(x, Tensor) else x


@cache
def _compiled(kind: Any) -> Callable[..., Tensor]:
    """The program without all logits; compiled as a whole, or FlexAttention would fall back to them.

    PyTorch compiles one code eight times at most, and raises at the ninth: each kind of call has its own.
    """
    own = FunctionType(_program.__code__.replace(), _program.__globals__, _program.__name__)
    return torch.compile(own, fullgraph=True)


def _program(*given: Any) -> Tensor:
    x = Given(*given)
    query, key, value = x.query, x.key, x.value
    if x.scale is not None:
        query = (query.float() * x.scale).to(query.dtype)  # rounded once, as in exact
    if x.keys is not None:
        key = torch.where(x.keys, key, 0.0)
        value = torch.where(x.keys if x.keep is None else x.keys | torch.isfinite(value), value, 0.0)
    heads = [[len(range(size)) for size in y.shape[-2:]] for y in (query, key, value)]  # no symbols: to a compiler too
    four = [y.reshape(-1, y.shape[-3], *z).transpose(1, 2) for y, z in zip((query, key, value), heads, strict=True)]
    output = (_attention if x.keep is None else _with_dropout)(x, *four)
    return output.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


def _attention(x: Given, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The output, ``[batch, heads, q_length, v_depth]``, mended where the mask may hide all keys from a query."""
    output, lse = _attend(x, query, key, value, _blocks(x, key, None), None, False)
    seen = None if x.whole else lse.detach() > -torch.inf
    if x.sinks is not None:
        lse = lse if seen is None else torch.where(seen, lse, 0.0)
        output = (output.float() * torch.sigmoid(lse - x.sinks)).to(output.dtype)
    if seen is None:
        return output
    mean = x.value.reshape(-1, *x.value.shape[-3:]).mean(dim=1)[:, :, None]
    mean = mean.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.where(seen, output, mean if x.share is None else (mean.float() * x.share).to(mean.dtype))


def _with_dropout(x: Given, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with dropout; all logits of a fully masked row are zero, so that it gets the mean of what is kept."""
    seen = None if x.whole else _seen(x, key)
    blocks = _blocks(x, key, seen)
    output, kept = _attend(x, query, key, value, blocks, seen, True)
    nothing = value.new_zeros((*value.shape[:-1], 16))  # the least depth: of this call lse alone counts
    zeros, lse = _attend(x, query, key, nothing, blocks, seen, False)
    share = torch.exp(kept - lse) / x.keep_prob  # of a row that keeps nothing zero
    seen = None if seen is None else seen[:, None, :, None]
    if x.sinks is not None:
        beside = torch.sigmoid(lse - x.sinks)
        share = share * (beside if seen is None else torch.where(seen, beside, x.share))
    output = output.float() * share + zeros[..., :1]  # without which PyTorch cannot compile the gradient (2.11, 2.13)
    if x.keys is not None and seen is not None:  # NaN and infinity in values that no query sees are in the mean
        spoiled = (x.value.reshape(-1, *x.value.shape[-3:]).transpose(1, 2) - value).detach().sum(dim=2, keepdim=True)
        spoiled = spoiled.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        output = torch.where(seen, output, output + spoiled)
    return output.to(value.dtype)


def _attend(
    x: Given, query: Tensor, key: Tensor, value: Tensor, blocks: Any, seen: Tensor | None, dropped: bool
) -> tuple[Tensor, Tensor]:
    """FlexAttention's output, and lse, ``[batch, heads, q_length, 1]``, over the keys that are kept if `dropped`."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def logit(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score if x.cap is None else torch.tanh(score / x.cap) * x.cap
        score = score if x.bias is None else score + _at(x.bias, b, h, i, j)
        score = score if seen is None else torch.where(seen[b, i], score, 0.0)
        return torch.where(_at(x.keep, b, h, i, j), score, -torch.inf) if dropped else score

    plain = x.cap is x.bias is seen is None and not dropped
    options = {"block_mask": blocks, "enable_gqa": query.shape[1] != key.shape[1], "return_aux": AuxRequest(lse=True)}
    output, more = flex_attention(query, key, value, score_mod=None if plain else logit, **options)
    return output, more.lse[..., None]


def _at(x: Any, *indices: Tensor) -> Tensor:
    """A number of the last axes, of which those of size 1 stand for all; by tensors, where PyTorch has the gradient."""
    pairs = zip(indices[len(indices) - x.ndim :], x.shape, strict=True)
    return x[tuple(index if size != 1 else index * 0 for index, size in pairs)]


def _shows(x: Given, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Whether the mask shows a query a key."""
    within = (x.first[b, i] <= j) & (j < x.last[b, i])
    return within & (x.ids[0][b, i] == x.ids[1][b, j]) if x.ids else within


def _seen(x: Given, key: Tensor) -> Tensor:
    """Which queries the mask shows a key, ``[batch, q_length]``."""
    if not x.ids:
        return x.first < x.last
    b, i, j = (torch.arange(size, device=key.device) for size in (*x.first.shape, key.shape[-2]))
    return _shows(x, b[:, None, None], i[:, None], j).any(dim=-1)


def _blocks(x: Given, key: Tensor, seen: Tensor | None) -> Any:
    """The mask as FlexAttention takes it, which shows those that are not `seen` every key."""
    from torch.nn.attention.flex_attention import create_block_mask  # slow, and rarely used

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shown = _shows(x, b, i, j)
        return shown if seen is None else shown | ~seen[b, i]

    batch, rows = x.first.shape
    return create_block_mask(visible, batch, None, rows, key.shape[-2], device=key.device)


def keep_shape(call: Call, broadcast: bool) -> tuple[int, ...]:
    """The shape of the keep bits, as Flax draws them."""
    lead = (1,) * (len(call.batch) + 1) if broadcast else (*call.batch, call.operands.query.shape[-2])
    return *lead, *call.lengths


def _keep(call: Call, keep_prob: Any, shape: tuple[int, ...]) -> Tensor:
    """Which weights dropout keeps, ``[batch or 1, heads or 1, q_length, kv_length]``, drawn some rows at a time."""
    query, key = call.operands.query, call.operands.dropout_key
    if torch.compiler.is_compiling():
        found = call.backend.steps.keep(key, keep_prob, shape, query)
    else:
        (*lead, rows, columns), xp, key = shape, call.backend.xp, call.backend.tiles.key_words(key, query)
        step, beside = max(_AT_ONCE // (math.prod(lead) * columns), 1), call.backend.arrays.beside(query)
        parts = []
        for start in range(0, rows, step):
            some = *lead, min(step, rows - start), columns
            counts = threefry.counts(xp, key, some, (start, 0), (rows, columns), beside)
            parts.append(threefry.keep_at(xp, keep_prob, counts))
        found = torch.cat(parts, dim=-2)
    return found.reshape(-1, *shape[-3:])


def bounds(call: Call) -> tuple[Tensor, ...]:
    """The first key that each query may see and the one after the last, int32, and ids; all ``[batch, length]``."""
    mask, to = call.structure, call.lowering()
    if call.operands.mask is not None:
        call.operands.mask.lower(to)  # which checks the shapes
    left, right = (2**30 if x is None else min(max(x, -(2**30)), 2**30) for x in (mask.left, mask.right))  # no overflow
    rows = torch.arange(call.lengths[0], device=call.operands.query.device)
    first, last = (rows - left).clamp(min=0), (rows + right + 1).clamp(max=call.lengths[1])
    if mask.kv_lengths is not None:
        last = torch.minimum(last, mask.kv_lengths.long()[..., None])
    if mask.query_lengths is not None:
        last = torch.where(rows < mask.query_lengths[..., None], last, 0)
    for band in mask.moved:
        stop = to.operands[to.position(-2, getattr(band, "right", 0) + 1, band)][..., 0, :, 0]
        last = torch.minimum(last, stop)
        if (before := getattr(band, "left", None)) is not None:
            first = torch.maximum(first, to.operands[to.position(-2, -before, band)][..., 0, :, 0])

    def flat(x: Tensor) -> Tensor:
        return x.expand(*call.batch, x.shape[-1]).reshape(-1, x.shape[-1]).contiguous()

    ids = () if mask.kv_ids is None else tuple(flat(x) for x in (mask.query_ids, mask.kv_ids))
    return flat(first).int(), flat(last).int(), *ids
