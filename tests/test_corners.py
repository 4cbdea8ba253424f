"""Odd corners, each against Flax live: dtypes that are promoted, values that poison, rows that see nothing."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import anyattention as aa

ONE = np.arange(3, dtype=np.float32).reshape(3, 1, 1)
VALUES = np.asarray([1.0, 10.0, 100.0], dtype=np.float32).reshape(3, 1, 1)


@pytest.fixture
def random():
    """A seeded generator, new for each test."""
    return np.random.default_rng(5)


def close(library, arguments, tolerance):
    expected = np.asarray(linen.dot_product_attention(**{n: jnp.asarray(x) for n, x in arguments.items()}))
    actual = library.get(aa.dot_product_attention(**library.put_all(arguments)))
    assert actual.dtype == expected.dtype
    scale = np.nanmax(np.abs(np.where(np.isfinite(expected), expected, 0)), initial=0)
    exact = library.name == "jax"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0 if exact else tolerance * (1 + scale))


@pytest.mark.parametrize(
    "dtypes",
    ["bool", "int8", "int32", "uint8", "float16 int32 int32", "float32 int32 float16", "float32 float32 float16"],
)
def test_promotion(library, dtypes, random):
    names = dtypes.split() * (3 // len(dtypes.split()))
    arrays = [random.integers(0, 3, (2, 5, 3, 4)).astype(name) for name in names]
    close(library, dict(zip(("query", "key", "value"), arrays, strict=True)), 2e-3 if "float16 int" in dtypes else 2e-6)


@pytest.mark.parametrize("bias", ["bool", "int32", "float16", "float32"])
def test_bias_dtype(library, bias, random):
    x = random.standard_normal((2, 5, 3, 4), dtype=np.float32)
    close(library, {"query": x, "key": x, "value": x, "bias": random.integers(0, 2, (5, 5)).astype(bias)}, 1e-5)


@pytest.mark.parametrize(
    ("bias", "mask"),
    [
        (None, [0, 0, 0]),
        ([-np.inf] * 3, None),
        ([-1e30] * 3, None),
        ([-np.inf, -np.inf, 0], [1, 1, 0]),
        ([np.inf, 0, 0], None),
        ([np.inf, 0, 0], [0, 1, 1]),
        ([np.nan, 0, 0], [0, 1, 1]),
        ([np.nan, 0, 0], None),
        (None, [np.nan, -0.0, 0.001]),
    ],
    ids=str,
)
def test_values_that_poison(library, bias, mask):
    arguments = {"query": np.ones((1, 1, 1), np.float32), "key": ONE, "value": VALUES}
    if bias is not None:
        arguments["bias"] = np.asarray(bias, dtype=np.float32)
    if mask is not None:
        arguments["mask"] = np.asarray(mask, dtype=np.float32)
    close(library, arguments, 1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["key", "value"])
def test_poison_in_a_hidden_place(library, name, poison):
    arguments = {"query": np.ones((1, 1, 1), np.float32), "key": ONE.copy(), "value": VALUES.copy()}
    arguments[name][1] = poison
    close(library, arguments | {"mask": np.asarray([True, False, True])}, 1e-6)


def test_fill_is_the_minimum_of_the_compute_dtype(library):
    x = np.zeros((3, 1, 1), dtype=np.float16)
    arguments = {"query": x[:1], "key": x, "value": VALUES.astype(np.float16), "mask": np.asarray([True, True, False])}
    for low, dtype in ((-1e6, np.float32), (-65504, np.float16)):
        close(library, arguments | {"bias": np.asarray([low, low, 0], dtype=dtype)}, 2e-3)


def test_many_equal_keys_overflow_float16(library):
    x = np.zeros((70000, 1, 1), dtype=np.float16)
    close(library, {"query": x[:1], "key": x, "value": x + np.float16(1)}, 0)


def test_complex(library, random):
    x = (random.standard_normal((2, 4, 2, 3)) + 1j * random.standard_normal((2, 4, 2, 3))).astype(np.complex64)
    close(library, {"query": x, "key": x, "value": x, "mask": np.tri(4, k=-1, dtype=np.float32)}, 1e-3)


def test_einsum_overrides_and_weights(library, random):
    x = library.put(random.standard_normal((2, 5, 3, 4), dtype=np.float32))
    calls = []
    backend = {"numpy": np.einsum, "jax": jnp.einsum}.get(library.name) or __import__("torch").einsum

    def einsum(equation, left, right):
        calls.append(equation)
        return backend(equation, left, right)

    actual = aa.dot_product_attention(x, x, x, qk_attn_weights_einsum=einsum, attn_weights_value_einsum=einsum)
    assert calls == ["...qhd,...khd->...hqk", "...hqk,...khd->...qhd"]
    weights = aa.dot_product_attention_weights(x, x, einsum=einsum)
    np.testing.assert_allclose(library.get(actual), library.get(aa.dot_product_attention(x, x, x)), atol=1e-6)
    np.testing.assert_allclose(
        library.get(weights), linen.dot_product_attention_weights(library.get(x), library.get(x)), atol=1e-6
    )


def test_float64_stays_float64_outside_jax(library, random):
    x = library.put(random.standard_normal((2, 5, 3, 8)))
    expected = "float32" if library.name == "jax" else "float64"
    assert library.get(aa.dot_product_attention(x, x, x)).dtype == expected


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("partitionable", [True, False])
def test_x64_and_the_layout_of_bits_follow_jax(dtype, partitionable, random):
    with jax.enable_x64(True), jax.threefry_partitionable(partitionable):
        x = jnp.asarray(random.standard_normal((2, 5, 3, 8)), dtype)
        for rate in (0.4, np.float32(0.4)):
            options = {"dropout_rng": jax.random.key(1), "dropout_rate": rate, "bias": random.standard_normal((5, 5))}
            ours, flax = (f(x, x, x, **options) for f in (aa.dot_product_attention, linen.dot_product_attention))
            assert ours.dtype == flax.dtype
            assert np.asarray(ours).tobytes() == np.asarray(flax).tobytes()


def test_strict_promotion_modes_do_not_make_us_raise(random):
    x = jnp.asarray(random.standard_normal((2, 5, 3, 8)), jnp.bfloat16)
    arguments = (x, x, x.astype(jnp.float32), jnp.ones((3, 5, 5)), jnp.ones((5, 5)))
    options = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.1, "force_fp32_for_softmax": True}
    expected = linen.dot_product_attention(*arguments, **options)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        actual = aa.dot_product_attention(*arguments, **options)
    np.testing.assert_array_equal(actual, expected)


def test_jax_transforms(random):
    x = jnp.asarray(random.standard_normal((2, 3, 2, 4)), jnp.float32)
    ours, flax = ((lambda x, f=f: f(x, x, x).sum()) for f in (aa.dot_product_attention, linen.dot_product_attention))
    np.testing.assert_array_equal(jax.hessian(ours)(x), jax.hessian(flax)(x))
    np.testing.assert_array_equal(jax.jvp(ours, (x,), (x,))[1], jax.jvp(flax, (x,), (x,))[1])
    np.testing.assert_array_equal(jax.vmap(jax.grad(ours))(x), jax.vmap(jax.grad(flax))(x))
    shape = jax.export.symbolic_shape("batch, length, 2, 4")
    exported = jax.export.export(jax.jit(lambda x: aa.dot_product_attention(x, x, x, is_causal=True)))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    assert exported.out_avals[0].shape == shape
