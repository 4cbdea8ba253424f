"""Masks for the models of Transformers: by rule, in a tensor that gets elements when a model does anything with it.

Transformers has one function that makes masks for each implementation of attention. Most models hand its result to
attention as it is. Others change it first: Gemma 4 slices it where only the last logits are wanted, Parakeet negates
it, DeepSeek V4 adds columns to it. So the tensor is, to a model, what it would get with Transformers' own attention: a
boolean mask where the model runs with ``"sdpa"``, which is where boolean masks are known to work, else numbers.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel, masking_utils
from transformers.utils.import_utils import is_tracing

from anyattention._src.rules import CausalMask, LocalMask, Mask, SegmentMask

Array = Any
MaskFunction = Callable[..., Any]  # of Transformers: (batch, head, query, key) -> whether the query sees the key


class RuleMask(torch.Tensor):  # type: ignore[misc]
    """A mask ``[batch, 1, q_length, kv_length]`` of which no element exists before an operation asks for one.

    Boolean and true where a query sees a key, or zero there and the dtype's smallest number elsewhere.

    Attributes:
        visible: the same as `dot_product_attention` takes it for a mask: by rule, an array, or None.
    """

    visible: Mask | Array | None
    _make: Callable[[], Array]
    _dense: Array | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, visible: Any, make: Callable[[], Array], shape: tuple[int, ...], like: dict[str, Any]) -> Any:
        self: RuleMask = torch.Tensor._make_wrapper_subclass(cls, shape, **like)
        self.visible, self._make, self._dense = visible, make, None
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
            return cls(mask.visible, mask.dense, tuple(mask.shape), {"dtype": mask.dtype, "device": mask.device})
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
    allow_is_bidirectional_skip: bool = False,
    dtype: Any = torch.float32,
    device: Any = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Array | None:
    """What Transformers asks for as a mask; arguments as its own ``eager_mask``.

    Returns:
        None where every query sees every key and `allow_is_bidirectional_skip` says that this may be left out. Never
        None for a causal mask, since a model may slice the queries afterwards. Else a `RuleMask`, or an ordinary tensor
        where the mask goes into a program that is compiled.
    """
    asked = kwargs | {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "device": device}
    asked |= {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function}
    asked |= {"attention_mask": attention_mask, "allow_is_causal_skip": False}
    boolean = _takes_booleans(type(config))
    make = partial(masking_utils.sdpa_mask, **asked)
    if not boolean:
        make = partial(masking_utils.eager_mask, **asked, dtype=dtype)
    # An offset that is a tensor is that of a static cache, whose masks are made outside of the compiled model.
    if is_tracing(attention_mask) or isinstance(q_offset, torch.Tensor):
        return make(allow_is_bidirectional_skip=allow_is_bidirectional_skip)
    try:
        visible: Any = _joined(list(_parts(mask_function, q_offset, kv_offset)), q_length, kv_length)
    except LookupError:
        visible = masking_utils.sdpa_mask(**asked)  # now, since it may need vmap, which no operation can be
        make = partial(_as_dtype, visible, torch.bool if boolean else dtype)
    else:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            padding = padding[:, kv_offset : kv_offset + kv_length]
            if not padding.all():
                padding = padding[:, None, None]
                visible = padding if visible is None else visible & padding
        if visible is None and allow_is_bidirectional_skip:
            return None
    like = {"dtype": torch.bool if boolean else dtype, "device": device}
    return RuleMask(visible, make, (batch_size, 1, q_length, kv_length), like)


def _as_dtype(visible: Array, dtype: Any) -> Array:
    """A boolean mask, or zero where it is true and the dtype's smallest number elsewhere."""
    if dtype == torch.bool:
        return visible
    return torch.where(visible, torch.zeros((), dtype=dtype, device=visible.device), torch.finfo(dtype).min)


_BOOLEANS: dict[type, bool] = {}


def _takes_booleans(config: type) -> bool:
    """Whether models of this configuration take boolean masks, as those have to that run with Transformers' sdpa."""
    if config not in _BOOLEANS:
        kinds = [PreTrainedModel]
        for kind in kinds:
            kinds.extend(kind.__subclasses__())
        _BOOLEANS[config] = any(x._supports_sdpa for x in kinds if x.config_class is config)
    return _BOOLEANS[config]


vars(_takes_booleans)["_dynamo_marked_constant"] = True  # torch.compile need not trace it


class _Band:
    """Keys between two diagonals; None is no bound."""

    def __init__(self, left: int | None = None, right: int | None = None) -> None:
        self.left, self.right = left, right


def _parts(function: MaskFunction, q_offset: int, kv_offset: int) -> Iterator["_Band | Mask"]:
    """The rules of which a mask function is the logical and, for the positions of the first query and key.

    Raises:
        LookupError: a function that is not known, such as a user's own.
    """
    offset = q_offset - kv_offset
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
            function = _enclosed(x)["mask_function"] if packed and _kind(x) == "restarted" else x
            yield from _parts(function, q_offset, kv_offset)
    elif kind == "window":
        yield _Band(left=within["sliding_window"] - 1 - offset)
    elif kind == "two-sided window":
        yield _Band(within["sliding_window"] - offset, within["sliding_window"] + offset)
    elif kind == "packed" and q_offset == kv_offset == 0:
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
    two_sided = masking_utils.sliding_window_bidirectional_overlay(2)
    packed = masking_utils.packed_sequence_mask_function(ids)
    joined = masking_utils.and_masks(window, causal)
    examples = {  # the function, a mask made with it, and the rule that this has to be
        "and": (joined, joined, LocalMask(1, 0)),
        "window": (window, joined, LocalMask(1, 0)),
        "two-sided window": (two_sided, two_sided, LocalMask(2, 2)),
        "packed": (packed, packed, SegmentMask(ids, ids)),
    }
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # from 5.23 on
        restarted = masking_utils.remap_positions_for_packed_sequence(causal, torch.tensor([[0, 1, 0, 1, 0]]))
        mask = masking_utils.and_masks(restarted, packed)
        examples["restarted"] = restarted, mask, CausalMask() & SegmentMask(ids, ids)
    found = {}
    for kind, (function, mask, rule) in examples.items():
        theirs = masking_utils.sdpa_mask(1, 5, 5, mask_function=mask, allow_is_causal_skip=False)
        if theirs.reshape(5, 5).tolist() == rule.to_array(5, 5).reshape(5, 5).tolist():
            found[function.__code__] = kind
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
