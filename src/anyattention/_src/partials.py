"""Attention over some of the keys, and how it is joined with attention over the others: the public functions."""

import operator
from typing import Any, NamedTuple, TypeVar

from anyattention._src import dtypes, registry
from anyattention._src.api import Guest, call_of
from anyattention._src.call import Call
from anyattention._src.errors import ShapeError
from anyattention._src.implementations.tiled import TILED
from anyattention._src.interfaces import Backend, permute
from anyattention._src.rules import AnyArray, Bias, Mask

Array = TypeVar("Array", bound=AnyArray)


class Partial(NamedTuple):
    """Attention of some queries over some of their keys: what `merge` joins with attention over the others.

    A tuple of three arrays of one library, in float32 at least, and so a pytree of JAX and PyTorch. To differentiation
    `max_logit` counts as a constant: differentiate functions of `output` and `lse`.

    What another kernel returns beside its output, the logarithm of the sum of the exponentials, is a partial too:
    ``Partial(output, lse, ones)``.
    """

    output: Any
    """``[batch..., q_length, num_heads, v_depth]``: attention over these keys alone."""
    max_logit: Any
    """``[batch..., num_heads, q_length]``: the largest logit, after soft cap, bias and mask. Where a query may see none
    of the keys it is the fill, the smallest finite number of the compute dtype; minus infinity where there are no keys.
    """
    total: Any
    """``[batch..., num_heads, q_length]``: the sum of ``exp(logit - max_logit)``. The number of keys where a query may
    see none of them."""

    @property
    def lse(self) -> Any:
        """The logarithm of the sum of ``exp(logit)``, ``[batch..., num_heads, q_length]``.

        Where a query may see no key, it is the fill: that is so large that the logarithm of a count is lost beside it.
        So `merge` takes `max_logit` and `total`.
        """
        backend = registry.backend_for(max_logit=self.max_logit, total=self.total)
        return backend.arrays.run(self.total, _lse, backend.xp, self.max_logit, self.total)


def merge(*partials: Partial) -> Partial:
    """The partial over all keys that these partials of the same queries are over, in any order and grouping.

    With m the largest of the `max_logit`, a partial of total t weighs ``t exp(max_logit - m)``: these weights add up
    to the new total, and the new output is the mean of the outputs by these weights. An output of weight zero has no
    part in it, NaN or not. Where a query may see no key in any of the partials, the output is the mean of all values.
    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018).

    Args:
        *partials: one or more, over sets of keys of which no two share one.

    Raises:
        TypeError: what is no partial; arrays of different libraries.
        ShapeError: partials of different shapes.
        ValueError: no partials.

    Examples:
        >>> import numpy as np
        >>> from anyattention import dot_product_attention, dot_product_attention_partial
        >>> x = np.eye(4, dtype=np.float32)[:, None]
        >>> pages = [dot_product_attention_partial(x, x[i : i + 2], x[i : i + 2]) for i in (0, 2)]
        >>> bool(np.allclose(merge(*pages).output, dot_product_attention(x, x, x)))
        True
    """
    if not partials:
        raise ValueError("merge needs one partial or more, got none")
    for x in partials:
        if not isinstance(x, Partial):
            raise TypeError(f"merge takes partials, got a {type(x).__name__}: of a list of them, write merge(*pages)")
    first, *others = partials
    shapes = [tuple(x.shape) for x in first]
    for x in others:
        if shapes != (found := [tuple(y.shape) for y in x]):
            raise ShapeError(
                "partials must be of the same queries, with output, max_logit and total of the same shapes, got "
                f"{', '.join(map(str, shapes))} and {', '.join(map(str, found))}"
            )
    if not others:
        return first
    named = {f"{name}[{i}]": x for i, y in enumerate(partials) for name, x in y._asdict().items()}
    backend = registry.backend_for(**named)
    return Partial(*backend.arrays.run(first.output, _merged, backend, partials))


def dot_product_attention_partial(
    query: Array,
    key: Array,
    value: Array,
    bias: Guest | Bias = None,
    mask: Guest | Mask = None,
    broadcast_dropout: bool = True,
    dropout_rng: AnyArray | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    origin: tuple[Any, Any] | None = None,
    whole: tuple[int, int] | None = None,
) -> Partial:
    """Attention over these keys, which may be some of many: the output with the row statistics that `merge` needs.

    For keys in pages, a prefix that many queries share, the largest logit of each head, losses on the logarithm of the
    sum of the exponentials. Computed by the tiled implementation, whatever `config` says; arguments as
    `dot_product_attention`.

    The `sinks` are a key more, without a value: pass them with one of the partials that are merged, not with each. They
    count in `max_logit`.

    The `origin` is where the first query and the first key are in the whole of which these are a part: a pair of
    integers, or of integer arrays without axes, which JAX may trace; None for ``(0, 0)``. Masks by rule and `is_causal`
    take these positions. A bias, a dense mask and the ids of a `SegmentMask` are those of these queries and keys.

    The lengths ``(q_length, kv_length)`` of the `whole` are needed for dropout, with `origin`: its bits are those that
    `dot_product_attention` draws for the whole.

    Returns:
        A `Partial`, in float32, or float64 if query, key, value, bias or sinks are. Of no keys at all, kv_length 0, it
        changes nothing that it is merged with.

    Raises:
        ShapeError, TypeError, ValueError: as `dot_product_attention`; dropout without `origin` and `whole`.
        NotImplementedError: a call that tiled cannot serve, such as one of a complex dtype.

    Examples:
        >>> import numpy as np
        >>> x = np.eye(2, dtype=np.float32)[:, None]
        >>> found = dot_product_attention_partial(x, x, x, scale=1.0, is_causal=True)
        >>> found.max_logit.tolist(), found.total.round(3).tolist()
        ([[1.0, 1.0]], [[1.0, 1.3680000305175781]])
    """
    call = call_of(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        dtype=dtype,
        precision=precision,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        origin=origin,
        whole=whole,
        partial=True,
    )
    call = _placed(call) if call.restore is None else call
    backend, sinks, restore = call.backend, call.sinks, call.restore
    call = Call(backend=backend, operands=call.operands._replace(sinks=None), options=call.options)
    if reasons := list(TILED.refusals(call)):
        raise NotImplementedError(f"dot_product_attention_partial cannot serve this call: {'; '.join(reasons)}")
    found = Partial(*backend.arrays.run(call.operands.query, TILED.partial, call))
    if sinks is not None:
        found = merge(found, Partial(*backend.arrays.run(sinks, _of_sinks, backend, sinks, found)))
    return found if restore is None else Partial(*restore.partial(*found))


def _lse(xp: Any, max_logit: Any, total: Any) -> Any:
    """With a derivative of zero where there is no key."""
    none = total == 0.0
    return xp.where(none, -float("inf"), max_logit + xp.log(xp.where(none, 1.0, total)))


def _merged(backend: Backend, partials: tuple[Partial, ...]) -> tuple[Any, Any, Any]:
    """By sums over the partials, in which no derivative is NaN because of a row that has no part in them."""
    xp, arrays = backend.xp, backend.arrays
    largest = partials[0].max_logit
    for x in partials[1:]:
        largest = xp.maximum(largest, x.max_logit)
    shift = xp.where(largest == -float("inf"), 0.0, largest)  # -inf - -inf is NaN
    weights = [x.total * xp.exp(x.max_logit - shift) for x in partials]
    total = sum(weights[1:], weights[0])
    none = total == 0.0
    each = xp.where(none, 1.0, total)
    output, nothing = 0.0, 0.0
    for x, weight in zip(partials, weights, strict=True):
        weight = permute(arrays, xp.where(none, 0.0, weight / each)[..., None], (-2, -3, -1))
        output = output + xp.where(weight == 0.0, 0.0, x.output) * weight
        nothing = nothing + x.output  # zero without keys, NaN where every logit is minus infinity
    return xp.where(permute(arrays, none[..., None], (-2, -3, -1)), nothing, output), largest, total


def _of_sinks(backend: Backend, sinks: Any, beside: Partial) -> tuple[Any, Any, Any]:
    """The partial of a key without a value, from ``[..., num_heads or 1, q_length or 1, 1]``."""
    arrays, xp = backend.arrays, backend.xp
    sinks = arrays.cast(sinks, dtypes.promote(arrays.dtype_name(beside.total), arrays.dtype_name(sinks)))
    largest = backend.tiles.row_max(sinks)  # a constant
    total = xp.exp(sinks - xp.where(largest == -float("inf"), 0.0, largest))
    ones = xp.ones_like(beside.total)
    return xp.zeros_like(beside.output), largest[..., 0] * ones, total[..., 0] * ones


def _placed(call: Call) -> Call:
    """The call with its origin as integers and arrays of int32.

    Raises:
        TypeError, ValueError, ShapeError: what is no origin or no whole, or does not fit the call.
    """
    origin, whole = call.operands.origin, call.options.whole
    if call.options.dropout is not None and (origin is None or whole is None):
        raise ValueError(
            "dropout bits are those of the whole: pass origin=(first_query, first_key) and whole=(q_length, kv_length),"
            f" if this is the whole origin=(0, 0) and whole={call.lengths}"
        )
    if whole is not None:
        if origin is None:
            raise ValueError("whole needs origin=(first_query, first_key), the positions of these in the whole")
        if not (isinstance(whole, tuple | list) and len(whole) == 2 and all(isinstance(n, int) for n in whole)):
            raise TypeError(f"whole must be a pair of integers, (q_length, kv_length), got {whole!r}")
    if origin is None:
        return call
    if not (isinstance(origin, tuple | list) and len(origin) == 2):
        raise TypeError(f"origin must be a pair of integers, (first_query, first_key), got {origin!r}")
    origin = tuple([_position(call.backend, x) for x in origin])
    for name, first, length, most in zip(("queries", "keys"), origin, call.lengths, whole or (None, None), strict=True):
        if isinstance(first, int) and first < 0:
            raise ValueError(f"origin must not be negative, got {first} for the first of the {name}")
        if most is not None and (length > most or (isinstance(first, int) and first + length > most)):
            raise ShapeError(f"whole has {most} {name}, but these are {length} from {first} on")
    return Call(backend=call.backend, operands=call.operands._replace(origin=origin), options=call.options)


def _position(backend: Backend, x: Any) -> Any:
    """An integer as Python's, an array without axes of the call's library in int32."""
    home = registry.backend_of(x, "origin")
    try:
        if isinstance(x, bool):
            raise TypeError
        if home is backend and home.name != "numpy":
            if tuple(x.shape) or not backend.arrays.dtype_name(x).startswith(("int", "uint")):
                raise TypeError
            return backend.arrays.cast(x, "int32")
        return x if isinstance(x, int) else operator.index(x)
    except TypeError:
        raise TypeError(f"origin must be a pair of integers or of integer arrays without axes, got {x!r}") from None
