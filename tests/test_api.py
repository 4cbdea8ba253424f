"""Guests, libraries in one call, and errors, through the public function."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import anyattention as aa
from anyattention._src.registry import backend_of
from anyattention_conformance import within_c2

X = np.random.default_rng(0).standard_normal((2, 5, 4, 8), dtype=np.float32)


def test_parameters_are_those_of_flax():
    import inspect

    for name in ("dot_product_attention", "dot_product_attention_weights"):
        ours = inspect.signature(getattr(aa, name)).parameters
        flax = inspect.signature(getattr(linen, name)).parameters
        assert list(ours)[: len(flax)] == list(flax)
        assert [p.default for p in flax.values()] == [p.default for p in ours.values()][: len(flax)]


def test_signatures_are_equal():
    """They are spelled out, for modules that read them; what functions share they spell alike."""
    import inspect

    whole = inspect.signature(aa.dot_product_attention).parameters
    assert inspect.signature(aa.explain).parameters == whole
    for name, lacks, renamed in (
        ("dot_product_attention_weights", {"value", "attn_weights_value_einsum"}, {"qk_attn_weights_einsum": "einsum"}),
        ("dot_product_attention_vjp", {"module", "einsum_dot_general", "qk_attn_weights_einsum"}, {}),
    ):
        part = inspect.signature(getattr(aa, name)).parameters
        lacks = lacks | {"sequence_axis"}  # all weights are on one device, and pullbacks are of one
        lacks = lacks if "vjp" not in name else lacks | {"attn_weights_value_einsum", "implementation"}
        assert list(part) == [renamed.get(x, x) for x in whole if x not in lacks]
        for x in part.values():
            original = whole[next((old for old, new in renamed.items() if new == x.name), x.name)]
            assert (x.kind, x.default, x.annotation) == (original.kind, original.default, original.annotation), x.name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"key": X[0]}, "q, k, v must have same rank."),
        ({"value": X[0]}, "q, k, v must have same rank."),
        ({"query": X[0], "key": X[:1], "value": X[:, :3]}, "q, k, v must have same rank."),
        ({"key": X[:1]}, "q, k, v batch dims must match."),
        ({"value": X[:1], "key": X[:, :, :3]}, "q, k, v batch dims must match."),
        ({"key": X[:, :, :3], "value": X[:, :, :3]}, "q, k, v num_heads must match."),
        ({"value": X[:, :3, :2]}, "q, k, v num_heads must match."),
        ({"value": X[:, :3], "key": X[..., :2]}, "k, v lengths must match."),
        ({"key": X[..., :1]}, "q, k depths must match."),
        ({"key": X[..., :7]}, "q, k depths must match."),
        ({"bias": X[0, 0]}, "Incompatible shapes for broadcasting"),
        ({"mask": X[0, 0]}, "Incompatible shapes for broadcasting"),
        ({"bias": X[0, :3, 0, :5], "mask": X[0, :, 0, :5]}, "Incompatible shapes for broadcasting"),
        *((dict.fromkeys(("query", "key", "value"), x), "three axes") for x in (X[0, 0], X[0, 0, 0], X[0, 0, 0, 0])),
        ({"query": 1.0, "key": 2.0, "value": 3}, "three axes"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_shapes(library, change, sentence):
    """Flax's sentences, in Flax's order; and whatever Flax raises, code that catches it catches ours."""
    arguments = {"query": X, "key": X, "value": X} | change
    with pytest.raises((AssertionError, ValueError, IndexError)) as flax:
        linen.dot_product_attention(**arguments)
    if flax.type is AssertionError:
        assert str(flax.value) == sentence
    with pytest.raises(aa.ShapeError, match=sentence) as caught:
        aa.dot_product_attention(**library.put_all(arguments))
    assert isinstance(caught.value, flax.type)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"key": X[0]}, "q, k must have same rank."),
        ({"key": X[:1]}, "q, k batch dims must match."),
        ({"key": X[:, :, :3]}, "q, k num_heads must match."),
        ({"key": X[..., :1]}, "q, k depths must match."),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_shapes_of_weights(library, change, sentence):
    arguments = {"query": X, "key": X} | change
    with pytest.raises(AssertionError) as flax:
        linen.dot_product_attention_weights(**arguments)
    assert str(flax.value) == sentence
    with pytest.raises(aa.ShapeError, match=sentence):
        aa.dot_product_attention_weights(**library.put_all(arguments))


BAD = {  # where Flax raises too, what we raise is also of the class that Flax raises
    "rate too high": ({"dropout_rate": 1.0, "dropout_rng": aa.random.key(0)}, ValueError, r"\[0, 1\)"),
    "rate negative": ({"dropout_rate": -0.1, "dropout_rng": aa.random.key(0)}, ValueError, r"\[0, 1\)"),
    "rate NaN": ({"dropout_rate": np.nan, "dropout_rng": aa.random.key(0)}, ValueError, r"\[0, 1\)"),
    "rates": ({"dropout_rate": np.asarray([0.1, 0.2]), "dropout_rng": aa.random.key(0)}, ValueError, "ambiguous"),
    "deterministics": ({"dropout_rate": 0.1, "deterministic": np.asarray([True, False])}, ValueError, "ambiguous"),
    "no key": ({"dropout_rate": 0.1}, ValueError, "needs a key"),
    "integer key": ({"dropout_rate": 0.1, "dropout_rng": 0}, TypeError, "must be a key"),
    "list as key": ({"dropout_rate": 0.1, "dropout_rng": [0, 1]}, TypeError, "must be a key"),
    "NumPy generator": ({"dropout_rate": 0.1, "dropout_rng": np.random.default_rng(0)}, TypeError, "must be a key"),
    "PyTorch generator": ({"dropout_rate": 0.1, "dropout_rng": torch.Generator()}, TypeError, "must be a key"),
    "int32 key": ({"dropout_rate": 0.1, "dropout_rng": np.zeros(2, np.int32)}, TypeError, "uint32"),
    "long key": ({"dropout_rate": 0.1, "dropout_rng": np.zeros(4, np.uint32)}, TypeError, "shape"),
    "keys": ({"dropout_rate": 0.1, "dropout_rng": jax.random.split(jax.random.key(0))}, ValueError, "key"),
    "implementation": ({"implementation": "fast"}, ValueError, "pass None or one of exact"),
    "dtype": ({"dtype": int}, ValueError, "inexact"),
    "precision": ({"precision": "nonsense"}, ValueError, "(?i)precision"),
    "list as mask": ({"mask": [True] * 5}, TypeError, "mask must be an array"),
    "list as bias": ({"bias": [0.0] * 5}, TypeError, "bias must be an array"),
    "text as mask": ({"mask": "mask"}, TypeError, "str is not an array"),
    "object as bias": ({"bias": object()}, TypeError, "object is not an array"),
    "class as mask": (
        {"mask": aa.masks.CausalMask},
        TypeError,
        r"mask is the class CausalMask itself.*CausalMask\(\.\.\.\)",
    ),
    "class as bias": ({"bias": np.ndarray}, TypeError, "bias is the class ndarray itself"),
    "class as key": ({"dropout_rate": 0.1, "dropout_rng": np.ndarray}, TypeError, "dropout_rng is the class ndarray"),
    "class as query": ({"query": aa.masks.LocalMask}, TypeError, "query is the class LocalMask itself"),
    "mask as bias": (
        {"bias": aa.masks.CausalMask()},
        TypeError,
        r"bias must be an array, got .*CausalMask\(0\): pass it as mask",
    ),
    "text as query": ({"query": "query"}, TypeError, "query: builtins.str is not an array"),
    "shape as bias": ({"bias": jax.ShapeDtypeStruct((5, 5), "float32")}, TypeError, "bias: .*no values.*|bias is.*"),
    "query missing": ({"query": None}, TypeError, "query must be an array"),
    "one einsum": ({"qk_attn_weights_einsum": np.einsum}, ValueError, "together"),
    "the other einsum": ({"attn_weights_value_einsum": np.einsum}, ValueError, "together"),
    "einsums and precision": (
        {"qk_attn_weights_einsum": np.einsum, "attn_weights_value_einsum": np.einsum, "precision": "high"},
        ValueError,
        "mutually exclusive",
    ),
}
DECLARED = {"no key", "query missing"}  # rows of the table in docs/differs.md


@pytest.mark.parametrize(
    ("shape", "meant"),
    [
        ((2, 5), r"mask\[\.\.\., None, None, :\]"),
        ((2, 3, 5), r"mask\[\.\.\., None, :, :\]"),
        ((4, 4), r"\[batch\.\.\., length, num_heads, depth\], so swap"),
        ((2, 1, 1, 4), r"\[batch\.\.\., length, num_heads, depth\], so swap"),
        ((3, 3), r"\(2, 4, 3, 5\), \[batch\.\.\., num_heads, q_length, kv_length\]$"),
    ],
    ids=str,
)
def test_a_shape_that_tells_what_was_meant(library, shape, meant):
    """Padding without axes of heads and queries, a mask without an axis of heads, heads before the length."""
    query, key, mask = library.put(X[:, :3]), library.put(X), np.ones(shape)
    with pytest.raises(aa.ShapeError, match=meant):
        aa.dot_product_attention(query, key, key, mask=mask)
    if "None" in meant:  # what the message says works
        axes = (1, 1, 5) if len(shape) == 2 else (1, 3, 5)
        aa.dot_product_attention(query, key, key, mask=mask.reshape(2, *axes))


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(library, name):
    options, error, message = BAD[name]
    arrays = {"query": X, "key": X, "value": X}
    with pytest.raises(error, match=message):
        aa.dot_product_attention(**library.put_all(arrays) | options)
    if not name.startswith("rate ") and name != "implementation":
        with pytest.raises((ValueError, TypeError, AttributeError)) as flax:
            linen.dot_product_attention(**arrays | options)
        assert name in DECLARED or issubclass(error, flax.type)


def test_bad_arguments_of_weights(library):
    for options in ({"precision": "high"}, {"einsum_dot_general": jax.lax.dot_general}):
        for function, x in (
            (linen.dot_product_attention_weights, X),
            (aa.dot_product_attention_weights, library.put(X)),
        ):
            with pytest.raises(ValueError, match="mutually exclusive"):
                function(x, x, einsum=np.einsum, **options)


def test_inactive_dropout_is_not_checked(library):
    x = library.put(X)
    aa.dot_product_attention(x, x, x, dropout_rate=7.0, dropout_rng="no key", deterministic=True)


def test_guests_follow_the_call(library):
    x, mask = library.put(X), np.tri(5)
    expected = aa.dot_product_attention(X, X, X, X.sum(axis=(1, 3))[:, :, None, None], mask)
    actual = aa.dot_product_attention(x, x, x, X.sum(axis=(1, 3))[:, :, None, None], mask)
    assert isinstance(actual, library.array_type)
    arguments = {"query": X, "key": X, "value": X, "bias": X.sum(axis=(1, 3))[:, :, None, None], "mask": mask}
    assert not within_c2(library.get(actual), expected, arguments, "float32")


def test_numpy_arrays_beside_jax_go_to_jax():
    for arguments in ((X, jnp.asarray(X), X), (X, X, X, None, jnp.ones((5, 5)))):
        assert isinstance(aa.dot_product_attention(*arguments), jax.Array)


def test_two_frameworks_are_an_error():
    with pytest.raises(TypeError, match=r"query is jaxlib.*key is torch.Tensor"):
        aa.dot_product_attention(jnp.asarray(X), torch.tensor(X), torch.tensor(X))
    with pytest.raises(TypeError, match="different libraries"):
        aa.dot_product_attention(X, torch.tensor(X), torch.tensor(X))


def test_causal_is_the_lower_triangle(library):
    x = library.put(X)
    actual = aa.dot_product_attention(x, x, x, is_causal=True)
    masked = aa.dot_product_attention(x, x, x, mask=np.tri(5))
    np.testing.assert_array_equal(library.get(actual), library.get(masked))


def test_explain_returns_the_plan():
    assert aa.explain(X, X, X).implementation == "exact"
    assert "numpy" in str(aa.explain(X, X, X))


@pytest.mark.parametrize(
    ("shape", "kv_length", "expected"),
    [  # the smallest calls of each rule, and others that just miss them
        ((256, 1, 2), 256, {"numpy": "tiled", "jax": "exact", "torch": "fused"}),
        ((256, 1, 2), 255, {"numpy": "exact", "jax": "exact", "torch": "fused"}),
        ((8, 1, 2), 8, {"numpy": "exact", "jax": "exact", "torch": "fused"}),
        ((8, 8, 8, 2), 7, {"numpy": "exact", "jax": "exact", "torch": "exact"}),
        ((64, 1, 2), 1024, {"numpy": "tiled", "jax": "exact", "torch": "fused"}),
        ((63, 1, 2), 2048, {"numpy": "exact", "jax": "exact", "torch": "fused"}),
        ((2, 512, 8, 2), 512, {"numpy": "tiled", "jax": "tiled", "torch": "fused"}),
        ((2, 512, 8, 2), 511, {"numpy": "tiled", "jax": "exact", "torch": "fused"}),
        ((1, 512, 1, 2), 512, {"numpy": "tiled", "jax": "tiled", "torch": "fused"}),
        ((16, 1, 8, 2), 4096, {"numpy": "exact", "jax": "exact", "torch": "fused"}),
    ],
)
def test_none_chooses_by_shape_and_library(library, shape, kv_length, expected):
    query = library.put(np.zeros(shape, np.float32))
    key = library.put(np.zeros((*shape[:-3], kv_length, *shape[-2:]), np.float32))
    assert aa.explain(query, key, key).implementation == expected[library.name]
    assert aa.explain(query, key, key, module=SimpleNamespace(sow=print)).implementation == "exact"
    with pytest.raises(NotImplementedError, match="module"):
        aa.dot_product_attention(query, key, key, module=SimpleNamespace(sow=print), implementation="tiled")


def changed(x):
    """Write something else into an array of NumPy or PyTorch."""
    x[...] = x == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("put", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("by_rule", [False, True])
def test_a_pullback_keeps_what_it_needs(put, dtype, by_rule):
    """Between the call and its pullback the output and every argument may change in place, as in ``y += x``."""
    drawn = {name: X.astype(dtype) for name in ("query", "key", "value")} | {"bias": X[0, :, :, :5].transpose(1, 0, 2)}
    lengths, ids, dense = np.array([3, 4]), np.array([[0, 0, 1, 1, 1]] * 2), np.tri(5) > 0
    seen = []
    for write in (False, True):
        given = {name: put(x) for name, x in drawn.items()}
        parts = [put(x) for x in (lengths, ids, dense)]
        mask = aa.masks.LengthMask(parts[0]) & aa.masks.SegmentMask(parts[1], parts[1]) & parts[2]
        output, pullback = aa.dot_product_attention_vjp(**given, mask=mask if by_rule else parts[2])
        if write:
            for x in (output, *given.values(), *parts):
                changed(x)
        seen.append([np.asarray(x) for x in pullback(put(X.astype(dtype)))])
    for actual, expected in zip(*seen, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_what_a_pullback_keeps_is_no_larger_than_it_was():
    """A mask or bias that repeats itself stays so."""
    for x in (np.broadcast_to(np.tri(5), (2, 4, 5, 5)), torch.eye(5).expand(2, 4, 5, 5)):
        copy = backend_of(x).arrays.own(x)
        np.testing.assert_array_equal(copy, x)
        strides = copy.strides if isinstance(copy, np.ndarray) else copy.stride()
        assert strides[:2] == (0, 0)


def test_guests_of_jax_may_change_after_the_call():
    """JAX may read the memory of an array of NumPy's later, and only sometimes does."""
    x, key = jnp.asarray(np.tile(X, (1, 60, 1, 8))), np.tile(X, (1, 60, 1, 8))
    expected = np.asarray(aa.dot_product_attention(x, key.copy(), x))
    for _ in range(5):
        guest = key.copy()
        output = aa.dot_product_attention(x, guest, x)
        guest[...] = 0
        np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize(
    ("dtype", "meant"),
    [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("f64", "float64"), (3, "float32")],
)
def test_names_of_dtypes_elsewhere(library, dtype, meant):
    for attend in (aa.dot_product_attention, aa.explain):
        with pytest.raises(TypeError, match=f"dtype={dtype!r} is no dtype .* such as '{meant}'"):
            attend(*[library.put(X)] * 3, dtype=dtype)


@pytest.mark.parametrize("dtype", ["half", "single", "f4", np.float16, jnp.float16, jnp.dtype("float32")], ids=str)
def test_names_of_dtypes_that_numpy_knows(library, dtype):
    output = aa.dot_product_attention(*[library.put(X)] * 3, dtype=dtype)
    assert library.get(output).dtype == np.dtype(dtype)


class Begun:
    """An array with a namespace that is only begun."""

    shape, ndim, dtype = X.shape, 4, "float32"

    def __array_namespace__(self, api_version=None):
        return SimpleNamespace(__name__="begun", asarray=np.asarray)


def test_a_namespace_that_is_only_begun():
    with pytest.raises(
        TypeError, match=r"key: .*Begun has __array_namespace__, but .* lacks namespace.arange.* __add__"
    ):
        aa.dot_product_attention(X, Begun(), X)
    with pytest.raises(TypeError, match=r"query: .*Begun has __array_namespace__"):
        aa.dot_product_attention(Begun(), Begun(), Begun())


def test_tensors_on_several_devices():
    """Between a CPU and meta PyTorch says nothing, and returns a tensor without values."""
    here, there = torch.tensor(X), torch.tensor(X, device="meta")
    for name in ("key", "value", "bias", "mask"):
        given = {
            "query": here,
            "key": here,
            "value": here,
            name: there if name in ("key", "value") else there[0, 0, 0, :5],
        }
        if name in ("bias", "mask"):
            given[name] = torch.ones(5, 5, device="meta")
        with pytest.raises(ValueError, match=f"query is on cpu, {name} on meta: move them to one device first"):
            aa.dot_product_attention(**given)
    lengths = torch.ones(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="mask on meta"):
        aa.dot_product_attention(here, here, here, mask=aa.masks.LengthMask(lengths) & torch.ones(5, 5))


@pytest.mark.needs("jax", "torch")
def test_what_is_no_gradient_of_the_output(library):
    output, pullback = aa.dot_product_attention_vjp(*[library.put(X)] * 3)
    for doutput in (output[:1], 1.0, library.put(X[..., :1])):
        with pytest.raises(aa.ShapeError, match=r"doutput must have the shape of the output, \(2, 5, 4, 8\)"):
            pullback(doutput)
    with pytest.raises(TypeError, match="doutput must be an array, got None"):
        pullback(None)
    other = torch.tensor(X) if library.name != "torch" else jnp.asarray(X)
    with pytest.raises(TypeError, match=f"doutput is an array of {'jax' if library.name == 'torch' else 'torch'}"):
        pullback(other)
    for actual, expected in zip(pullback(X)[:3], pullback(library.put(X))[:3], strict=True):
        np.testing.assert_array_equal(library.get(actual), library.get(expected))


def test_explain_tells_of_an_additive_mask(library):
    """Flax takes it as truth, which shows just the keys that it should hide; so do we."""
    x, low = library.put(X), np.where(np.tri(5) > 0, 0, -np.inf).astype(np.float32)
    tells = "the mask has negative or infinite numbers"
    for mask in (low, np.maximum(low, -1e9), low * -1):
        for given in (library.put(mask), mask, aa.masks.CausalMask() & library.put(mask)):
            assert tells in aa.explain(x, x, x, mask=given).reasons[-1]
            assert tells in aa.explain(x, x, x, mask=given, implementation="exact").reasons[-1]
    for mask in (np.tri(5), np.tri(5) > 0, aa.masks.CausalMask(), None, np.ones((5, 5), np.int32)):
        assert tells not in str(aa.explain(x, x, x, mask=library.put(mask) if isinstance(mask, np.ndarray) else mask))
    expected = linen.dot_product_attention(X, X, X, mask=low)
    np.testing.assert_allclose(
        library.get(aa.dot_product_attention(x, x, x, mask=library.put(low))), expected, atol=1e-6
    )


def test_explain_tells_of_a_boolean_bias(library):
    """The fourth argument is the bias, as in Flax; a mask in its place adds 0 and 1 to the logits."""
    x, tells = library.put(X), "the bias is boolean"
    assert tells in aa.explain(x, x, x, library.put(np.tri(5) > 0)).reasons[-1]
    for bias in (library.put(np.tri(5)), 1.0, True, None):
        assert tells not in str(aa.explain(x, x, x, bias, np.tri(5) > 0))


def test_explain_takes_shapes_beside_arrays():
    shape, bias = jax.ShapeDtypeStruct(X.shape, "float32"), jax.ShapeDtypeStruct((5, 5), "float32")
    lengths = aa.masks.LengthMask(jax.ShapeDtypeStruct((2,), "int32"))
    for arrays in ((shape, shape, shape), (X, X, X), (jnp.asarray(X), shape, X)):
        assert aa.explain(*arrays, bias=bias, mask=lengths).implementation == "exact"


@pytest.mark.parametrize("bias", [0.5, np.float64(0.5), np.array(0.5), np.float32(0.5), 2, np.int64(2)], ids=repr)
def test_a_scalar_bias_widens_nothing(library, bias, monkeypatch):
    """Flax has scalars in 32 bits: logits in 64 would take many times as long, and no engine serves them."""
    x, seen = library.put(X), []
    backend = backend_of(x)
    steps, tiles = type(backend.steps), type(backend.tiles)
    softmax, sizes = steps.softmax, tiles.sizes
    monkeypatch.setattr(steps, "softmax", lambda self, x: [seen.append(x), softmax(self, x)][1])
    monkeypatch.setattr(tiles, "sizes", lambda self, block, r: [seen.append(block.rows[0]), sizes(self, block, r)][1])
    expected = linen.dot_product_attention(X, X, X, bias)
    for implementation in ("exact", "tiled"):
        actual = aa.dot_product_attention(x, x, x, bias, implementation=implementation)
        np.testing.assert_allclose(library.get(actual), expected, atol=1e-6)
    assert [backend.arrays.dtype_name(x) for x in seen] == ["float32"] * 2
    wide = library.put(X.astype(np.float64))
    if library.name != "jax":
        aa.dot_product_attention(wide, wide, wide, bias, implementation="exact")
        assert backend.arrays.dtype_name(seen[-1]) == "float64"
