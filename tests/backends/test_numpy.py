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
    """Their mask would be lost without a word, as in Flax once JAX has compiled a program for such shapes."""
    given = {n: np.ma.array(x) if n == name else put(x) for n, x in arguments.items()}
    with pytest.raises(ValueError, match="numpy masked arrays are not supported"):
        aa.dot_product_attention(**given)


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


# --- subclasses: refused where they may mean more than their values ---


class Unit(np.ndarray):
    """Values in units of a factor."""

    def __array_finalize__(self, other):
        self.factor = getattr(other, "factor", 1000.0)


class Masked(np.ndarray):
    """Values of which some are hidden."""

    def __array_function__(self, *args):
        raise AssertionError("not asked")


class Fixed(np.ndarray):
    """Integers that are parts of a hundred."""

    def __mul__(self, other):
        return super().__mul__(other) // 100


def named(x):
    x = x.view(type("Named", (np.ndarray,), {}))
    x.mask = x > 0
    return x


MEANINGS = {
    "units": lambda x: x.view(Unit),
    "masked": lambda x: x.view(Masked),
    "fixed point": lambda x: x.view(Fixed),
    "inherited": lambda x: x.view(type("Metres", (Unit,), {})),
    "of a memmap": lambda x: x.view(type("Mapped", (np.memmap,), {"__array_wrap__": None})),
    "attributes": named,
}


@pytest.mark.parametrize("put", [np.asarray, jnp.asarray, torch.tensor], ids=["numpy", "jax", "torch"])
@pytest.mark.parametrize("meaning", MEANINGS)
def test_subclasses_that_mean_more(arguments, meaning, put):
    """In every argument, beside every library that takes NumPy's arrays, and in the helpers."""
    more, key = MEANINGS[meaning], aa.random.key(0)
    lengths, ids = np.array([3, 4]), np.array([[0, 0, 1, 1, 1]] * 2)
    given = {name: put(x) for name, x in arguments.items()}
    changes = [("bias", {"bias": more(arguments["bias"])}), ("mask", {"mask": more(arguments["mask"])})]
    changes += [("mask", {"mask": aa.masks.CausalMask() & more(arguments["mask"])})]
    changes += [("mask", {"mask": ~aa.masks.LengthMask(more(lengths))})]
    changes += [("mask", {"mask": aa.masks.SegmentMask(ids[:, :3], more(ids))})]
    changes += [("dropout_rng", {"dropout_rng": more(key), "dropout_rate": 0.5})]
    changes += [("dropout_rate", {"dropout_rng": key, "dropout_rate": more(np.array(0.5))})]
    if put is not torch.tensor:
        changes += [(name, {name: more(arguments[name])}) for name in ("query", "key", "value")]
    for name, change in changes:
        with pytest.raises(TypeError, match=f"{name}: .* is a subclass of numpy.ndarray with "):
            aa.dot_product_attention(**given | change)
    pullback = aa.dot_product_attention_vjp(**given)[1]
    with pytest.raises(TypeError, match=r"doutput: .* is a subclass"):
        pullback(more(np.ones((2, 3, 2, 6), np.float32)))
    for helper in (aa.make_causal_mask, aa.combine_masks, lambda x: aa.make_attention_mask(x, lengths)):
        with pytest.raises(TypeError, match="is a subclass"):
            helper(more(lengths))
    with pytest.raises(TypeError, match="is a subclass"):
        aa.masks.LengthMask(more(lengths)).to_array(3, 3)


PLAIN = {
    "memmap": lambda x: x.view(np.memmap),
    "recarray": lambda x: x.view(np.recarray),
    "subclass": lambda x: x.view(type("Plain", (np.ndarray,), {"shown": property(lambda self: "x"), "__repr__": str})),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_subclasses_that_mean_their_values(arguments, kind, tmp_path):
    given = {name: PLAIN[kind](x) for name, x in arguments.items()}
    np.testing.assert_array_equal(aa.dot_product_attention(**given), aa.dot_product_attention(**arguments))
    matrix = arguments["bias"].view(np.matrix)
    actual = aa.dot_product_attention(**arguments | {"bias": matrix})
    np.testing.assert_array_equal(actual, aa.dot_product_attention(**arguments))
    file = np.memmap(tmp_path / "query", np.float32, "w+", shape=SHAPES["query"])
    file[...] = arguments["query"]
    actual = aa.dot_product_attention(**arguments | {"query": file})
    np.testing.assert_array_equal(actual, aa.dot_product_attention(**arguments))


# --- NumPy's own error handling ---

TINY = np.array([1e-50, 1e-30, 1.0, -3.0])[:, None, None] * np.ones((4, 2, 3))
LARGE = np.array([1e6, 1e30, 1.0, -3.0])[:, None, None] * np.ones((4, 2, 3))
LOW = np.full((4, 4), -np.inf)
TINY_HALF = TINY.astype("f2")
with np.errstate(all="ignore"):
    LARGE_HALF = LARGE.astype("f2")
QUIET = {
    "float32 of 1e-50": lambda impl: aa.dot_product_attention(TINY, TINY, TINY, dtype="float32", implementation=impl),
    "float16 of 1e6": lambda impl: aa.dot_product_attention(LARGE, LARGE, LARGE, dtype="float16", implementation=impl),
    "bfloat16 of 1e-50": lambda impl: aa.dot_product_attention(TINY, TINY, TINY, dtype="bfloat16", implementation=impl),
    "mixed dtypes": lambda impl: aa.dot_product_attention(TINY_HALF, TINY, LARGE, implementation=impl),
    "low biases": lambda impl: aa.dot_product_attention(TINY, LARGE, TINY, bias=LOW, implementation=impl),
    "lists": lambda impl: aa.dot_product_attention(LARGE.tolist(), TINY.tolist(), TINY.tolist(), implementation=impl),
    "scalar bias": lambda impl: aa.dot_product_attention(TINY, TINY, TINY, np.float64(1e300), dtype="float32"),
    "Python bias": lambda impl: aa.dot_product_attention(*[TINY_HALF] * 3, 1e300, implementation=impl),
    "weights": lambda impl: aa.dot_product_attention_weights(TINY, LARGE, LOW, dtype="float16"),
    "dropout": lambda impl: aa.dot_product_attention(
        TINY, TINY, TINY, dropout_rng=aa.random.key(3), dropout_rate=np.float16(6e-8), implementation=impl
    ),
    "pullback": lambda impl: aa.dot_product_attention_vjp(TINY, LARGE, TINY, LOW, dtype="float16")[1](LARGE_HALF),
    "pullback of a wide cotangent": lambda impl: aa.dot_product_attention_vjp(*[TINY_HALF] * 3)[1](LARGE),
    "make_attention_mask": lambda impl: aa.make_attention_mask(np.full(3, 1e250), np.full(3, 1e250), dtype="f2"),
    "mask of NaN": lambda impl: aa.make_attention_mask(np.array([np.nan, 1e30]), np.ones(2), dtype="int32"),
    "combine_masks": lambda impl: aa.combine_masks(LARGE, dtype="float16"),
    "random": lambda impl: aa.random.bernoulli(
        aa.random.fold_in(aa.random.split(aa.random.key(2**32 - 1))[0], 2**32 - 1), np.float16(6e-8), (3, 3)
    ),
    "rules": lambda impl: (aa.masks.LengthMask(np.array([2**40, 3], "u8"))).to_array(4, 4),
    "explain": lambda impl: aa.explain(TINY, LARGE, TINY, bias=LOW, dtype="float16"),
}


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("name", QUIET)
def test_numpy_raises_of_nothing(name, implementation):
    """Whatever NumPy is set to do about overflow, underflow and NaN; warnings are errors here anyway."""
    QUIET[name](implementation)
    with np.errstate(all="raise"):
        QUIET[name](implementation)
