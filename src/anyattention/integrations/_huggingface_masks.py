"""Masks for the models of Transformers: by rule, in a tensor that becomes dense when a model does anything with it.

Transformers has one function that makes masks for each implementation of attention. Models hand its result to
attention as it is, or slice it, join it with other masks, or move it to another device first. Gemma 4, for one, slices
it where only the last logits are wanted. A tensor of PyTorch is what all of these take.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from anyattention._src.rules import CausalMask, LocalMask, Mask, SegmentMask

Array = Any
MaskFunction = Callable[..., Any]  # of Transformers: (batch, head, query, key) -> whether the query sees the key


class RuleMask(torch.Tensor):  # type: ignore[misc]
    """A boolean mask ``[batch, 1, q_length, kv_length]`` of which no element exists before an operation asks for it.

    Attributes:
        rule: the same mask as `dot_product_attention` takes it: by rule, ``[batch, 1, 1, kv_length]``, or None.
    """

    rule: Mask | Array | None
    _make: Callable[[], Array]
    _dense: Array | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, rule: Any, make: Callable[[], Array], shape: tuple[int, ...], device: Any) -> "RuleMask":
        self: RuleMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.rule, self._make, self._dense = rule, make, None
        return self

    def dense(self) -> Array:
        """The mask as an ordinary tensor."""
        if self._dense is None:
            self._dense = self._make()
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:  # as a checkpoint does with what it is given
            (mask,) = args
            return cls(mask.rule, mask.dense, tuple(mask.shape), mask.device)
        args, kwargs = pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return function(*args, **kwargs)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Array | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Array | None:
    """What Transformers asks for as a mask: arguments as its own ``sdpa_mask``, of which the last are not needed.

    Returns:
        None where every query sees every key and `allow_is_bidirectional_skip` says that this may be left out. Never
        None for a causal mask, whatever `allow_is_causal_skip` says: a model may slice the queries afterwards. Else a
        `RuleMask`, or an ordinary tensor where the mask has no rule, or goes into a program that is compiled.
    """
    make = partial(
        masking_utils.sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    # An offset that is a tensor is that of a static cache, whose masks are made outside of the compiled model.
    if is_tracing(attention_mask) or isinstance(q_offset, torch.Tensor):
        return make(allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs)
    try:
        rule: Any = _joined(list(_parts(mask_function, q_offset - kv_offset)), q_length, kv_length)
    except LookupError:
        return make(allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if not padding.all():
            padding = padding[:, None, None]
            rule = padding if rule is None else rule & padding
    if rule is None and allow_is_bidirectional_skip:
        return None
    return RuleMask(rule, make, (batch_size, 1, q_length, kv_length), device)


class _Band:
    """Keys between two diagonals; None is no bound."""

    def __init__(self, left: int | None = None, right: int | None = None) -> None:
        self.left, self.right = left, right


def _parts(function: MaskFunction, offset: int) -> Iterator["_Band | Mask"]:
    """The rules of which a mask function is the logical and, for positions of which queries' are ahead by an offset.

    Raises:
        LookupError: a function that is not known, such as a user's own.
    """
    if function is masking_utils.bidirectional_mask_function:
        return
    if function is masking_utils.causal_mask_function:
        yield _Band(right=offset)
        return
    kind, within = _kind(function), _enclosed(function)
    if kind == "and":
        packed = "packed" in map(_kind, within["mask_functions"])
        for x in within["mask_functions"]:
            # Positions that start again with each packed sequence differ from indices, inside one, by one number.
            yield from _parts(_enclosed(x)["mask_function"] if packed and _kind(x) == "restarted" else x, offset)
    elif kind == "window":
        yield _Band(left=within["sliding_window"] - 1 - offset)
    elif kind == "two-sided window":
        yield _Band(within["sliding_window"] - offset, within["sliding_window"] + offset)
    elif kind == "packed" and offset == 0:
        yield SegmentMask(within["packed_sequence_mask"], within["packed_sequence_mask"])
    else:
        raise LookupError


def _kind(function: MaskFunction) -> str:
    """The kind of a mask function of Transformers'; an empty text of one that is not known."""
    return _kinds().get(getattr(function, "__code__", None), "")


def _enclosed(function: MaskFunction) -> dict[str, Any]:
    """The variables that a function has from where it was made."""
    names = function.__code__.co_freevars if hasattr(function, "__code__") else ()
    return dict(zip(names, (cell.cell_contents for cell in getattr(function, "__closure__", None) or ()), strict=True))


@cache
def _kinds() -> dict[Any, str]:
    """The code of Transformers' mask functions, and their kind; only of those that mean what we think they mean."""
    causal, ids = masking_utils.causal_mask_function, torch.tensor([[0, 0, 1, 1, 2]])
    window = masking_utils.sliding_window_overlay(2)
    both = masking_utils.sliding_window_bidirectional_overlay(2)
    packed = masking_utils.packed_sequence_mask_function(ids)
    restarted = masking_utils.remap_positions_for_packed_sequence(causal, torch.tensor([[0, 1, 0, 1, 0]]))
    joined = masking_utils.and_masks(window, causal)
    kinds = {
        "and": (joined, LocalMask(1, 0)),
        "window": (joined, LocalMask(1, 0)),
        "two-sided window": (both, LocalMask(2, 2)),
        "packed": (packed, SegmentMask(ids, ids)),
        "restarted": (masking_utils.and_masks(restarted, packed), CausalMask() & SegmentMask(ids, ids)),
    }
    codes = {"and": joined, "window": window, "two-sided window": both, "packed": packed, "restarted": restarted}
    found = {}
    for kind, (function, rule) in kinds.items():
        theirs = masking_utils.sdpa_mask(1, 5, 5, mask_function=function, allow_is_causal_skip=False)
        if theirs.reshape(5, 5).tolist() == rule.to_array(5, 5).reshape(5, 5).tolist():
            found[codes[kind].__code__] = kind
    return found


def _joined(parts: list["_Band | Mask"], q_length: int, kv_length: int) -> Mask | None:
    """The parts as one rule, without bounds that hide nothing; None where nothing is hidden."""
    bands = [x for x in parts if isinstance(x, _Band)]
    rules = [x for x in parts if isinstance(x, Mask)]
    left = min((x.left for x in bands if x.left is not None), default=q_length)
    right = min((x.right for x in bands if x.right is not None), default=kv_length)
    if left < q_length - 1:
        rules.insert(0, LocalMask(left, min(right, kv_length)))
    elif right < kv_length - 1:
        rules.insert(0, CausalMask(right))
    whole = None
    for rule in rules:
        whole = rule if whole is None else whole & rule
    return whole
