"""What every vendor's kernel needs, once: refusals, batch axes, the parts of a mask, fully masked rows, low biases.

Kernels disagree about a fully masked row; Flax gives it the mean of all values. Such rows are shown some key, so that
whatever the kernel computes of them is finite, and their output is replaced by the mean: then their gradients are
Flax's too. Keys and values that no query of their batch entry may see are zeros to the kernel, since 0 * NaN is NaN.

A row whose biases are all far below zero, as where they stand for a mask, is beyond kernels: see `least_bias`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyattention._src import dtypes
from anyattention._src.call import Call
from anyattention._src.hidden import shown_keys
from anyattention._src.implementations import sinks
from anyattention._src.implementations.base import Implementation
from anyattention._src.implementations.tiled import TILED
from anyattention._src.interfaces import permute
from anyattention._src.rules import LengthMask, Mask, short
from anyattention._src.structure import Structure

Array = Any
SWITCH = (
    "Switch it off with anyattention.config(engines=('-{0}',)) or ANYATTENTION_ENGINES=-{0}, or pass "
    "implementation='tiled'."
)
_LOW = "falls back to tiled when the call runs, if all biases of some row are far below zero"
_HIDDEN = "NaN or infinity may show in a row whose query may not see it, if another query may"
_ALONE = "the bits of a batch entry do not depend on the other entries, in all tests"
_NEIGHBOURS = "the bits of a batch entry may depend on the other entries"
_SAMPLE = 64  # keys of which the biases are looked at first


class Fused(Implementation):
    """One kernel. A subclass says where it runs, what it lacks, and how it is called.

    Attributes:
        platforms: where it runs, as the library names them.
        dtypes: of query, key and value.
        multiple: what the depths are multiples of, once they are filled up with zeros.
        one_depth: whether queries, keys and values need one depth.
        even: whether its derivative needs even lengths; a bias or an array of odd ones is then refused.
        dense: whether it takes arrays as masks.
        broadcasts: whether axes of size 1 of such an array stay as they are, so that lengths cost nothing.
        most_elements: of an array that stands for a mask by rule.
        wider: dtype of a bias that may be wider than the call's.
        alone: platforms on which the bits of a batch entry do not depend on the others, in tests.
        low_biases: whether gradients are right where all biases of a row are far below zero.
        row_sinks: whether each query may have sinks of its own.
    """

    serves = frozenset({"bias", "mask", "force_fp32_for_softmax", "scale", "grouped heads"})
    platforms: tuple[str, ...]
    dtypes: tuple[str, ...]
    multiple = 1
    one_depth = False
    even = False
    dense = True
    broadcasts = False
    most_elements = 2**30
    wider = ""
    alone: tuple[str, ...] = ()
    low_biases = False
    row_sinks = False

    # --- what a subclass says ---

    @property
    def absent(self) -> str:
        """Why this machine cannot run the kernel; empty where it can."""
        return ""

    def limits(self, call: Call, mask: Structure) -> Iterator[str]:
        """More reasons against the kernel, for a call with this mask."""
        return iter(())

    def lacks(self, call: Call, mask: Structure) -> dict[str, str]:
        """Which of "band", "lengths" and "segments" of the mask the kernel lacks, and why: arrays stand for them."""
        parts = {"band": mask.banded, "lengths": mask.kv_lengths is not None, "segments": mask.kv_ids is not None}
        return {name: f"it has no {name}" for name, there in parts.items() if there}

    def kernel(
        self, query: Array, key: Array, value: Array, bias: Array | None, mask: Structure, scale: float
    ) -> Array:
        """The kernel: ``[batch, length, heads, depth]`` in and out; all of one dtype, of no batch axes but one.

        An engine that serves "logits_soft_cap" is given the cap by that name, where there is one; one that serves
        "sinks" these, ``[batch, num_heads]``, float32.
        """
        raise NotImplementedError

    def summed(self, xp: Any, value: Array, dtype: Any) -> Array:
        """The sum over keys in this dtype; one pass, where the library's `sum` is the standard's."""
        return xp.sum(value, axis=-3, keepdims=True, dtype=dtype)

    def attend(self, call: Call) -> Array:
        """The output, with the derivatives that the kernel has; tiled's where low biases cannot be ruled out."""
        sound = call.operands.bias is None or self.low_biases
        if sound or call.backend.arrays.surely(self.reaches(call), True):
            return self.mended(call)
        return TILED.compute(call)

    # --- what holds for all ---

    def compute(self, call: Call) -> Array:
        """As `attend`; an error gets a note with the engine's name and how to switch it off."""
        try:
            return self.attend(call)
        except Exception as error:
            if not isinstance(error, NotImplementedError):
                error.add_note(f"This is the engine {self.name!r}. {SWITCH.format(self.name)}")
            raise

    def refusals(self, call: Call) -> Iterator[str]:
        query, key, value, bias, *_ = call.operands
        arrays, dtype = call.backend.arrays, call.options.dtype
        yield from super().refusals(call)
        platform = arrays.platform(query)
        if platform not in self.platforms:
            beyond = f"it runs on {' and '.join(self.platforms)}, not on {platform}"
        else:
            beyond = self.absent or ("lengths are unknown" if call.has_unknown_sizes else "")
        if beyond:
            yield beyond
            return
        if dtype not in self.dtypes:
            yield f"there is no kernel for {dtype}"
        if call.options.force_fp32_for_softmax and "16" in dtype:
            yield "with force_fp32_for_softmax a 16-bit call returns float32, which no kernel does"
        if 0 in (*query.shape, *key.shape, *value.shape):
            yield "an axis is empty"
            return
        if bias is not None or call.operands.mask is not None:
            if not call.operands_fit():
                yield "bias or mask has axes that query and key lack"
            if hasattr(bias, "shape") and (wide := self.wide(call)) not in (dtype, self.wider):
                yield f"the bias makes logits {wide}"
        if call.operands.sinks is not None and "sinks" in self.serves:
            yield from sinks.refusals(call, self.row_sinks)
        mask, expanded = self.fit(call)
        if not self.dense:
            yield from expanded.values()
            if any(not isinstance(x, Mask) for x in mask.rest):
                yield "it has no arrays as masks"
        elif expanded and (size := self.elements(call, mask)) > self.most_elements:
            count = "too many" if call.backend.symbolic(size) else size  # a symbol has no text
            yield from (f"{reason}, and an array has {count} elements" for reason in expanded.values())
        yield from self.limits(call, mask)

    def remarks(self, call: Call) -> list[str]:
        mask, expanded = self.fit(call)
        size = self.elements(call, mask)
        array = f"the mask is an array of {size} elements" if size else "the mask is an array"
        found = [f"{array}: {reason}" for reason in expanded.values()]
        found += [] if call.operands.mask is None else [_HIDDEN]
        biased, platform = call.operands.bias is not None, call.backend.arrays.platform(call.operands.query)
        alone = platform in self.alone and call.lengths[0] > 1 and not biased  # of one query kernels share out the keys
        found += [_ALONE if alone else _NEIGHBOURS]
        return [*found, _LOW] if biased and not self.low_biases else found

    def elements(self, call: Call, mask: Structure) -> int:
        """How many an array has that stands for masks by rule, one for all heads; none where they are small."""
        small = (not isinstance(x, Mask) or (isinstance(x, LengthMask) and x.query_lengths is None) for x in mask.rest)
        return 0 if self.broadcasts and all(small) else math.prod((*call.batch, *call.lengths))

    def wide(self, call: Call) -> str:
        """The dtype of the logits, with the bias."""
        bias, dtype = call.operands.bias, call.options.dtype
        return dtypes.promote(dtype, call.backend.arrays.dtype_name(bias)) if hasattr(bias, "shape") else dtype

    def depths(self, call: Call) -> list[int]:
        """The depths of query, key and value that the kernel is given."""
        depths = [-(-x.shape[-1] // self.multiple) * self.multiple for x in call.operands[:3]]
        return [max(depths)] * 3 if self.one_depth else depths

    def fit(self, call: Call) -> tuple[Structure, dict[str, str]]:
        """As `fitted`, found once for a call."""
        if call.fitted is None or call.fitted[0] is not self:
            call.fitted = self, self.fitted(call)
        return call.fitted[1]

    def fitted(self, call: Call) -> tuple[Structure, dict[str, str]]:
        """The structure of the mask, with all that the kernel lacks among the rest; and what that is and why."""
        mask = call.structure
        reasons: dict[str, str] = {}
        if call.operands.mask is None:
            return mask, reasons
        if rules := [x for x in mask.rest if isinstance(x, Mask)]:
            known = len(rules) == len(mask.moved)
            other = "it is no band, lengths, segments and array, joined by &"
            reasons["rest"] = "the offset of a band is an array" if known else other
        if not mask.band_shows(*call.lengths):
            reasons["band"] = "some queries see nothing, where their window begins or ends"
        elif mask.left is not None and (mask.kv_lengths is not None or mask.kv_ids is not None):
            reasons["band"] = "a window beside lengths or segments may leave queries without a key"
        mask = mask.without(*reasons) if reasons else mask
        if more := self.lacks(call, mask):
            reasons |= more
            mask = mask.without(*more)
        if mask.left is not None and mask.rest and call.operands.bias is not None:
            reasons["band"] = "a window beside a bias and an array may leave queries without a key"
            mask = mask.without("band")
        return mask, reasons

    def mended(self, call: Call, trained: bool = False) -> Array:
        """The kernel's output with Flax's meaning.

        Where it is `trained`, there is to be a derivative: a kernel that wants even lengths then gets one more row,
        beyond the lengths that it is told. The row's output is cut off, so that its cotangent is zero.
        """
        xp, arrays, lengths = call.backend.xp, call.backend.arrays, call.lengths
        query, _, _, bias, *_ = call.operands
        mask = self.fit(call)[0]
        visible = _visible(call) if mask.rest or mask.kv_ids is not None else None
        keys, (seen, mask) = self.keys(call, visible), self.shown(call, mask, visible)
        mask, where = _of_one_batch(call, mask), call.backend.steps.where
        key, value = call.operands[1:3] if keys is None else (where(keys, x, 0.0) for x in call.operands[1:3])
        rows, columns = (n + n % 2 for n in lengths) if self.even and trained else lengths
        parts = zip((query, key, value), (rows, columns, columns), self.depths(call), strict=True)
        flat = query.ndim == 4  # else of other batch axes, which become one
        q, k, v = (
            _filled(xp, x if flat else xp.reshape(x, (-1, *x.shape[-3:])), length, depth) for x, length, depth in parts
        )
        if (rows, columns) != lengths:
            query_lengths, kv_lengths = (xp.full(q.shape[:1], length, dtype=xp.int32) for length in lengths)
            kv_lengths = kv_lengths if mask.kv_lengths is None else mask.kv_lengths
            mask = mask._replace(query_lengths=query_lengths, kv_lengths=kv_lengths)
        if bias is not None:
            bias = four_axes(xp, arrays.cast(_array(call, bias), self.wide(call)), call.batch)
        more: Any = {} if (cap := call.options.logits_soft_cap) is None else {"logits_soft_cap": cap}
        if call.operands.sinks is not None:
            more["sinks"] = sinks.of_heads(call)
        output = self.kernel(q, k, v, bias, mask, call.scale, **more)
        if tuple(output.shape[1::2]) != (lengths[0], value.shape[-1]):
            output = output[:, : lengths[0], :, : value.shape[-1]]
        output = output if flat else xp.reshape(output, (*query.shape[:-1], value.shape[-1]))
        if seen is None:
            return output
        return xp.where(permute(arrays, seen, (-1, -2))[..., None], output, _unseeing(call, self.summed))

    def keys(self, call: Call, visible: Array | None = None) -> Array | None:
        """Which keys some query of their batch entry may see, ``[batch..., kv_length, 1, 1]``; None for all."""
        xp = call.backend.xp
        if visible is None or visible.shape[-2] != 1:
            keys = shown_keys(call)
        else:
            keys = visible if visible.shape[-3] == 1 else xp.any(visible, axis=-3, keepdims=True)
        if keys is None or call.backend.arrays.surely(keys, True):
            return None
        keys = _ranked(xp, keys, 3)
        return xp.reshape(keys, (*keys.shape[:-3], -1, 1, 1))

    def shown(self, call: Call, mask: Structure, visible: Array | None) -> tuple[Array | None, Structure]:
        """Which queries see a key, ``[batch..., heads or 1, q_length or 1]``; None for all. A mask that shows each."""
        xp, arrays, (rows, columns) = call.backend.xp, call.backend.arrays, call.lengths
        beside = arrays.beside(call.operands.query)
        kv_lengths, query_lengths = (
            None if x is None else short(arrays, _array(call, x)) for x in (mask.kv_lengths, mask.query_lengths)
        )
        if visible is not None:
            seen: Any = xp.any(visible, axis=-1)
        elif kv_lengths is None:
            return None, mask  # of a band, `fitted` keeps what shows each query a key
        else:
            seen = (kv_lengths > 0)[..., None, None]
            if query_lengths is not None:
                seen = seen & (xp.arange(rows, dtype=xp.int32, **beside) < query_lengths[..., None, None])
        seen = None if arrays.surely(seen, True) else seen
        if kv_lengths is not None:
            mask = mask._replace(kv_lengths=xp.clip(kv_lengths, 1, columns), query_lengths=None)
        if mask.rest:
            if mask.banded or mask.kv_lengths is not None or mask.kv_ids is not None:  # the rest is not the whole
                visible = call.visible(mask.joined)
            mask = mask._replace(rest=(visible if seen is None else visible | xp.logical_not(seen)[..., None],))
        if mask.kv_ids is not None and seen is not None:  # every key 0 is in the band and within the lengths
            ids = xp.broadcast_to(mask.query_ids, (*call.batch, rows))
            alone = xp.logical_not(xp.broadcast_to(xp.any(seen, axis=-2), ids.shape))
            mask = mask._replace(query_ids=xp.where(alone, mask.kv_ids[..., :1], ids))
        return seen, mask

    def reaches(self, call: Call, step: int = 1) -> Array:
        """Which queries are shown a key, of each `step`-th, whose bias is not too low."""
        xp = call.backend.xp
        bias = _ranked(xp, _array(call, call.operands.bias), 1)[..., ::step]
        if call.operands.mask is not None:
            visible = _visible(call)
            if step == 1:  # a fully masked row is shown the first key
                first = xp.arange(call.lengths[1], **call.backend.arrays.beside(bias)) == 0
                visible = visible | (xp.logical_not(xp.any(visible, axis=-1, keepdims=True)) & first)
            bias = xp.where(visible[..., ::step], bias, -float("inf"))
        return xp.max(bias, axis=-1) >= least_bias(call.options.dtype)

    def sample(self, call: Call) -> int:
        """The step between the keys that `reaches` looks at first, which mostly tell; 1 where keys are few."""
        return max(call.lengths[1] // _SAMPLE, 1)


def least_bias(dtype: str) -> float:
    """The least that the largest bias of a query may be, for its gradient to be right.

    Kernels keep the logarithm of a sum, the largest logit included, and find the weights again from it: beyond this it
    is rounded by more than the dtype of the call is worth, and at the dtype's minimum the sum is lost.
    """
    return -(2.0**10) if "16" in dtype else -(2.0**7)


def four_axes(xp: Any, x: Array, batch: Sequence[int]) -> Array:
    """A bias or mask of four axes, as kernels take them: the first is the whole batch, or 1."""
    x = _ranked(xp, x, len(batch) + 3)
    if len(batch) == 1:
        return x
    if all(size == 1 for size in x.shape[: len(batch)]):
        return xp.reshape(x, (1, *x.shape[-3:]))
    return xp.reshape(xp.broadcast_to(x, (*batch, *x.shape[-3:])), (-1, *x.shape[-3:]))


def _of_one_batch(call: Call, mask: Structure) -> Structure:
    """The same with one batch axis: of lengths and ids the call's own, of an array that or 1."""
    xp, batch = call.backend.xp, call.batch
    if len(batch) == 1 and mask.kv_lengths is mask.kv_ids is None:
        return mask._replace(rest=tuple(four_axes(xp, x, batch) for x in mask.rest)) if mask.rest else mask

    def flat(x: Any, *length: int) -> Array | None:
        return None if x is None else xp.reshape(xp.broadcast_to(x, (*batch, *length)), (-1, *length))

    (rows, columns), rest = call.lengths, tuple(four_axes(xp, x, batch) for x in mask.rest)
    ids = {"query_ids": flat(mask.query_ids, rows), "kv_ids": flat(mask.kv_ids, columns)}
    return mask._replace(kv_lengths=flat(mask.kv_lengths), **ids, rest=rest)


def _array(call: Call, x: Any) -> Array:
    """An array of the call's library, if it is a Python scalar."""
    return x if hasattr(x, "shape") else call.backend.arrays.adopt(x, call.operands.query)


def _ranked(xp: Any, x: Array, rank: int) -> Array:
    """The array with so many axes at least, the first of size 1."""
    return x if x.ndim >= rank else xp.reshape(x, (1,) * (rank - x.ndim) + tuple(x.shape))


def _visible(call: Call) -> Array:
    """Where the mask shows a key, ``[..., heads or 1, q_length or 1, kv_length or 1]``."""
    return _ranked(call.backend.xp, call.visible(call.operands.mask), 3)


def _mean(call: Call, summed: Callable[[Any, Array, Any], Array]) -> Array:
    """The mean of all values for each query head, ``[batch..., 1, num_heads, v_depth]``, summed in float32 at least."""
    xp, arrays, value, dtype = call.backend.xp, call.backend.arrays, call.operands.value, call.options.dtype
    count, wide = value.shape[-3], getattr(xp, dtypes.promote(dtype, "float32"))
    if dtype == "float16":  # of which float32 holds the sum; fractions would be lost
        mean = summed(xp, value, wide) / count
    else:  # a sum that does not overflow where the mean does not
        mean = summed(xp, value / count, wide)
    mean = arrays.cast(mean, dtype)[..., None, :]
    (*lead, kv_heads, _, depth), heads = mean.shape, call.operands.query.shape[-2]
    return xp.reshape(xp.broadcast_to(mean, (*lead, kv_heads, heads // kv_heads, depth)), (*lead, heads, depth))


def _unseeing(call: Call, summed: Callable[[Any, Array, Any], Array]) -> Array:
    """The output of a fully masked row, ``[batch..., q_length or 1, num_heads, v_depth]``."""
    mean, arrays = _mean(call, summed), call.backend.arrays
    if call.operands.sinks is None:
        return mean
    return arrays.cast(mean * permute(arrays, sinks.share_of_hidden(call), (-2, -3, -1)), call.options.dtype)


def _filled(xp: Any, x: Array, length: int, depth: int) -> Array:
    """``[batch, length, heads, depth]`` with zeros up to a length and a depth."""
    for axis, size in ((1, length), (3, depth)):
        if x.shape[axis] != size:
            shape = (*x.shape[:axis], size - x.shape[axis], *x.shape[axis + 1 :])
            x = xp.concat((x, xp.broadcast_to(xp.zeros_like(x[:1, :1, :1, :1]), shape)), axis=axis)
    return x
