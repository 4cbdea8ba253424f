"""Guests, libraries in one call, and errors, through the public function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import anyattention as aa

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
        ({"key": X[:1]}, "q, k, v batch dims must match."),
        ({"key": X[:, :, :3], "value": X[:, :, :3]}, "q, k, v num_heads must match."),
        ({"value": X[:, :3]}, "k, v lengths must match."),
        ({"key": X[..., :1]}, "q, k depths must match."),
        ({"bias": X[0, 0]}, "Incompatible shapes for broadcasting"),
        ({"mask": X[0, 0]}, "Incompatible shapes for broadcasting"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_shapes(library, change, sentence):
    arguments = library.put_all({"query": X, "key": X, "value": X} | change)
    with pytest.raises(aa.ShapeError, match=sentence) as caught:
        aa.dot_product_attention(**arguments)
    with pytest.raises((AssertionError, ValueError)) as flax:
        linen.dot_product_attention(**{name: jnp.asarray(library.get(x)) for name, x in arguments.items()})
    assert isinstance(caught.value, flax.type)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_rate": 1.0, "dropout_rng": aa.random.key(0)}, ValueError, r"\[0, 1\)"),
        ({"dropout_rate": -0.1, "dropout_rng": aa.random.key(0)}, ValueError, r"\[0, 1\)"),
        ({"dropout_rate": float("nan"), "dropout_rng": aa.random.key(0)}, ValueError, r"\[0, 1\)"),
        ({"dropout_rate": 0.1}, ValueError, "needs a key"),
        ({"dropout_rate": 0.1, "dropout_rng": 0}, TypeError, "must be a key"),
        ({"implementation": "fast"}, ValueError, "pass None or one of exact"),
        ({"dtype": int}, ValueError, "inexact"),
        ({"precision": "nonsense"}, ValueError, "(?i)precision"),
        ({"mask": [True]}, TypeError, "mask must be an array"),
        ({"query": None}, TypeError, "query must be an array"),
        ({"qk_attn_weights_einsum": np.einsum}, ValueError, "together"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments(library, options, error, message):
    arguments = library.put_all({"query": X, "key": X, "value": X} | options)
    with pytest.raises(error, match=message):
        aa.dot_product_attention(**arguments)


def test_inactive_dropout_is_not_checked(library):
    x = library.put(X)
    aa.dot_product_attention(x, x, x, dropout_rate=7.0, dropout_rng="no key", deterministic=True)


def test_guests_follow_the_call(library):
    x, mask = library.put(X), np.tri(5)
    expected = aa.dot_product_attention(X, X, X, X.sum(axis=(1, 3))[:, :, None, None], mask)
    actual = aa.dot_product_attention(x, x, x, X.sum(axis=(1, 3))[:, :, None, None], mask)
    assert isinstance(actual, library.array_type)
    np.testing.assert_allclose(library.get(actual), expected, atol=1e-6)


def test_numpy_arrays_beside_jax_go_to_jax():
    for arguments in ((X, jnp.asarray(X), X), (X, X, X, None, jnp.ones((5, 5)))):
        assert isinstance(aa.dot_product_attention(*arguments), jax.Array)


def test_two_frameworks_are_an_error():
    with pytest.raises(TypeError, match=r"query is jaxlib.*key is torch.Tensor"):
        aa.dot_product_attention(jnp.asarray(X), torch.tensor(X), torch.tensor(X))
    with pytest.raises(TypeError, match="different libraries"):
        aa.dot_product_attention(X, torch.tensor(X), torch.tensor(X))


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_key_gives_one_mask(library, seed):
    x = library.put(X)
    keys = [aa.random.key(seed), jax.random.key(seed), jax.random.PRNGKey(seed)]
    if library.name == "torch":
        keys.append(torch.tensor([0, seed]))
    expected = linen.dot_product_attention_weights(X, X, dropout_rng=keys[1], dropout_rate=0.4)
    for key in keys:
        actual = aa.dot_product_attention_weights(x, x, dropout_rng=key, dropout_rate=0.4)
        np.testing.assert_array_equal(library.get(actual) == 0, np.asarray(expected) == 0)


def test_keys_of_other_kinds(library):
    x, key = library.put(X), jax.random.key(0, impl="rbg")
    if library.name == "jax":
        aa.dot_product_attention(x, x, x, dropout_rng=key, dropout_rate=0.1)
    else:
        with pytest.raises(TypeError, match="rbg"):
            aa.dot_product_attention(x, x, x, dropout_rng=key, dropout_rate=0.1)


def test_causal_is_the_lower_triangle(library):
    x = library.put(X)
    actual = aa.dot_product_attention(x, x, x, is_causal=True)
    masked = aa.dot_product_attention(x, x, x, mask=np.tri(5))
    np.testing.assert_array_equal(library.get(actual), library.get(masked))


def test_explain_returns_the_plan():
    assert aa.explain(X, X, X).implementation == "exact"
    assert "numpy" in str(aa.explain(X, X, X))
