"""A call whose arguments are checked: its operands, which are traced and differentiated, and its options."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from anyattention._src import dtypes
from anyattention._src.errors import ShapeError
from anyattention._src.interfaces import Axis, Backend, unknown
from anyattention._src.rules import Bias, ByRule, CausalMask, Lowering, Mask, as_mask, sum_of_terms, visible
from anyattention._src.structure import Structure, structure

Array = Any


class Operands(NamedTuple):
    """The arrays of a call, all of one library; query, key and value of one dtype."""

    query: Array  # [batch..., q_length, num_heads, depth]
    key: Array  # [batch..., kv_length, kv_heads, depth]
    value: Array  # [batch..., kv_length, kv_heads, v_depth]; None where only the weights are wanted
    bias: Any = None  # by rule, an array or a scalar, broadcastable to [batch..., num_heads, q_length, kv_length]
    mask: Any = None  # by rule or an array, broadcastable likewise; with causality
    dropout_key: Any = None
    # Position of the first query and key in the whole of which they are a shard, after that of the first batch entry
    # and head if there are some of these; None for the whole.
    origin: Any = None
    sinks: Any = None  # [num_heads], or of more axes broadcastable to [batch..., num_heads, q_length]


class Dropout(NamedTuple):
    """Dropout that is switched on: the probability to keep a weight, and whether one mask serves all heads."""

    keep_prob: Any  # a Python float or a NumPy scalar, whose dtype says how many bits are drawn
    broadcast: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call asks for besides its operands; hashable but for Flax's modules."""

    dtype: str  # of the computation
    dropout: Dropout | None = None
    precision: Any = None
    force_fp32_for_softmax: bool = False
    scale: float | None = None  # of the logits; None for 1 / sqrt(depth)
    logits_soft_cap: float | None = None
    module: Any = None
    einsum_dot_general: Any = None
    qk_attn_weights_einsum: Any = None
    attn_weights_value_einsum: Any = None
    weights_only: bool = False
    whole: tuple[int, ...] | None = None  # lengths of queries and keys of which the operands are a shard, as `origin`
    spread: Any = None  # a `Spread`: how the sequence is computed on several devices
    partial: bool = False  # whether the row statistics are wanted too: there are other keys

    @property
    def needs(self) -> frozenset[str]:
        """The names of the options that are not at their defaults."""
        fields = [field for name, field in self.__dataclass_fields__.items() if name != "dtype"]
        return frozenset([field.name for field in fields if getattr(self, field.name) is not field.default])


_AXES = "[batch..., length, num_heads, depth]"
_NOTHING: frozenset[str] = frozenset()
_ALWAYS = frozenset(("query", "key", "value"))
#: With nothing asked for, by dtype: making one takes 1.5 us of a call's 12. Never changed, or torch.compile would
#: compile anew.
_PLAIN = {
    name: Options(dtype=name) for name in ("float32", "float64", "bfloat16", "float16", "complex64", "complex128")
}


@dataclass(kw_only=True, eq=False)
class Call:
    """What an implementation computes; not to be changed, and not frozen, which would cost 0.4 us."""

    backend: Backend
    operands: Operands
    options: Options
    restore: Any = None  # what makes of local results what the caller gets, see `Backend.localized`
    fitted: Any = None  # the mask as the engine that was asked last is given it, see `Fused.fit`
    _structure: Structure | None = None  # not `cached_property`, which torch.compile cannot trace

    @property
    def needs(self) -> frozenset[str]:
        """What the call asks for beyond query, key and value: names of operands and options, and "grouped heads"."""
        query, key, _, bias, mask, dropout_key, origin, sinks = self.operands
        words = _NOTHING if _PLAIN.get(self.options.dtype) is self.options else self.options.needs
        if "spread" in words and not self.options.spread.asked:
            words = words - {"spread"}
        if not (bias is mask is dropout_key is origin is sinks is None):
            words = words.union([name for name, x in self.operands._asdict().items() if x is not None]) - _ALWAYS
        if isinstance(bias, Bias):
            words = (words - {"bias"}) | {"bias by rule"}
        return words if query.shape[-2] == key.shape[-2] else words | {"grouped heads"}

    @property
    def scale(self) -> float:
        """What logits are multiplied by."""
        return self.operands.query.shape[-1] ** -0.5 if self.options.scale is None else self.options.scale

    @property
    def sinks(self) -> Array | None:
        """The sinks as a column of the logits, ``[..., num_heads or 1, q_length or 1, 1]``."""
        sinks = self.operands.sinks
        return None if sinks is None else sinks[:, None, None] if sinks.ndim == 1 else sinks[..., None]

    @property
    def lengths(self) -> tuple[int, int]:
        """Of queries and keys."""
        return self.operands.query.shape[-3], self.operands.key.shape[-3]

    @property
    def first(self) -> tuple[Any, Any] | None:
        """The position of the first query and key, where these are some of a whole; None where they are all."""
        origin, whole = self.operands.origin, self.options.whole
        if origin is None or (whole is not None and tuple(whole[-2:]) == self.lengths):
            return None
        return origin[-2], origin[-1]

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes."""
        return tuple(self.operands.query.shape[:-3])

    @property
    def has_unknown_sizes(self) -> bool:
        """Whether some sizes are known at run time only."""
        query, key, value, *_ = self.operands
        sizes = (*query.shape, *key.shape, *(key if value is None else value).shape)
        return None in sizes or (total := sum(sizes)) != total  # ndonnx says None, Dask NaN

    @property
    def structure(self) -> Structure:
        """The mask as kernels know it, parsed once."""
        if self._structure is None:
            self._structure = structure(self.operands.mask)
        return self._structure

    def lowering(self, head_axes: int = 1) -> Lowering:
        """What a mask or bias by rule is lowered to for this call."""
        (query, key, *_), origin = self.operands, self.operands.origin
        arrays, heads = self.backend.arrays, query.shape[-2]
        whole = self.options.whole
        of_whole = None if whole is None or len(whole) < 3 else whole[-3]
        return Lowering(arrays, self.batch, self.lengths, query, origin, key, heads, head_axes, of_whole)

    def added(self) -> Array:
        """The bias as an array or a scalar, broadcastable to ``[batch..., heads, q_length, kv_length]``."""
        bias, arrays = self.operands.bias, self.backend.arrays
        if not isinstance(bias, Bias):
            return bias
        if any(map(unknown, self.lengths)):
            raise ValueError(f"the bias by rule {bias} needs known lengths: pass an array, as to_array makes it")
        to = self.lowering()
        terms, dtype = bias.terms(to), bias.dtype(arrays, self.options.dtype)
        wide = dtypes.promote(dtype, "float32")
        return arrays.cast(sum_of_terms(self.backend, terms, to.operands, to.parameters, wide), dtype)

    def visible(self, mask: Any) -> Array:
        """Where a mask lets a query see a key, bool, broadcastable to ``[batch..., heads, q_length, kv_length]``."""
        if not isinstance(mask, Mask):
            return self.backend.arrays.truth(mask)
        to = self.lowering()
        return visible(self.backend.arrays, mask.lower(to), to.operands)

    def of_copies(self) -> "Call":
        """The same call of arrays that nobody else can change; of 16 bits tiles make copies anyway."""
        own, (query, key, value, bias, mask, *_) = self.backend.arrays.own, self.operands
        if "16" not in self.options.dtype:
            query, key, value = own(query), own(key), own(value)
        bias, mask = (
            x.with_arrays(own) if isinstance(x, ByRule) else own(x) if hasattr(x, "shape") else x for x in (bias, mask)
        )
        sinks = None if self.operands.sinks is None else own(self.operands.sinks)
        operands = self.operands._replace(query=query, key=key, value=value, bias=bias, mask=mask, sinks=sinks)
        return replace(self, operands=operands, _structure=None)

    def operands_fit(self) -> bool:
        """Whether bias and mask have no axes, and no sizes, but those of query and key."""
        shape = (*self.batch, self.operands.query.shape[-2], *self.lengths)
        for part in (self.operands.bias, *self.structure.rest):
            if hasattr(part, "shape") and not isinstance(part, Mask):
                sizes = zip(reversed(part.shape), reversed(shape), strict=False)
                if len(part.shape) > len(shape) or any(size not in (1, whole) for size, whole in sizes):
                    return False
        return True


def make_call(
    backend: Backend, operands: Operands, dtype: Any, asked: dict[str, Any], axis: Axis | None = None
) -> Call:
    """The call for operands of one library, with query, key and value promoted to one dtype.

    `asked` are the options that are not at their defaults, and "is_causal". Of parts along an `axis` of devices, bias
    and dense mask have the rows of these queries and the columns of all keys.

    Raises:
        ShapeError, TypeError, ValueError: as `dot_product_attention` says.
    """
    query, key, value, bias, mask, dropout_key, origin, sinks = operands
    whole_products = _check_einsums(asked) if asked else False
    try:
        if value is None:
            (query, key), name = backend.arrays.promote([query, key], dtype)
        else:
            (query, key, value), name = backend.arrays.promote([query, key, value], dtype)
    except TypeError as error:
        raise error if dtype is None else dtypes.refused(dtype, error) from None
    if backend.arrays.checks_devices:
        _check_devices(operands)
    _check_shapes(query, key, value, grouped=not whole_products)
    if bias is not None or mask is not None:
        if axis is not None and axis.size > 1:
            _check_rows(query, key, bias, mask, axis)
        else:
            _check_broadcast(query, key, bias, mask)
        if bias is not None and not getattr(bias, "shape", True) and name not in dtypes.NARROW:
            bias = _in_32_bits(backend, bias)
    if asked.pop("is_causal", False):
        mask = CausalMask() if mask is None else CausalMask() & as_mask(mask)
    if sinks is not None:
        _check_sinks(backend, sinks, query)
    operands = Operands(query, key, value, bias, mask, dropout_key, origin, sinks)
    if asked:
        return Call(backend=backend, operands=operands, options=Options(dtype=name, **asked))
    return Call(backend=backend, operands=operands, options=_PLAIN.get(name) or Options(dtype=name))


def _in_32_bits(backend: Backend, bias: Array) -> Array:
    """A bias that is a scalar of 64 bits, as results of NumPy are, in JAX's 32, lest it widen all logits."""
    name = backend.arrays.dtype_name(bias)
    wide = name in dtypes.NARROW and not backend.arrays.narrow
    return backend.arrays.cast(bias, dtypes.NARROW[name]) if wide else bias


def dropout_of(rate: Any, broadcast: Any, key: Any) -> Dropout:
    """Dropout that is switched on; checked only there, since Flax's modules always pass a rate."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}; deterministic=True switches dropout off")
    if key is None:
        raise ValueError("dropout needs a key: pass dropout_rng=anyattention.random.key(seed), or deterministic=True")
    return Dropout(type(rate)(1.0 - rate), bool(broadcast))  # bfloat16 alone would become float64


def _check_sinks(backend: Backend, sinks: Array, query: Array) -> None:
    if (name := backend.arrays.dtype_name(sinks)) == "bool" or name.startswith("complex"):
        raise TypeError(f"sinks must be real numbers, got {name}")
    *batch, q_length, heads, _ = query.shape
    whole, shape = (*batch, heads, q_length), (*sinks.shape, 1) if sinks.ndim == 1 else tuple(sinks.shape)
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    if not 2 <= len(shape) <= len(whole) or any(
        size not in (1, to) and not (unknown(size) or unknown(to)) for size, to in pairs
    ):
        raise ShapeError(
            f"sinks have shape {tuple(sinks.shape)}, but need [num_heads], ({heads},), or two axes or more that can be "
            f"broadcast to [batch..., num_heads, q_length], {whole}"
        )


def number(name: str, x: Any, positive: bool = False) -> float:
    """A number that is an option of a call, as a Python float.

    Raises:
        TypeError, ValueError: what is no number known here, or no finite one, or not positive where it has to be.
    """
    try:
        if isinstance(x, bool | str | bytes):
            raise TypeError
        found = float(x)
    except Exception as error:  # each library has its own for arrays, and for numbers that are not known yet
        raise TypeError(f"{name} must be a number, known when the call is made, got {x!r}") from error
    if not -math.inf < found < math.inf or (positive and found <= 0.0):  # torch.compile cannot trace `isfinite`
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite, got {x!r}")
    return found


def _check_einsums(asked: dict[str, Any]) -> bool:
    """Whether the caller's functions take whole products, of which grouped heads are no part."""
    one, both = asked.get("qk_attn_weights_einsum"), asked.get("weights_only") or asked.get("attn_weights_value_einsum")
    if bool(one) != bool(both) and not asked.get("weights_only"):
        raise ValueError("qk_attn_weights_einsum and attn_weights_value_einsum must be specified together")
    if one and ("precision" in asked or "einsum_dot_general" in asked):
        raise ValueError("precision/einsum_dot_general and einsum overrides are mutually exclusive: pass one of them")
    return bool(one or ("einsum_dot_general" in asked and "weights_only" not in asked))


def _check_shapes(query: Array, key: Array, value: Array | None, grouped: bool) -> None:
    """Raise ShapeError with Flax's sentence, in Flax's order; heads may be grouped, as in flax.nnx."""
    q, k, v = query.shape, key.shape, (key if value is None else value).shape
    if len(q) > 2 and q == k and k == v:
        return
    arrays = (query, key) if value is None else (query, key, value)

    def fail(sentence: str) -> ShapeError:
        names = "q, k" if value is None else "q, k, v"
        shapes = ", ".join(str(tuple(x.shape)) for x in arrays)
        return ShapeError(f"{sentence.format(names)} Got shapes {shapes}; axes are {_AXES}.")

    if not len(q) == len(k) == len(v):
        raise fail("{} must have same rank.")
    if len(q) < 3:
        raise fail("{} need at least three axes.")
    if not (_same(q[:-3], k[:-3]) and _same(k[:-3], v[:-3])):
        raise fail("{} batch dims must match.")
    groups = _same(q[-2:-1], k[-2:-1]) or (grouped and k[-2] and q[-2] % k[-2] == 0)
    if not (_same(k[-2:-1], v[-2:-1]) and groups):
        raise fail("{} num_heads must match.")
    if not _same(k[-3:-2], v[-3:-2]):
        raise fail("k, v lengths must match.")
    if not _same(q[-1:], k[-1:]):
        raise fail("q, k depths must match.")


def _check_devices(operands: Operands) -> None:
    """Raise ValueError where tensors are on several devices, of which PyTorch names no argument, or says nothing."""
    query, key, value, bias, mask, *_, sinks = operands
    if query.device == key.device and bias is mask is sinks is None and (value is None or query.device == value.device):
        return
    guests = [(name, x.arrays() if isinstance(x, ByRule) else [x]) for name, x in (("bias", bias), ("mask", mask))]
    guests = [(name, x) for name, arrays in guests for x in arrays]
    for name, x in (("key", key), ("value", value), ("sinks", sinks), *guests):
        if hasattr(x, "device") and x.device != query.device:
            raise ValueError(f"query is on {query.device}, {name} on {x.device}: move them to one device first")


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a == b or all(x == y or unknown(x) or unknown(y) for x, y in zip(a, b, strict=True))


def _meant(query: Array, key: Array, name: str, shape: tuple[Any, ...]) -> str:
    """What to do about a bias or mask of a shape that does not fit, where its shape tells what was meant."""
    *batch, queries, heads, _ = query.shape
    keys, kv_heads = key.shape[-3:-1]
    if shape == (*batch, keys):
        return f": if it has a number for each key, pass {name}[..., None, None, :]"
    if shape == (*batch, queries, keys):
        return f": if it is the same for all heads, pass {name}[..., None, :, :]"
    if len(shape) > 1 and shape[-2] in (1, heads) and shape[-1] == kv_heads:
        return f": query, key and value must be {_AXES}, so swap these axes if heads come before the length"
    return ""


def _check_rows(query: Array, key: Array, bias: Any, mask: Any, axis: Axis) -> None:
    """Raise ShapeError unless bias and mask, of a sequence over several devices, have its rows, and all its columns."""
    rows, mine = query.shape[-3], key.shape[-3]
    columns = mine * axis.size if axis.local else mine
    parts = [*(bias.dense() if isinstance(bias, Bias) else [bias]), mask]
    for name, x in zip([*["bias"] * (len(parts) - 1), "mask"], parts, strict=True):
        if isinstance(x, Mask) or not getattr(x, "shape", ()):
            continue
        whole = (*query.shape[:-3], query.shape[-2], rows, columns)
        sizes = (1,) * (len(whole) - x.ndim) + tuple(x.shape)
        if sizes[-1] not in (1, columns):
            of = f" ({axis.size} parts of {mine})" if axis.local else ""
            raise ShapeError(f"{name} has {sizes[-1]} columns, but kv_length of the whole is {columns}{of}")
        if len(sizes) > 1 and sizes[-2] not in (1, rows):
            have = f"this device has {rows} queries" if axis.local else f"there are {rows} queries"
            raise ShapeError(f"{name} has {sizes[-2]} rows, but {have}")
        if len(sizes) > len(whole) or any(size not in (1, n) for size, n in zip(sizes, whole, strict=True)):
            raise ShapeError(f"{name} {tuple(x.shape)} must be broadcastable to {whole}, [batch..., num_heads, *, *]")


def _check_broadcast(query: Array, key: Array, bias: Any, mask: Any) -> None:
    """Raise ShapeError unless bias and mask broadcast; each may have more axes, or grow a single one, as in Flax."""
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    parts = [("bias", x) for x in (bias.dense() if isinstance(bias, Bias) else [bias])]
    for name, x in (*parts, ("mask", mask)):
        if isinstance(x, Mask) or not hasattr(x, "shape"):
            continue
        rank = max(len(shape), x.ndim)
        left, right = ((1,) * (rank - len(sizes)) + tuple(sizes) for sizes in (shape, x.shape))
        if not all(a == b or a == 1 or b == 1 or unknown(a) or unknown(b) for a, b in zip(left, right, strict=True)):
            raise ShapeError(
                f"Incompatible shapes for broadcasting: {name} {tuple(x.shape)} with attention weights {shape}, "
                f"[batch..., num_heads, q_length, kv_length]{_meant(query, key, name, tuple(x.shape))}"
            )
        shape = tuple(b if a == 1 else a for a, b in zip(left, right, strict=True))
