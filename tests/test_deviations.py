"""Where it differs from Flax: each row of docs/differs.md, both columns of it, and no row without a test."""

import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import linen, nnx

import anyattention as aa
from anyattention_conformance import within_c2

PAGE = (Path(__file__).parents[1] / "docs" / "differs.md").read_text()
ROWS = {}
X = np.random.default_rng(0).standard_normal((2, 5, 4, 8), dtype=np.float32)
KEY = aa.random.key(0)


def row(case):
    """Mark a test as that of the row whose first column is `case`."""

    def register(test):
        ROWS[case] = test
        return test

    return register


def test_every_row_has_a_test():
    (table,) = re.findall(r"^(\| case \|.*?)\n\n", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert {line.split("|")[1].strip() for line in table.splitlines()[2:]} == set(ROWS)


def ours(library, *arrays, **options):
    return aa.dot_product_attention(*map(library.put, arrays), **options)


@row("type of the result")
def test_type_of_the_result(library):
    assert isinstance(linen.dot_product_attention(X, X, X), jax.Array)
    assert type(ours(library, X, X, X)) is type(library.put(X))


@row("float64 outside JAX")
def test_float64(library):
    x = X.astype(np.float64)
    assert linen.dot_product_attention(x, x, x).dtype == np.float32
    with jax.enable_x64(True):
        expected = np.asarray(linen.dot_product_attention(x, x, x))
    actual = library.get(ours(library, x, x, x))
    if library.name == "jax":
        assert actual.dtype == np.float32
    else:
        assert not within_c2(actual, expected, {"query": x, "key": x, "value": x}, "float64")


@row("shape errors")
@pytest.mark.parametrize(
    ("arrays", "error"),
    [((X, X[:1], X), AssertionError), ((X, X, X, X[0, 0]), ValueError), ((X[0, 0],) * 3, IndexError)],
    ids=["batch", "bias", "rank"],
)
def test_shape_errors(library, arrays, error):
    with pytest.raises(error) as caught:
        linen.dot_product_attention(*arrays)
    assert caught.type is error
    assert issubclass(aa.ShapeError, error)
    with pytest.raises(aa.ShapeError):
        ours(library, *arrays)


@row("active dropout with a rate outside [0, 1), NaN, or without a key")
@pytest.mark.parametrize("rate", [1.0, 1, 1 - 1e-17, 1.5, np.inf, -0.5, np.nan, "no key"])
def test_dropout_that_cannot_be(library, rate):
    options = {"dropout_rate": 0.5} if rate == "no key" else {"dropout_rate": rate, "dropout_rng": KEY}
    if rate == "no key":
        with pytest.raises(TypeError, match="unexpected PRNG key type"):
            linen.dot_product_attention(X, X, X, **options)
    else:
        flax = np.asarray(linen.dot_product_attention(X, X, X, **options))
        if rate == 1:
            assert np.isnan(flax).all()
        elif rate > 1:
            assert not flax.any()
        else:
            np.testing.assert_array_equal(flax, linen.dot_product_attention(X, X, X))
    with pytest.raises(ValueError, match="dropout"):
        ours(library, X, X, X, **options)


@row("query heads a multiple of key heads")
def test_grouped_heads(library):
    arrays = X, X[:, :, :2], X[:, :, 2:]
    with pytest.raises(AssertionError, match="num_heads must match"):
        linen.dot_product_attention(*arrays)
    arguments = {"query": X, "key": arrays[1].repeat(2, axis=2), "value": arrays[2].repeat(2, axis=2)}
    assert not within_c2(library.get(ours(library, *arrays)), np.asarray(nnx.dot_product_attention(*arrays)), arguments,
                         "float32")  # fmt: skip
    weights = aa.dot_product_attention_weights(*map(library.put, arrays[:2]))
    assert weights.shape == (2, 4, 5, 5)


@row("PyTorch or other non-JAX arrays beside JAX arrays")
def test_two_libraries():
    x, y = jnp.asarray(X), torch.tensor(X)
    assert isinstance(linen.dot_product_attention(x, y, y), jax.Array)
    with pytest.raises(TypeError, match=r"query is jaxlib.*key is torch.Tensor, value is torch.Tensor"):
        aa.dot_product_attention(x, y, y)
    with pytest.raises(TypeError, match=r"mask is torch.Tensor"):
        aa.dot_product_attention(x, x, x, None, y[0, 0])


@row("None for query, key or value")
@pytest.mark.parametrize("missing", range(3), ids=["query", "key", "value"])
def test_none(library, missing):
    arrays = [None if i == missing else X for i in range(3)]
    with pytest.raises(AttributeError, match="NoneType"):
        linen.dot_product_attention(*arrays)
    with pytest.raises(TypeError, match=f"{('query', 'key', 'value')[missing]} must be an array, got None"):
        aa.dot_product_attention(*(None if x is None else library.put(x) for x in arrays))


@row("float8 and 4-bit integers outside JAX")
@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fn"])
def test_float8(library, dtype):
    x = jnp.asarray(X)
    for arrays, options in (((x.astype(dtype),) * 3, {}), ((x, x, x), {"dtype": getattr(ml_dtypes, dtype)})):
        expected = np.asarray(linen.dot_product_attention(*arrays, **options))
        assert expected.dtype == dtype
        assert np.isnan(expected.astype(np.float32)).all() == (dtype == "float8_e4m3fn")
        if library.name == "jax":
            assert np.asarray(aa.dot_product_attention(*arrays, **options)).tobytes() == expected.tobytes()
            continue
        if library.name == "torch":
            arrays = [torch.tensor(X).to(getattr(torch, str(y.dtype))) for y in arrays]
        else:
            arrays = map(np.asarray, arrays)
        with pytest.raises(TypeError, match=dtype):
            aa.dot_product_attention(*arrays, **options)
    for other in ("float16", "float8_e5m2fnuz"):
        with pytest.raises(jax.dtypes.TypePromotionError):
            linen.dot_product_attention(x.astype(dtype), x.astype(other), x)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2"])
def test_integers_of_four_bits_are_as_float8(dtype):
    x = X.astype(getattr(ml_dtypes, dtype))
    for function, given in ((linen.dot_product_attention, x), (aa.dot_product_attention, jnp.asarray(x))):
        with pytest.raises(jax.dtypes.TypePromotionError):
            function(given, given, given)
    with pytest.raises(TypeError, match=f"cannot compute with dtypes {dtype}"):
        aa.dot_product_attention(x, x, x)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float8_e5m2"])
def test_masks_of_such_dtypes(library, dtype):
    mask = np.tri(5).astype(getattr(ml_dtypes, dtype))
    expected = np.asarray(linen.dot_product_attention(X, X, X, mask=mask))
    if library.name == "jax":
        np.testing.assert_array_equal(ours(library, X, X, X, mask=mask), expected)
    else:
        with pytest.raises(TypeError):
            ours(library, X, X, X, mask=mask)


@row("`precision` outside JAX")
def test_precision(library):
    levels = ("default", "high", "highest", "float32", "tensorfloat32", "bfloat16", "bfloat16_3x", "fastest")
    linen.dot_product_attention(X, X, X, precision="BF16_BF16_F32")
    if library.name == "jax":
        return  # tests/backends/test_jax.py has them all
    expected = library.get(ours(library, X, X, X))
    for level in (*levels, *jax.lax.Precision, ("high", "highest")):
        np.testing.assert_array_equal(library.get(ours(library, X, X, X, precision=level)), expected)
    for level in ("BF16_BF16_F32", jax.lax.DotAlgorithmPreset.F32_F32_F32):
        with pytest.raises(ValueError, match="cannot be honoured"):
            ours(library, X, X, X, precision=level)


@row("`einsum_dot_general` outside JAX")
@pytest.mark.needs("jax")
def test_einsum_dot_general(library):
    if library.name == "jax":
        ours(library, X, X, X, einsum_dot_general=jax.lax.dot_general)
    else:
        with pytest.raises(ValueError, match="einsum_dot_general"):
            ours(library, X, X, X, einsum_dot_general=jax.lax.dot_general)


@row("JAX's strict modes of promotion")
def test_strict_modes():
    x = jnp.asarray(X, jnp.bfloat16)
    arguments = (x, x, x.astype(jnp.float32), jnp.ones((4, 5, 5)), jnp.ones((5, 5)))
    options = {"force_fp32_for_softmax": True}
    expected = linen.dot_product_attention(*arguments, **options)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(jax.dtypes.TypePromotionError):
        linen.dot_product_attention(*arguments, **options)
    with jax.numpy_rank_promotion("raise"), pytest.raises(ValueError, match="rank_promotion"):
        linen.dot_product_attention(*arguments, **options)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(aa.dot_product_attention(*arguments, **options), expected)


class Wrapped:
    """An array of some library that has this one method."""

    def __init__(self, x, method):
        setattr(type(self), method, lambda self, *args, **kwargs: x)


@row("an object with `__array__` and no known library")
def test_objects_that_numpy_could_read():
    x = type("Wrapped", (Wrapped,), {})(X, "__array__")
    assert linen.dot_product_attention(x, x, x).shape == X.shape
    with pytest.raises(TypeError, match="Wrapped is not an array of a library"):
        aa.dot_product_attention(x, x, x)


@row("an object with `__jax_array__` as mask")
def test_masks_that_jax_could_read():
    x, mask = jnp.asarray(X), type("Wrapped", (Wrapped,), {})(jnp.tri(5), "__jax_array__")
    with pytest.raises(ValueError, match="__jax_array__"):
        linen.dot_product_attention(x, x, x, mask=mask)
    expected = linen.dot_product_attention(x, x, x, mask=jnp.tri(5))
    np.testing.assert_array_equal(aa.dot_product_attention(x, x, x, mask=mask), expected)


@row("`dtype` of another library")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_of_another_library(library, dtype):
    with pytest.raises(TypeError, match="Cannot interpret"):
        linen.dot_product_attention(X, X, X, dtype=dtype)
    if library.name == "jax":
        with pytest.raises(TypeError, match="Cannot interpret"):
            ours(library, X, X, X, dtype=dtype)
    else:
        assert library.get(ours(library, X, X, X, dtype=dtype)).dtype.name == str(dtype).removeprefix("torch.")


@row("imaginary parts dropped outside JAX")
def test_imaginary_parts_are_dropped(library):
    """Flax and JAX give a DeprecationWarning, NumPy a ComplexWarning, PyTorch its UserWarning the first time."""
    bias = np.full(5, 2 + 1j, np.complex64)
    with pytest.warns(DeprecationWarning, match="Casting from complex to real"):
        linen.dot_product_attention(X, X, X, bias)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours(library, X, X, X, bias)
    kinds = {"numpy": np.exceptions.ComplexWarning, "jax": DeprecationWarning, "torch": UserWarning}
    assert all(issubclass(warning.category, kinds[library.name]) for warning in caught)
    assert len(caught) == 1 or library.name == "torch"


@row("a 64-bit scalar as bias, outside JAX")
def test_a_scalar_of_64_bits_as_bias(library):
    for dtype in ("float16", "float64"):
        x = X.astype(dtype)
        expected = linen.dot_product_attention(x, x, x, np.float64(0.3))
        actual = ours(library, x, x, x, bias=np.float64(0.3))
        assert library.get(actual).dtype == (dtype if library.name != "jax" else expected.dtype)
        np.testing.assert_allclose(library.get(actual), expected, atol=1e-2 if dtype == "float16" else 1e-6)


@row("a subclass of ndarray with methods or attributes of its own")
def test_subclasses_of_ndarray(library):
    class Metres(np.ndarray):
        def __add__(self, other):
            return super().__add__(other)

    mask = np.ones((5, 5)).view(Metres)
    linen.dot_product_attention(X, X, X, mask=mask)
    with pytest.raises(TypeError, match=r"mask: .*Metres is a subclass of numpy.ndarray with its own __add__"):
        ours(library, X, X, X, mask=mask)


@row("a Python integer beyond 32 bits as bias, outside JAX")
def test_large_integer_as_bias(library):
    with pytest.raises(OverflowError):
        linen.dot_product_attention(X, X, X, 10**30)
    if library.name == "jax":
        with pytest.raises(OverflowError):
            ours(library, X, X, X, bias=10**30)
    else:
        np.testing.assert_array_equal(ours(library, X, X, X, bias=10**30), ours(library, X, X, X, bias=1e30))
