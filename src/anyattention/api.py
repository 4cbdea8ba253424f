"""The public functions: signatures, documentation, checks of the arguments. The work is done in `attention`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from anyattention import attention as exact
from anyattention import dispatch, layout, settings
from anyattention.backend import Backend
from anyattention.engine import Engine, find
from anyattention.errors import ShapeError
from anyattention.masks import CausalMask, Mask, as_mask
from anyattention.plan import Plan, choose
from anyattention.request import Dropout, Request

Array = Any


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
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
    implementation: str | None = None,
) -> Array:
    """Attention of queries over keys and values, with the numbers of ``flax.linen.dot_product_attention``.

    Takes arrays of NumPy, JAX, PyTorch or any library of the array API standard, and returns the same kind, on
    the same device. Source: Vaswani et al., Attention is all you need (2017).

    Args:
        query: ``[batch..., q_length, num_heads, depth]``; any number of batch axes, none included.
        key: ``[batch..., kv_length, num_heads, depth]``. The query may have a multiple of its heads.
        value: ``[batch..., kv_length, num_heads, v_depth]``.
        bias: added to the logits; broadcastable with ``[batch..., num_heads, q_length, kv_length]``.
        mask: truthy where a query may see a key, of any dtype; broadcastable like `bias`. A query that may see
            none gets the mean of all values.
        broadcast_dropout: one dropout mask for all batches and heads.
        dropout_rng: a key from `anyattention.random`, a JAX key, or raw ``uint32[2]``.
        dropout_rate: probability, in [0, 1), that a weight is dropped.
        deterministic: no dropout, whatever the rate.
        dtype: dtype of the computation; None takes it from query, key and value by JAX's promotion. Integers
            compute in float32.
        precision: of the products, on JAX as in ``jax.lax.Precision``. Elsewhere the classic levels change
            nothing, since products are in full precision, and anything else is an error.
        module: a Flax module that is given the weights, before dropout, by its ``sow``.
        force_fp32_for_softmax: softmax in float32; a 16-bit call then returns float32.
        einsum_dot_general: JAX only: takes the place of ``jax.lax.dot_general`` in both products.
        qk_attn_weights_einsum: called as ``f("...qhd,...khd->...hqk", query, key)`` for the logits.
        attn_weights_value_einsum: called as ``f("...hqk,...khd->...qhd", weights, value)`` for the output.
        is_causal: a query sees the keys at its own position and before (top-left aligned), and-ed with `mask`.
        implementation: ``"exact"``, ``"tiled"``, ``"fused"``, or None to choose; see `explain`.

    Returns:
        ``[batch..., q_length, num_heads, v_depth]``, in the compute dtype.

    Raises:
        ShapeError: shapes that do not fit; a ValueError and an AssertionError.
        TypeError: arrays of different libraries, or a dtype that attention cannot compute in.
        ValueError: active dropout without a key or at a rate outside [0, 1); an unknown implementation; a
            `dtype` that is not floating or complex; a `precision` or einsum that cannot be honoured.

    >>> import numpy as np
    >>> x = np.eye(2, dtype=np.float32)[None, :, None, :]
    >>> dot_product_attention(x, x, x, mask=np.tri(2))[0, :, 0].round(3).tolist()
    [[1.0, 0.0], [0.33000001311302185, 0.6700000166893005]]
    """
    if bool(qk_attn_weights_einsum) != bool(attn_weights_value_einsum):
        raise ValueError("qk_attn_weights_einsum and attn_weights_value_einsum must be specified together")
    _check_einsum(precision, einsum_dot_general, qk_attn_weights_einsum)
    backend, request, plan = _resolve(
        *(query, key, value, bias, mask, is_causal, dtype, implementation, module),
        *(broadcast_dropout, dropout_rng, dropout_rate, deterministic),
        *(precision, force_fp32_for_softmax),
        einsum=einsum_dot_general or qk_attn_weights_einsum,
    )
    if plan.implementation == "tiled":
        return backend.run(request.query, layout.attention, backend, request)
    if plan.implementation == "fused":
        return backend.run(request.query, plan.engine.attention, request, partial(layout.attention, backend))
    einsum = _einsum(backend, precision, einsum_dot_general)
    return backend.run(
        request.query,
        exact.attention,
        backend,
        *request._replace(mask=_dense(backend, request))[:7],
        module=module,
        force_fp32_for_softmax=force_fp32_for_softmax,
        query_key=qk_attn_weights_einsum or einsum,
        weights_value=attn_weights_value_einsum or einsum,
    )


def dot_product_attention_weights(
    query: Array,
    key: Array,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
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
    implementation: str | None = None,
) -> Array:
    """The attention weights, ``[batch..., num_heads, q_length, kv_length]``; arguments as `dot_product_attention`.

    >>> import numpy as np
    >>> x = np.zeros((2, 1, 4), dtype=np.float32)
    >>> dot_product_attention_weights(x, x, is_causal=True).tolist()
    [[[1.0, 0.0], [0.5, 0.5]]]
    """
    _check_einsum(precision, einsum_dot_general, einsum)
    if implementation in ("tiled", "fused"):
        raise NotImplementedError(f"implementation={implementation!r} never has all the weights: pass None or 'exact'")
    backend, request, _ = _resolve(
        *(query, key, None, bias, mask, is_causal, dtype, implementation or "exact", module),
        *(broadcast_dropout, dropout_rng, dropout_rate, deterministic),
        *(precision, force_fp32_for_softmax),
        einsum=einsum,
        weights_only=True,
    )
    return backend.run(
        request.query,
        exact.attention_weights,
        *(backend, request.dtype, request.query, request.key),
        bias=request.bias,
        mask=_dense(backend, request),
        dropout=request.dropout,
        module=module,
        force_fp32_for_softmax=force_fp32_for_softmax,
        query_key=einsum or _einsum(backend, precision, einsum_dot_general),
    )


def dot_product_attention_vjp(
    query: Array,
    key: Array,
    value: Array,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    force_fp32_for_softmax: bool = False,
    *,
    is_causal: bool = False,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array, Any]]]:
    """The output and its pullback: gradients for any library, NumPy included, in memory that grows with the lengths.

    Computed by the tiled implementation; arguments as `dot_product_attention`.

    Returns:
        The output, and a function from the gradient of a loss by the output to its gradients by query, key, value
        and bias, each of the shape and dtype of what it belongs to (of integers, in the compute dtype), None where the
        bias is None or a scalar.

    >>> import numpy as np
    >>> x = np.ones((2, 1, 4), dtype=np.float32)
    >>> output, pullback = dot_product_attention_vjp(x, x, x)
    >>> [gradient.sum().item() for gradient in pullback(output)[:3]]
    [0.0, 0.0, 8.0]
    """
    backend, request, _ = _resolve(
        *(query, key, value, bias, mask, is_causal, dtype, "tiled", None),
        *(broadcast_dropout, dropout_rng, dropout_rate, deterministic),
        *(precision, force_fp32_for_softmax),
    )
    given = [backend.dtype_name(_array(backend, "query, key or value", x)) for x in (query, key, value)]
    output, pullback = backend.run(request.query, layout.vjp, backend, request, given)
    return output, partial(backend.run, request.query, pullback)


def explain(
    query: Array,
    key: Array,
    value: Array,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
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
    implementation: str | None = None,
) -> Plan:
    """The plan that `dot_product_attention` follows for these very arguments; prints as a table.

    >>> import numpy as np
    >>> x = np.zeros((2, 1, 4))
    >>> explain(x, x, x).implementation
    'exact'
    """
    _, request, plan = _resolve(
        *(query, key, value, bias, mask, is_causal, dtype, implementation, module),
        *(broadcast_dropout, dropout_rng, dropout_rate, deterministic),
        *(precision, force_fp32_for_softmax),
        einsum=einsum_dot_general or qk_attn_weights_einsum,
    )
    remarks = plan.engine.remarks(request) if plan.engine else ()
    return plan._replace(reasons=(*plan.reasons, *remarks))


def _resolve(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    is_causal: bool,
    dtype: Any,
    implementation: str | None,
    module: Any,
    broadcast_dropout: bool,
    dropout_rng: Any,
    dropout_rate: Any,
    deterministic: Any,
    precision: Any,
    force_fp32: bool,
    einsum: Any = None,
    weights_only: bool = False,
) -> tuple[Backend, Request, Plan]:
    """Find the library and the plan, and make all arguments fit them."""
    ruled = isinstance(mask, Mask)
    if ruled:
        masked_by = {f"mask[{i}]": x for i, x in enumerate(mask.arrays())}
        backend = dispatch.backend_for(query=query, key=key, value=value, bias=bias, **masked_by)
    else:
        backend = dispatch.backend_for(query=query, key=key, value=value, bias=bias, mask=mask)
    arrays = [_array(backend, "query", query), _array(backend, "key", key)]
    if not weights_only:
        arrays.append(_array(backend, "value", value))
    arrays, compute_dtype = backend.promote(arrays, dtype)
    query, key, value = (*arrays, None) if weights_only else arrays
    _check_shapes(query, key, value, grouped=not einsum)
    if bias is not None or mask is not None:
        bias, mask = _guests(backend, query, key, bias, mask)
    dropout = _dropout(backend, broadcast_dropout, dropout_rng, dropout_rate, deterministic)
    if is_causal:
        mask = _causal(backend, query, key, mask)
    request = Request(compute_dtype, query, key, value, bias, mask, dropout, precision, force_fp32)
    implementation = implementation or settings.current().implementation
    plan = choose(implementation, backend, query, key, _serves, request, module, einsum)
    return backend, request, plan


def _dense(backend: Backend, request: Request) -> Any:
    """The mask as exact takes it: by rule no longer, since exact has all logits anyway."""
    query, key, mask = request.query, request.key, request.mask
    if not isinstance(mask, Mask):
        return mask
    return mask.on(backend, tuple(query.shape[:-3]), (query.shape[-3], key.shape[-3]), query)


def _causal(backend: Backend, query: Array, key: Array, mask: Any) -> Any:
    """The mask with causality; by rule, but for lengths that are not known yet."""
    if _unknown(query.shape[-3]) or _unknown(key.shape[-3]):
        causal = backend.causal(query, key)
        return causal if mask is None else backend.truth(mask) & causal
    return CausalMask() if mask is None else CausalMask() & as_mask(mask)


def _serves(
    implementation: str, backend: Backend, request: Request, module: Any, einsum: Any
) -> tuple[Engine | None, list[str]]:
    """The engine, if any, with which an implementation serves the request, and the reasons why it cannot."""
    reasons = []
    if module:
        reasons.append(f"module is given the weights, which {implementation} never has all at once")
    if einsum:
        reasons.append("einsum overrides take whole products")
    if any(_unknown(size) for x in (request.query, request.key, request.value) for size in x.shape):
        reasons.append("lengths are unknown")
    if implementation == "tiled":
        return None, reasons + _not_tiled(backend, request)
    if reasons:
        return None, reasons
    engine, reasons = find(backend.engines, request)
    return engine, reasons if engine or reasons else [f"there is no engine for {backend.name}"]


def _not_tiled(backend: Backend, request: Request) -> list[str]:
    reasons, bias, dropout = [], request.bias, request.dropout
    if isinstance(bias, complex) or (hasattr(bias, "shape") and backend.dtype_name(bias).startswith("complex")):
        reasons.append("the bias is complex")
    if request.dtype not in ("bfloat16", "float16", "float32", "float64"):
        reasons.append(f"tiles of {request.dtype} are not supported")
    if dropout and (reason := backend.no_keep_tiles(dropout.key, dropout.keep_prob)):
        reasons.append(reason)
    return reasons


def _check_einsum(precision: Any, einsum_dot_general: Any, einsum: Any) -> None:
    if (precision or einsum_dot_general) and einsum:
        raise ValueError("precision/einsum_dot_general and einsum overrides are mutually exclusive: pass one of them")


def _einsum(backend: Backend, precision: Any, dot_general: Any) -> Callable[..., Array]:
    if precision is None and dot_general is None:
        return backend.contract
    return partial(backend.contract, precision=precision, dot_general=dot_general)


def _array(backend: Backend, name: str, x: Any) -> Array:
    if x is None:
        raise TypeError(f"{name} must be an array, got None")
    return backend.adopt(x, None) if dispatch.backend_of(x) is not backend else backend.check_array(x)


def _guests(backend: Backend, query: Array, key: Array, bias: Any, mask: Any) -> tuple[Any, Any]:
    """Bias and mask as arrays of the call's library, once their shapes are known to fit."""
    if bias is not None and type(bias) not in (bool, int, float, complex):
        bias = _guest(backend, "bias", bias, query)
    if mask is not None and not isinstance(mask, Mask):
        mask = _guest(backend, "mask", mask, query)
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    for name, x in (("bias", bias), ("mask", mask)):
        if hasattr(x, "shape"):
            shape = _broadcast(shape, tuple(x.shape), name)
    return bias, mask


def _guest(backend: Backend, name: str, x: Any, like: Array) -> Array:
    if isinstance(x, list | tuple):
        raise TypeError(f"{name} must be an array or a scalar, got a {type(x).__name__}: convert it first")
    home = dispatch.backend_of(x)
    if home is not None:
        x = home.check_array(x)
    if home is not backend:
        return backend.adopt(x, like)
    backend.check_dtype(backend.dtype_name(x))
    return x


def _dropout(backend: Backend, broadcast: bool, key: Any, rate: Any, deterministic: Any) -> Dropout | None:
    """The dropout to apply, or None; checked only where it is active, since Flax's modules always pass a rate."""
    if deterministic or rate == 0.0:
        return None
    if not isinstance(rate, int | float) and hasattr(rate, "shape") and rate.shape:
        rate = rate.reshape(())  # of one element, or the comparison above would have raised
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}; deterministic=True switches dropout off")
    if key is None:
        raise ValueError(
            "dropout needs a key: pass dropout_rng=anyattention.random.key(seed), or deterministic=True for none"
        )
    return Dropout(dispatch.key_for(backend, key), 1.0 - rate, broadcast)


def _check_shapes(query: Array, key: Array, value: Array | None, grouped: bool) -> None:
    """Raise ShapeError with Flax's sentence, in Flax's order; heads may be grouped, as in flax.nnx."""
    q, k, v = query.shape, key.shape, (key if value is None else value).shape
    if len(q) > 2 and q == k and k == v:
        return
    arrays = (query, key) if value is None else (query, key, value)

    def fail(sentence: str) -> ShapeError:
        names = "q, k" if value is None else "q, k, v"
        return ShapeError(f"{sentence.format(names)} Got shapes {', '.join(str(tuple(x.shape)) for x in arrays)}.")

    if not len(q) == len(k) == len(v):
        raise fail("{} must have same rank.")
    if len(q) < 3:
        raise fail("{} need at least three axes, [batch..., length, num_heads, depth].")
    if not (_same(q[:-3], k[:-3]) and _same(k[:-3], v[:-3])):
        raise fail("{} batch dims must match.")
    if not _same(k[-2:-1], v[-2:-1]) or (
        not _same(q[-2:-1], k[-2:-1]) and not (grouped and k[-2] and q[-2] % k[-2] == 0)
    ):
        raise fail("{} num_heads must match.")
    if not _same(k[-3:-2], v[-3:-2]):
        raise fail("k, v lengths must match.")
    if not _same(q[-1:], k[-1:]):
        raise fail("q, k depths must match.")


def _unknown(size: Any) -> bool:
    return size is None or size != size  # ndonnx says None, Dask NaN


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a == b or all(x == y or _unknown(x) or _unknown(y) for x, y in zip(a, b, strict=True))


def _broadcast(shape: tuple[Any, ...], other: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """The broadcast shape; either may have more axes, or grow a single one, as in Flax."""
    rank = max(len(shape), len(other))
    result = []
    for a, b in zip((1,) * (rank - len(shape)) + shape, (1,) * (rank - len(other)) + other, strict=True):
        if not (a == b or a == 1 or b == 1 or _unknown(a) or _unknown(b)):
            raise ShapeError(f"Incompatible shapes for broadcasting: {name} {other} with attention weights {shape}")
        result.append(b if a == 1 else a)
    return tuple(result)
