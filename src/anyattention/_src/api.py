"""The public functions: signatures and documentation. Each makes a call, chooses what serves it, and computes."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from anyattention._src import arguments, plan, registry, settings
from anyattention._src.call import Call, Operands, dropout_of, make_call, number
from anyattention._src.errors import ShapeError
from anyattention._src.implementations.tiled import TILED
from anyattention._src.interfaces import Backend
from anyattention._src.plan import Plan
from anyattention._src.rules import AnyArray, Bias, ByRule, Convertible, Mask
from anyattention._src.settings import Name
from anyattention._src.spread import spread

Array = TypeVar("Array", bound=AnyArray)  # what comes in comes out
_ADDITIVE = (
    "the mask has negative or infinite numbers, which are truthy, so that their keys are visible: what is meant to be "
    "added to logits goes into bias="
)
_BOOLEAN = "the bias is boolean, so that 0 or 1 is added to logits: what says which keys are visible goes into mask="
Guest = AnyArray | Convertible | complex | None  # beside the arrays of a call


def dot_product_attention(
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
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    sequence_axis: Any = None,
    implementation: Name | None = None,
) -> Array:
    """Attention of queries over keys and values, with the numbers of ``flax.linen.dot_product_attention``.

    Takes arrays of NumPy, JAX, PyTorch or any library of the array API standard, and returns the same kind, on
    the same device. Source: Vaswani et al., Attention is all you need (2017).

    Args:
        query: ``[batch..., q_length, num_heads, depth]``; any number of batch axes, none included.
        key: ``[batch..., kv_length, num_heads, depth]``. The query may have a multiple of its heads.
        value: ``[batch..., kv_length, num_heads, v_depth]``.
        bias: added to the logits; an array broadcastable with ``[batch..., num_heads, q_length, kv_length]``, or by
            rule, see `biases`.
        mask: truthy where a query may see a key, of any dtype; broadcastable like `bias`. A query that may see
            none gets the mean of all values.
        broadcast_dropout: one dropout mask for all batches and heads.
        dropout_rng: a key from `anyattention.random`, a JAX key, or raw ``uint32[2]``.
        dropout_rate: probability, in [0, 1), that a weight is dropped.
        deterministic: no dropout, whatever the rate.
        dtype: of the computation; None takes it from query, key and value by JAX's promotion, float32 of integers.
        precision: of the products, on JAX as in ``jax.lax.Precision``. Elsewhere the classic levels change
            nothing, since products are in full precision, and anything else is an error.
        module: a Flax module that is given the weights, before dropout, by its ``sow``.
        force_fp32_for_softmax: softmax in float32; a 16-bit call then returns float32.
        einsum_dot_general: JAX only: takes the place of ``jax.lax.dot_general`` in both products.
        qk_attn_weights_einsum: called as ``f("...qhd,...khd->...hqk", query, key)`` for the logits.
        attn_weights_value_einsum: called as ``f("...hqk,...khd->...qhd", weights, value)`` for the output.
        is_causal: a query sees the keys at its own position and before (top-left aligned), and-ed with `mask`.
        scale: what the query is multiplied by in place of ``1 / sqrt(depth)``, rounded to the compute dtype.
        logits_soft_cap: caps the logits: ``cap * tanh(logits / cap)``, before bias and mask, as in Gemma 2.
        sinks: a logit more in the sum of each softmax, of a key without a value, as in gpt-oss: ``[num_heads]``, or
            two axes or more, broadcastable to ``[batch..., num_heads, q_length]``. A query that may see no key then
            gets zero.
        sequence_axis: over which devices the sequence is spread: the name of a JAX mesh axis, or PyTorch's process
            group or one-dimensional DeviceMesh. Arrays are then whole, or the parts of this device: those of JAX
            inside ``jax.shard_map``, those of PyTorch. A bias and a dense mask have all columns.
        implementation: ``"exact"``, ``"tiled"``, ``"fused"``, or None to choose; see `explain`.

    Returns:
        ``[batch..., q_length, num_heads, v_depth]``, in the compute dtype.

    Raises:
        ShapeError: shapes that do not fit; a ValueError and an AssertionError.
        TypeError: arrays of different libraries, or a dtype that attention cannot compute in.
        ValueError: active dropout without a key or at a rate outside [0, 1); an unknown implementation; a
            `dtype` that is not floating or complex; a `precision` or einsum that cannot be honoured; a scale that
            is not finite; a soft cap that is not positive.

    Examples:
        >>> import numpy as np
        >>> x = np.eye(2, dtype=np.float32)[None, :, None, :]
        >>> dot_product_attention(x, x, x, mask=np.tri(2))[0, :, 0].round(3).tolist()
        [[1.0, 0.0], [0.33000001311302185, 0.6700000166893005]]
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
        module=module,
        force_fp32_for_softmax=force_fp32_for_softmax,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        sequence_axis=sequence_axis,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    return _computed(call, implementation)


def _computed(call: Call, implementation: Name | None) -> Any:
    found = call.backend.arrays.run(call.operands.query, plan.choose(call, implementation).compute, call)
    return found if call.restore is None else call.restore(found)


def dot_product_attention_weights(
    query: Array,
    key: Array,
    bias: Guest | Bias = None,
    mask: Guest | Mask = None,
    broadcast_dropout: bool = True,
    dropout_rng: AnyArray | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    einsum: Callable[..., Array] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    implementation: Name | None = None,
) -> Array:
    """The attention weights: arguments as `dot_product_attention`, without the value.

    Computed by the exact implementation, since the others never have all weights at once.

    The function `einsum` is called as ``f("...qhd,...khd->...hqk", query, key)`` for the logits.

    Returns:
        ``[batch..., num_heads, q_length, kv_length]``, after dropout, in the compute dtype.

    Examples:
        >>> import numpy as np
        >>> x = np.zeros((2, 1, 4), dtype=np.float32)
        >>> dot_product_attention_weights(x, x, is_causal=True).tolist()
        [[[1.0, 0.0], [0.5, 0.5]]]
    """
    call = call_of(
        query=query,
        key=key,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        dtype=dtype,
        precision=precision,
        module=module,
        force_fp32_for_softmax=force_fp32_for_softmax,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=einsum,
        weights_only=True,
    )
    return _computed(call, implementation or "exact")


def dot_product_attention_vjp(
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
    force_fp32_for_softmax: bool = False,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array, *tuple[Any, ...]]]]:
    """The output and its pullback: gradients for any library, NumPy included, in memory that grows with the lengths.

    Computed by the tiled implementation, whatever `config` says; arguments as `dot_product_attention`. The pullback
    keeps copies, so that arguments and output may be changed in place before it is called.

    Returns:
        The output, and the pullback: a function from the gradient of a loss by the output to its gradients by query,
        key, value and bias, and with sinks by these. Each has the shape and dtype of what it belongs to; of a query,
        key or value of integers, the compute dtype. That of the bias is None where the bias is None, a Python scalar or
        integers; of a bias by rule it is a tuple of those of its arrays, as ``bias.arrays()`` has them, with None for
        integers and for what the library does not differentiate.

    Raises:
        NotImplementedError: a call that tiled cannot serve, such as one of a complex dtype.

    Examples:
        >>> import numpy as np
        >>> x = np.ones((2, 1, 4), dtype=np.float32)
        >>> output, pullback = dot_product_attention_vjp(x, x, x)
        >>> [gradient.sum().item() for gradient in pullback(output)[:3]]
        [0.0, 0.0, 8.0]
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
        force_fp32_for_softmax=force_fp32_for_softmax,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
    )
    plan.choose(call, TILED.name)  # which raises where tiled cannot serve the call
    arrays = call.backend.arrays
    given = [arrays.dtype_name(arguments.array_of(call.backend, "", x)) for x in (query, key, value)]
    output, pullback = arrays.run(call.operands.query, TILED.vjp, call, given)
    return output, partial(_pulled_back, call.backend, pullback, tuple(output.shape))


def _pulled_back(backend: Backend, pullback: Callable[[Array], Any], shape: tuple[Any, ...], doutput: Array) -> Any:
    """The gradients, from that of the output."""
    doutput = arguments.array_of(backend, "doutput", doutput)
    if tuple(doutput.shape) != shape:
        raise ShapeError(f"doutput must have the shape of the output, {shape}, got {tuple(doutput.shape)}")
    return backend.arrays.run(doutput, pullback, doutput)


def explain(
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
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    sequence_axis: Any = None,
    implementation: Name | None = None,
) -> Plan:
    """The plan that `dot_product_attention` follows for these very arguments; prints as a table.

    Arguments as `dot_product_attention`; nothing is computed. On JAX, query, key, value, bias and mask may be
    ``jax.ShapeDtypeStruct``. For a call that no implementation of its name can serve, the plan says why.

    Raises:
        ShapeError, TypeError, ValueError: as `dot_product_attention`.

    Examples:
        >>> import numpy as np
        >>> x = np.zeros((2, 1, 4))
        >>> explain(x, x, x).implementation
        'exact'
    """
    return _outlined(
        implementation,
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
        module=module,
        force_fp32_for_softmax=force_fp32_for_softmax,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        sequence_axis=sequence_axis,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )


def _outlined(implementation: str | None, **given: Any) -> Plan:
    """The plan for arguments of which some may be shapes that stand for arrays."""
    backend = _backend(*(given[name] for name in ("query", "key", "value", "bias", "mask", "sinks")))
    found = backend.arrays.outline(lambda **shapes: plan.explain(call_of(**shapes), implementation), given)
    odd = ((arguments.additive(given["mask"]), _ADDITIVE), (arguments.boolean(given["bias"]), _BOOLEAN))
    return found._replace(reasons=(*found.reasons, *(reason for is_odd, reason in odd if is_odd)))


def _backend(query: Any, key: Any, value: Any, bias: Any, mask: Any, sinks: Any) -> Backend:
    """The backend of the one library that serves these arguments."""
    guests: dict[str, Any] = {}
    for name, x in (("bias", bias), ("mask", mask)):
        guests |= {f"{name}[{i}]": part for i, part in enumerate(x.arrays())} if isinstance(x, ByRule) else {name: x}
    return registry.backend_for(query=query, key=key, value=value, **guests, sinks=sinks)


def call_of(
    *,
    query: Any,
    key: Any,
    value: Any = None,
    bias: Any,
    mask: Any,
    dropout_rng: Any,
    dropout_rate: Any,
    broadcast_dropout: Any,
    deterministic: Any,
    dtype: Any,
    scale: Any,
    logits_soft_cap: Any,
    sinks: Any,
    origin: Any = None,
    sequence_axis: Any = False,
    **options: Any,
) -> Call:
    """The call, with all arrays in the one library that serves them."""
    asked = {name: option for name, option in options.items() if option or isinstance(option, str)}
    if scale is not None:
        asked["scale"] = number("scale", scale)
    if logits_soft_cap is not None:
        asked["logits_soft_cap"] = number("logits_soft_cap", logits_soft_cap, positive=True)
    kind, lone = type(query), bias is mask is sinks is None
    if lone and kind is type(key) and (kind is type(value) or value is None) and query is not None:
        backend = registry.backend_of(query, "query") or registry.backend_for(query=query)
    else:
        backend = _backend(query, key, value, bias, mask, sinks)
    query, key = arguments.array_of(backend, "query", query), arguments.array_of(backend, "key", key)
    if "weights_only" not in asked:
        value = arguments.array_of(backend, "value", value)
    if bias is not None and type(bias) not in (bool, int, float, complex):
        bias = arguments.bias_of(backend, bias, query)
    if mask is not None:
        mask = arguments.mask_of(backend, mask, query, key)
    if sinks is not None:
        if not hasattr(sinks, "shape"):
            raise TypeError(f"sinks must be an array, one logit for each head, got a {type(sinks).__name__}")
        sinks = arguments.guest_of(backend, "sinks", sinks, query)
    if deterministic or dropout_rate == 0.0:
        dropout_rng = None
    else:
        asked["dropout"] = dropout_of(arguments.rate_of(dropout_rate), broadcast_dropout, dropout_rng)
        dropout_rng = arguments.key_of(backend, dropout_rng)
    named = sequence_axis or settings.current().sequence_axis  # of functions that take none False: arrays are not asked
    axis = None if (named or sequence_axis) is False else backend.axis(named, query, key)
    call = make_call(backend, Operands(query, key, value, bias, mask, dropout_rng, origin, sinks), dtype, asked, axis)
    call, axis = backend.localized(call, axis)
    return call if axis is None or axis.size == 1 else spread(call, axis, settings.current().exchange)
