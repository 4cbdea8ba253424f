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
    "query missing": ({"query": None}, TypeError, "query must be an array"),
    "one einsum": ({"qk_attn_weights_einsum": np.einsum}, ValueError, "together"),
    "the other einsum": ({"attn_weights_value_einsum": np.einsum}, ValueError, "together"),
    "einsums and precision": (
        {"qk_attn_weights_einsum": np.einsum, "attn_weights_value_einsum": np.einsum, "precision": "high"},
        ValueError,
        "mutually exclusive",
    ),
}
DECLARED = {"no key", "query missing"}  # rows of the README's table of deviations


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
        ((256, 1, 2), 255, {"numpy": "exact", "jax": "exact", "torch": "exact"}),
        ((64, 1, 2), 1024, {"numpy": "tiled", "jax": "exact", "torch": "fused"}),
        ((63, 1, 2), 2048, {"numpy": "exact", "jax": "exact", "torch": "fused"}),
        ((2, 512, 8, 2), 512, {"numpy": "tiled", "jax": "tiled", "torch": "fused"}),
        ((2, 512, 8, 2), 511, {"numpy": "tiled", "jax": "exact", "torch": "fused"}),
        ((15, 512, 1, 2), 512, {"numpy": "tiled", "jax": "exact", "torch": "fused"}),
        ((16, 1, 8, 2), 512, {"numpy": "exact", "jax": "tiled", "torch": "fused"}),
        ((16, 1, 8, 2), 511, {"numpy": "exact", "jax": "exact", "torch": "exact"}),
        ((16, 2, 8, 2), 512, {"numpy": "exact", "jax": "exact", "torch": "fused"}),
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
