"""NumPy's own corners: layouts, subclasses, dtypes that are no numbers, and no warnings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import anyattention as aa

SHAPES = {"query": (2, 3, 2, 4), "key": (2, 5, 2, 4), "value": (2, 5, 2, 6), "bias": (3, 5), "mask": (2, 1, 3, 5)}


@pytest.fixture
def arguments():
    random = np.random.default_rng(5)
    drawn = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    return drawn | {"mask": drawn["mask"] > 0}


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: np.flip(x).copy()[(slice(None, None, -1),) * x.ndim],
    "heads first": lambda x: np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2),
    "read-only": frozen,
    "subclass": lambda x: x.view(type("Subclass", (np.ndarray,), {})),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(arguments, layout):
    """Equal values give equal bits, an array of NumPy's own type, and arguments that stay as they were."""
    expected = aa.dot_product_attention(**arguments)
    given = {name: LAYOUTS[layout](x) for name, x in arguments.items()}
    actual = aa.dot_product_attention(**given)
    assert type(actual) is np.ndarray
    np.testing.assert_array_equal(actual, expected)
    for name, x in given.items():
        np.testing.assert_array_equal(x, arguments[name])


def test_broadcast_arrays(arguments):
    for name in ("query", "key", "value"):
        given, full = arguments.copy(), arguments.copy()
        given[name] = np.broadcast_to(arguments[name][:1], SHAPES[name])
        full[name] = given[name].copy()
        np.testing.assert_array_equal(aa.dot_product_attention(**given), aa.dot_product_attention(**full))


@pytest.mark.parametrize(
    ("put", "name"),
    [
        *((put, name) for put in (np.asarray, jnp.asarray) for name in SHAPES),
        *((torch.tensor, name) for name in ("bias", "mask")),
    ],
)
def test_masked_arrays(arguments, put, name):
    """Their mask would be lost without a word."""
    given = {n: np.ma.array(x) if n == name else put(x) for n, x in arguments.items()}
    for function in (aa.dot_product_attention, *[linen.dot_product_attention] * (put is not torch.tensor)):
        with pytest.raises(ValueError, match="numpy masked arrays are not supported"):
            function(**given)


@pytest.mark.parametrize("dtype", ["object", "U1", "S1", "M8[s]", ">f4", ">i2"])
@pytest.mark.parametrize("name", SHAPES)
def test_dtypes_that_are_no_numbers(arguments, name, dtype):
    given = arguments | {name: np.ones(SHAPES[name], np.int16).astype(dtype)}
    for function in (linen.dot_product_attention, aa.dot_product_attention):
        with pytest.raises(TypeError):
            function(**given)


@pytest.mark.parametrize("dtype", ["object", ">f4"])
def test_an_explicit_dtype_converts_them(arguments, dtype):
    given = arguments | {name: arguments[name].astype(dtype) for name in ("query", "key", "value")}
    linen.dot_product_attention(**given, dtype="float32")
    actual = aa.dot_product_attention(**given, dtype="float32")
    np.testing.assert_array_equal(actual, aa.dot_product_attention(**arguments))


def test_nested_lists(arguments):
    """Python numbers have JAX's default dtypes: 32 bits."""
    lists = {name: x.tolist() for name, x in arguments.items() if name in ("query", "key", "value")}
    wide = {name: arguments[name].astype(np.float16) for name in lists}
    for given in (lists, {**wide, "query": lists["query"]}, {**wide, "key": tuple(lists["key"])}):
        assert linen.dot_product_attention(**given).dtype == np.float32
        actual = aa.dot_product_attention(**given)
        assert actual.dtype == np.float32
    np.testing.assert_array_equal(
        aa.dot_product_attention(**lists), aa.dot_product_attention(**{name: arguments[name] for name in lists})
    )
    whole = [[[1, 2]], [[3, 4]]]
    assert aa.dot_product_attention(whole, whole, whole).dtype == np.float32
    mixed = (whole, np.float16(whole), np.float16(whole))
    assert aa.dot_product_attention(*mixed).dtype == linen.dot_product_attention(*mixed).dtype == np.float16
    with pytest.raises(ValueError, match="inhomogeneous"):
        aa.dot_product_attention([[1, 2], [3]], whole, whole)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_overflow_is_a_result(dtype):
    """Overflow, NaN and division by zero give no warning, whatever NumPy is set to do about them."""
    x = np.full((4, 2, 3), np.finfo(dtype).max, dtype)
    with np.errstate(all="raise"):
        actual = aa.dot_product_attention(x, x, x, mask=np.tri(4, k=-1))
    with jax.enable_x64(dtype == "float64"):
        expected = np.asarray(linen.dot_product_attention(x, x, x, mask=np.tri(4, k=-1)))
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
