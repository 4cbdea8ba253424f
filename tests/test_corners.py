"""Odd corners, each against Flax live: bits on JAX, C2 on NumPy and PyTorch, and equal numbers where 16 bits allow."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import linen

import anyattention as aa
from anyattention_conformance import FORMS, Case, flax_attention, truth, within_c2, within_c3

BF16 = ml_dtypes.bfloat16
CASES = {case.id: case for case in FORMS}
KEY = np.asarray([0, 7], dtype=np.uint32)
QUERY, KEYS = np.ones((1, 1, 1), np.float32), np.arange(3, dtype=np.float32).reshape(3, 1, 1)
VALUES = np.asarray([1.0, 10.0, 100.0], np.float32).reshape(3, 1, 1)


@pytest.fixture
def random():
    """A seeded generator, new for each test."""
    return np.random.default_rng(5)


def arrays(random, *dtypes, length=5):
    """query, key and value of these dtypes; integers small enough for 16 bits."""
    shapes = {"query": (2, 3, 2, 4), "key": (2, length, 2, 4), "value": (2, length, 2, 6)}
    drawn = ((name, random.standard_normal(shape) * 2) for name, shape in shapes.items())
    if any(np.dtype(dtype).kind == "u" for dtype in dtypes):
        drawn = ((name, np.abs(x)) for name, x in drawn)
    return {name: x.astype(dtype) for (name, x), dtype in zip(drawn, (dtypes * 3)[:3], strict=True)}


def agree(library, arguments, dtype=None, equal=False):
    """The answer has Flax's bits on JAX; elsewhere it is within C2 of Flax, or equal to it."""
    expected = flax_attention(**arguments)
    actual = aa.dot_product_attention(**library.put_all(arguments))
    assert isinstance(actual, library.array_type)
    actual = library.get(actual)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if library.name == "jax":
        assert actual.tobytes() == expected.tobytes()
    elif equal:
        np.testing.assert_array_equal(actual, expected)
    else:
        plain = {name: x if name == "dropout_rate" else np.asarray(x) for name, x in arguments.items()}
        assert not within_c2(actual, expected, plain, dtype or expected.dtype.name)
    return actual


def same_weights(library, arguments):
    """The weights are Flax's, number for number."""
    expected = np.asarray(linen.dot_product_attention_weights(**arguments))
    actual = library.get(aa.dot_product_attention_weights(**library.put_all(arguments)))
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(actual, expected)
    return actual


# --- dtypes ---


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        *((name, "float32") for name in ("bool", "int8", "int64", "uint64")),
        *(("float16", "float16"), (BF16, "bfloat16"), ("float64", "float64")),
        (("float16", BF16, BF16), "float32"),
        (("float16", "int64", "int32"), "float16"),
        ((BF16, "int32", "bool"), "bfloat16"),
        (("float32", "int64", "float16"), "float32"),
        (("float32", "float64", BF16), "float64"),
        (("float16", "float16", "float32"), "float32"),
    ],
    ids=str,
)
def test_promotion(library, dtypes, expected, random):
    with jax.enable_x64(True):
        assert agree(library, arrays(random, *(dtypes if isinstance(dtypes, tuple) else (dtypes,)))).dtype == expected


def test_weights_promote_query_and_key_alone(library, random):
    arguments = arrays(random, "float16", "float16", "float32")
    assert agree(library, arguments).dtype == np.float32
    del arguments["value"]
    assert same_weights(library, arguments).dtype == np.float16


@pytest.mark.parametrize(
    "dtype",
    [
        *("float16", "bfloat16", "float32", "f2", "half", "single", np.float16, np.dtype("float16"), BF16),
        *(jnp.bfloat16, jnp.float16, jnp.dtype("bfloat16")),
    ],
    ids=repr,
)
def test_dtype_is_cast_to_first(library, dtype, random):
    arguments = arrays(random, "float32", "int32", "float64")
    expected = linen.dot_product_attention(**arguments, dtype=dtype)
    actual = aa.dot_product_attention(**library.put_all(arguments), dtype=dtype)
    rounded = {name: np.asarray(x.astype(expected.dtype)) for name, x in arguments.items()}
    assert not within_c2(library.get(actual), np.asarray(expected), rounded, expected.dtype.name)


def test_dtypes_of_the_library_itself(random):
    x = torch.tensor(arrays(random, "float32")["query"])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert aa.dot_product_attention(x, x, x, dtype=dtype).dtype is dtype
    assert aa.dot_product_attention(x, x, x, dtype=float).dtype is torch.float64


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(int, ValueError), (bool, ValueError), ("int32", ValueError), (jnp.int32, ValueError), ("nonsense", TypeError)],
    ids=repr,
)
def test_dtypes_that_are_refused(library, dtype, error, random):
    arguments = arrays(random, "float32")
    for function, given in (
        (linen.dot_product_attention, arguments),
        (aa.dot_product_attention, library.put_all(arguments)),
    ):
        with pytest.raises(error) as caught:
            function(**given, dtype=dtype)
        assert caught.type is error


def test_float64_is_not_there_on_jax_with_x64_off(random):
    arguments = {name: jnp.asarray(x) for name, x in arrays(random, "float32").items()}
    for function in (linen.dot_product_attention, aa.dot_product_attention):
        with pytest.warns(UserWarning, match="float64 requested in asarray is not available"):
            assert function(**arguments, dtype="float64").dtype == np.float32
        assert function(**arguments, dtype=float).dtype == np.float32


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [
        *(("float16", bias) for bias in ("bool", "uint8", "int64", "float16", BF16, "float32", "float64")),
        *((BF16, bias) for bias in ("bool", "float16", "float32")),
        *(("float32", bias) for bias in ("bool", "int32", BF16, "float64")),
    ],
    ids=str,
)
def test_bias_dtype(library, dtype, bias, random):
    """It widens the softmax and never the output; with x64 off, Flax's float64 is float32."""
    arguments = arrays(random, dtype)
    with jax.enable_x64(True):
        agree(library, arguments | {"bias": (random.standard_normal((3, 5)) * 2).astype(bias)})


@pytest.mark.parametrize("dtype", ["float16", BF16], ids=str)
@pytest.mark.parametrize("bias", [True, 2, 0.1, -1e9, np.float32(0.1), np.float64(0.1), np.ones(())], ids=repr)
def test_scalar_bias(library, bias, dtype, random):
    agree(library, arrays(random, dtype) | {"bias": bias})


@pytest.mark.parametrize("mask", [True, False, 0, 1, 0.5, -0.0, np.nan, 1j, np.True_, np.zeros(())], ids=repr)
def test_scalar_mask(library, mask, random):
    agree(library, arrays(random, "float32") | {"mask": mask})


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "uint16", "int64", "uint64", "float16", BF16, "float64", "complex64"], ids=str
)
def test_mask_dtype(library, dtype, random):
    arguments = arrays(random, "float32")
    mask = np.asarray([0, 1, 2, -0.0, 3]).astype(dtype)
    by_dtype, by_bool = (agree(library, arguments | {"mask": m}) for m in (mask, mask != 0))
    assert by_dtype.tobytes() == by_bool.tobytes()


# --- complex numbers: C2 is for real ones, so at most twice Flax's own error, plus 4 eps of the largest value ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": np.tri(3, 5, k=-1)},
        {"mask": np.zeros(())},
        {"bias": np.arange(5, dtype=np.float32)},
        {"bias": 1j},
    ],
    ids=["plain", "mask", "hidden", "bias", "scalar bias"],
)
def test_complex(library, options, random):
    arguments = {name: (x + 1j * x[::-1]).astype(np.complex64) for name, x in arrays(random, "float32").items()}
    expected = flax_attention(**arguments, **options)
    actual = library.get(aa.dot_product_attention(**library.put_all(arguments | options)))
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if library.name == "jax":
        assert actual.tobytes() == expected.tobytes()
        return
    with jax.enable_x64(True):
        truth = flax_attention(**{name: x.astype(np.complex128) for name, x in arguments.items()}, **options)
    error, flax_error = (np.abs(x - truth).max() for x in (actual, expected))
    assert error <= 2 * flax_error + 4 * np.finfo(np.float32).eps * np.abs(arguments["value"]).max()


@pytest.mark.parametrize("given", ["dtype", "bias", "force"])
def test_complex_cast_to_real_drops_the_imaginary_part(library, given, random):
    real = arrays(random, "float32")
    turned = {name: x + 1j * x for name, x in real.items()}
    arguments, plain = {
        "dtype": (turned | {"dtype": "float16"}, real | {"dtype": "float16"}),
        "bias": (real | {"bias": np.full(5, 2 + 1j, np.complex64)}, real | {"bias": np.full(5, 2, np.float32)}),
        "force": (real | {"dtype": "complex64", "force_fp32_for_softmax": True}, real | {"dtype": "complex64"}),
    }[given]
    with warnings.catch_warnings():
        # NumPy and Flax say ComplexWarning, Flax DeprecationWarning too, and PyTorch, once, UserWarning.
        warnings.filterwarnings("ignore", "Casting (from )?complex")
        expected, actual = flax_attention(**arguments), aa.dot_product_attention(**library.put_all(arguments))
        without = aa.dot_product_attention(**library.put_all(plain))
    assert library.get(actual).dtype == expected.dtype
    if given == "dtype":
        np.testing.assert_array_equal(library.get(actual), library.get(without))
    if library.name == "jax":
        assert library.get(actual).tobytes() == expected.tobytes()


# --- shapes: lower ranks, higher ranks, single axes that grow, and nothing at all ---

ONE_HEAD, ONE_QUERY, ONE_KEY = ((2, 3, 1, 4), (2, 5, 1, 4)), ((2, 1, 2, 4), (2, 5, 2, 4)), ((2, 3, 2, 4), (2, 1, 2, 4))
NO_BATCH = ((3, 2, 4), (5, 2, 4))
NORMAL = ((2, 3, 2, 4), (2, 5, 2, 4))
ONE_BATCH = ((1, 3, 2, 4), (1, 5, 2, 4))
GROWTH = [  # (query, key), bias or mask, shape of the weights
    *((NORMAL, shape, (2, 2, 3, 5)) for shape in ((), (1,), (5,), (2, 3, 5))),
    (NORMAL, (7, 2, 2, 3, 5), (7, 2, 2, 3, 5)),
    (NORMAL, (7, 1, 1, 1, 1, 1), (7, 1, 2, 2, 3, 5)),
    (ONE_BATCH, (4, 1, 3, 5), (4, 2, 3, 5)),
    (ONE_HEAD, (3, 3, 5), (2, 3, 3, 5)),
    (ONE_QUERY, (3, 5), (2, 2, 3, 5)),
    (ONE_KEY, (5,), (2, 2, 3, 5)),
    (NO_BATCH, (1, 1, 3, 5), (1, 2, 3, 5)),
    (NO_BATCH, (4, 6, 1, 3, 5), (4, 6, 2, 3, 5)),
    (((1, 2, 1, 4), (1, 3, 1, 4)), (7, 8, 2, 3), (7, 8, 2, 3)),
]


@pytest.mark.parametrize(
    ("shapes", "shape", "weights", "kind"),
    [(*row, "bias") for row in GROWTH] + [(*row, "mask") for row in GROWTH[3:] if row[0] in (NORMAL, NO_BATCH)],
    ids=str,
)
def test_growth(library, shapes, shape, weights, kind):
    arguments = Case("growth", "growth", *shapes, v_depth=6, **{kind: shape}).inputs()
    assert agree(library, arguments).shape == (*weights[:-3], weights[-2], weights[-3], 6)
    del arguments["value"]
    assert aa.dot_product_attention_weights(**library.put_all(arguments)).shape == weights


@pytest.mark.parametrize(
    ("query", "key", "v_depth"),
    [
        ((2, 3, 2, 4), (2, 0, 2, 4), 6),
        ((2, 0, 2, 4), (2, 5, 2, 4), 6),
        ((0, 3, 2, 4), (0, 5, 2, 4), 6),
        ((2, 3, 0, 4), (2, 5, 0, 4), 6),
        ((2, 3, 2, 4), (2, 5, 2, 4), 0),
        ((2, 3, 2, 0), (2, 5, 2, 0), 6),
        ((2, 3, 2, 0), (2, 0, 2, 0), 6),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0),
    ],
    ids=["no keys", "no queries", "no batch", "no heads", "no value depth", "no depth", "no keys nor depth", "nothing"],
)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {}), ("float16", {"mask": (), "dropout": 0.5})],
    ids=["plain", "mask and dropout"],
)
def test_empty(library, query, key, v_depth, dtype, options):
    actual = agree(library, Case("empty", "lengths", query, key, v_depth, **options).inputs(dtype))
    assert key[-3] or not actual.any()


# --- values that poison: each row of the table is a batch entry, so that one call serves for all ---

INF, NAN, LOWEST = np.inf, np.nan, float(np.finfo(np.float32).min)
POISON = {  # name: (bias, mask, key, value), for a query of 1
    "plain": ([0, 0, 0], [1, 1, 1], KEYS, VALUES),
    "mask all false": ([0, 0, 0], [0, 0, 0], KEYS, VALUES),
    "bias all -inf": ([-INF] * 3, [1, 1, 1], KEYS, VALUES),
    "bias all -1e30": ([-1e30] * 3, [1, 1, 1], KEYS, VALUES),
    "bias all lowest": ([LOWEST] * 3, [1, 1, 1], KEYS, VALUES),
    "-inf and a hidden key": ([-INF, -INF, 0], [1, 1, 0], KEYS, VALUES),
    "bias +inf": ([INF, 0, 0], [1, 1, 1], KEYS, VALUES),
    "hidden bias +inf": ([INF, 0, 0], [0, 1, 1], KEYS, VALUES),
    "bias NaN": ([NAN, 0, 0], [1, 1, 1], KEYS, VALUES),
    "hidden bias NaN": ([NAN, 0, 0], [0, 1, 1], KEYS, VALUES),
    "hidden value NaN": ([0, 0, 0], [1, 0, 1], KEYS, VALUES * [[[1]], [[NAN]], [[1]]]),
    "hidden value inf": ([0, 0, 0], [1, 0, 1], KEYS, VALUES * [[[1]], [[INF]], [[1]]]),
    "hidden key NaN": ([0, 0, 0], [1, 0, 1], KEYS * [[[1]], [[NAN]], [[1]]], VALUES),
    "hidden key inf": ([0, 0, 0], [1, 0, 1], KEYS * [[[1]], [[INF]], [[1]]], VALUES),
    "key inf": ([0, 0, 0], [1, 1, 1], KEYS * [[[1]], [[INF]], [[1]]], VALUES),
    "mask of NaN, -0.0, 0.001": ([0, 0, 0], [NAN, -0.0, 0.001], KEYS, VALUES),
    "partial tie": ([-3e38, -3e38, 0], [1, 1, 0], KEYS, VALUES),
}
NAMES = ("query", "key", "value", "bias")


def poison(dtype):
    bias, mask, key, value = (np.asarray(x) for x in zip(*POISON.values(), strict=True))
    query = np.ones((len(POISON), 1, 1, 1))
    found = dict(zip(NAMES, (query, key, value, bias[:, None, None]), strict=True))
    with np.errstate(over="ignore"):
        return {name: x.astype(dtype) for name, x in found.items()} | {"mask": mask[:, None, None]}


@pytest.mark.parametrize("dtype", ["float32", "float16", BF16], ids=str)
def test_values_that_poison(library, dtype):
    arguments = poison(dtype)
    expected = flax_attention(**arguments)
    actual = library.get(aa.dot_product_attention(**library.put_all(arguments)))
    finite = {n: np.where(np.isfinite(x), x, 0) if n in ("key", "value") else x for n, x in arguments.items()}
    wrong = {
        name: report
        for i, name in enumerate(POISON)
        if (
            report := within_c2(actual[[i]], expected[[i]], {n: x[[i]] for n, x in finite.items()}, expected.dtype.name)
        )
    }
    assert not wrong
    assert library.name != "jax" or actual.tobytes() == expected.tobytes()


def gradients(function, arguments, cotangent):
    """Those of query, key, value and bias, jitted on JAX."""
    free = {name: arguments[name] for name in NAMES if name in arguments}
    fixed = {name: x for name, x in arguments.items() if name not in free}
    pullback = jax.jit(lambda free, y: jax.vjp(lambda free: function(**free, **fixed), free)[1](y)[0])
    return {name: np.asarray(x) for name, x in pullback(free, cotangent).items()}


def torch_gradients(function, arguments, cotangent):
    """The same on PyTorch, from NumPy to NumPy, unjitted."""

    def tensor(x):
        return torch.tensor(x.astype(np.float64)).to(getattr(torch, x.dtype.name))

    free = {name: tensor(arguments[name]).requires_grad_() for name in NAMES if name in arguments}
    fixed = {name: x for name, x in arguments.items() if name not in free}
    found = torch.autograd.grad(function(**free, **fixed), list(free.values()), tensor(cotangent))
    return {name: y.double().numpy().astype(arguments[name].dtype) for name, y in zip(free, found, strict=True)}


def no_worse_than_flax(actual, arguments, cotangent):
    """NaN where Flax has NaN; elsewhere C3, in units of the largest value of each gradient."""
    expected = gradients(linen.dot_product_attention, arguments, cotangent)
    right = truth(arguments, arguments["query"].dtype.name, cotangent)[0].gradients
    for name, flax in expected.items():
        np.testing.assert_array_equal(np.isnan(actual[name]), np.isnan(flax))
        counts = np.isfinite(flax) & np.isfinite(right[name])
        ours, flax, exact = (np.where(counts, x, 0).reshape(1, -1) for x in (actual[name], flax, right[name]))
        assert not within_c3(ours, flax, exact, np.abs(exact), flax.dtype.name), name


@pytest.mark.parametrize("dtype", ["float32", BF16], ids=str)
def test_gradients_of_values_that_poison(dtype):
    arguments = poison(dtype)
    cotangent = np.ones((len(POISON), 1, 1, 1), arguments["query"].dtype)
    flax, ours = (gradients(f, arguments, cotangent) for f in (linen.dot_product_attention, aa.dot_product_attention))
    assert {name: x.tobytes() for name, x in ours.items()} == {name: x.tobytes() for name, x in flax.items()}
    torchs = torch_gradients(aa.dot_product_attention, arguments, cotangent)
    no_worse_than_flax(torchs, arguments, cotangent)
    hidden, nan = list(POISON).index("mask all false"), list(POISON).index("hidden key NaN")
    for found in (ours, torchs):
        for name in ("query", "key", "bias"):
            assert not found[name][hidden].any()
        np.testing.assert_array_equal(found["value"][hidden], np.full((3, 1, 1), 1 / 3, arguments["value"].dtype))
        assert np.isnan(found["query"][nan]).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in ("large-logits", "mask-and-bias", "keys-grown-by-bias")),
        *(("mask-and-bias", "bfloat16"), ("mask-and-bias", "float16"), ("force-fp32", "bfloat16")),
    ],
)
def test_gradients_on_pytorch(name, dtype):
    """On JAX, test_attention.py has them bit for bit."""
    arguments = CASES[name].inputs(dtype)
    output = flax_attention(**arguments)
    cotangent = np.random.default_rng(1).standard_normal(output.shape).astype(output.dtype)
    no_worse_than_flax(torch_gradients(aa.dot_product_attention, arguments, cotangent), arguments, cotangent)


# --- float64 ---


@pytest.mark.parametrize(
    "name",
    ["plain", "depth-24", "large-logits", "mask-and-bias", "mask-hidden-row", "bias-row-minus-infinity", "dropout"],
)
def test_float64(library, name):
    arguments = CASES[name].inputs("float64")
    if "dropout_rate" in arguments:
        arguments["dropout_rate"] = np.float32(arguments["dropout_rate"])  # or x64 draws other bits
    with jax.enable_x64(True):
        assert agree(library, arguments).dtype == np.float64


def test_forced_softmax_in_float32(library, random):
    """A 16-bit call returns float32; a float64 one float64, its weights rounded to float32."""
    for dtype, expected in (("float16", "float32"), (BF16, "float32"), ("float32", "float32"), ("float64", "float64")):
        arguments = arrays(random, dtype) | {"force_fp32_for_softmax": True}
        with jax.enable_x64(True):
            actual = agree(library, arguments, "float32" if expected == "float64" else None)
            assert actual.dtype == expected
            if expected == "float64":
                plain = library.get(aa.dot_product_attention(**library.put_all(arrays(random, dtype))))
                assert np.abs(actual - plain).max() > 1e-10


# --- dropout: what test_dropout.py leaves ---


@pytest.mark.parametrize("rate", [0.9999999, np.asarray([0.3]), np.asarray([[0.3]], np.float16)], ids=repr)
def test_odd_rates(library, rate, random):
    """One whose reciprocal overflows float16, so that what is dropped is 0 * inf; arrays of one element."""
    arguments, options = arrays(random, "float16"), {"dropout_rng": KEY, "dropout_rate": rate}
    expected = flax_attention(**arguments, **options)
    actual = library.get(aa.dot_product_attention(**library.put_all(arguments), **options))
    allowed = arguments | {"dropout_rate": float(np.asarray(rate).reshape(()))}
    assert not within_c2(actual, expected, allowed, "float16")


@pytest.mark.parametrize("broadcast", [None, 0, "", "x", 1, np.True_], ids=repr)
def test_broadcast_dropout_is_plain_truthiness(library, broadcast, random):
    arguments = arrays(random, "float32") | {"dropout_rng": KEY, "dropout_rate": 0.5, "broadcast_dropout": broadcast}
    agree(library, arguments)
    del arguments["value"]
    dropped = library.get(aa.dot_product_attention_weights(**library.put_all(arguments))) == 0
    assert (dropped == dropped[0, 0]).all() == bool(broadcast)


@pytest.mark.parametrize("deterministic", [None, "", 0, [], np.False_, "x", 1, [0], np.True_], ids=repr)
def test_deterministic_is_plain_truthiness(library, deterministic, random):
    arguments = arrays(random, "float32") | {"dropout_rng": KEY, "dropout_rate": 0.5, "deterministic": deterministic}
    if deterministic:
        arguments |= {"dropout_rate": 7.0, "dropout_rng": "no key"}
    expected = np.asarray(linen.dot_product_attention(**arguments))
    actual = library.get(aa.dot_product_attention(**library.put_all(arguments)))
    assert not within_c2(actual, expected, arguments | {"dropout_rate": 0 if deterministic else 0.5}, "float32")


# --- hooks ---


class Recorder:
    """A module, or an einsum, that remembers what it was given."""

    def __init__(self, einsum=None):
        self.einsum, self.calls = einsum, []

    def sow(self, collection, name, weights):
        self.calls.append((collection, name, weights))

    def __call__(self, equation, x, y):
        self.calls.append((equation, x.shape, y.shape))
        return self.einsum(equation, x, y)


@pytest.mark.parametrize("dtype", ["float32", BF16], ids=str)
@pytest.mark.parametrize("force", [False, True])
def test_module_is_given_the_weights_before_dropout(library, dtype, force, random):
    arguments = arrays(random, dtype) | {"dropout_rng": KEY, "dropout_rate": 0.5, "force_fp32_for_softmax": force}
    flax, ours = Recorder(), Recorder()
    linen.dot_product_attention(**arguments, module=flax)
    aa.dot_product_attention(**library.put_all(arguments), module=ours)
    ((*where, expected),), ((*here, actual),) = flax.calls, ours.calls
    assert here == where == ["intermediates", "attention_weights"]
    actual, expected = library.get(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == (np.float32 if force else dtype)
    as_values = {"value": np.broadcast_to(np.eye(5)[:, None], (2, 5, 2, 5))}
    swapped = [np.swapaxes(x, -2, -3) for x in (actual, expected)]
    assert not within_c2(*swapped, arguments | as_values | {"dropout_rate": 0}, np.dtype(dtype).name)


@pytest.mark.parametrize("module", [False, 0, "", True, 1])
def test_module_is_plain_truthiness(library, module, random):
    for function, arguments in (
        (linen.dot_product_attention, arrays(random, "float32")),
        (aa.dot_product_attention, library.put_all(arrays(random, "float32"))),
    ):
        with pytest.raises(AttributeError, match="no attribute 'sow'") if module else contextlib.nullcontext():
            function(**arguments, module=module)


def test_einsum_overrides(library, random):
    arguments = arrays(random, "float32")
    flax = Recorder(jnp.einsum)
    ours = Recorder({"numpy": np, "jax": jnp, "torch": torch}[library.name].einsum)
    expected = linen.dot_product_attention(
        **arguments, qk_attn_weights_einsum=flax, attn_weights_value_einsum=flax
    )  # fmt: skip
    actual = aa.dot_product_attention(
        **library.put_all(arguments), qk_attn_weights_einsum=ours, attn_weights_value_einsum=ours
    )
    assert not within_c2(library.get(actual), np.asarray(expected), arguments, "float32")
    del arguments["value"]
    linen.dot_product_attention_weights(**arguments, einsum=flax)
    aa.dot_product_attention_weights(**library.put_all(arguments), einsum=ours)
    assert ours.calls == flax.calls
    assert [call[0] for call in ours.calls] == [
        "...qhd,...khd->...hqk", "...hqk,...khd->...qhd", "...qhd,...khd->...hqk",
    ]  # fmt: skip


# --- traps: where a port, or a fused kernel, usually goes another way; the numbers are Flax's, to the last bit ---


def column(values, dtype="float32", depth=1):
    return np.repeat(np.asarray(values, dtype).reshape(-1, 1, 1), depth, axis=-1)


def one(keys, dtype="float32", query=1.0, depth=1, **options):
    options = {name: np.asarray(x, dtype if name == "bias" else None) for name, x in options.items()}
    return {"query": column([query], dtype, depth), "key": column(keys, dtype, depth)} | options


ZEROS = [0, 0, 0]
TRAPS = {  # name: (arguments of the weights, the weights); a lambda where NumPy alone has no such arrays
    "a row that sees nothing": (one([1, 2, 3], mask=ZEROS), [np.float32(1) / 3] * 3),
    "a row of -inf": (one([1, 2, 3], bias=[-INF] * 3), [NAN] * 3),
    "a mask of floats is not added": (one(ZEROS, mask=[1.0, 0.0, 0.001]), [0.5, 0, 0.5]),
    "a hidden key beats -inf": (one(ZEROS, bias=[-INF, -INF, 0], mask=[1, 1, 0]), [0, 0, 1]),
    "fill of float16, logits of float32": (
        one(ZEROS, "float16", mask=[1, 1, 0]) | {"bias": np.float32([-1e6, -1e6, 0])},
        [0, 0, 1],
    ),
    "fill of float32": (one(ZEROS, bias=[-1e6, -1e6, 0], mask=[1, 1, 0]), [0.5, 0.5, 0]),
    "a tie with the fill": (one(ZEROS, "float16", bias=[-65504, -65504, 0], mask=[1, 1, 0]), [np.float16(1 / 3)] * 3),
    "float16 overflows to -inf": (one([-20, -30], "float16", bias=[-65504] * 2), [NAN] * 2),
    "flax.nnx hides with -2.4e38": (one(ZEROS, bias=[-3e38, -3e38, 0], mask=[1, 1, 0]), [0.5, 0.5, 0]),
    "NaN under the mask": (one(ZEROS, bias=[NAN, 0, 0], mask=[0, 1, 1]), [0, 0.5, 0.5]),
    "+inf under the mask": (one(ZEROS, bias=[INF, 0, 0], mask=[0, 1, 1]), [0, 0.5, 0.5]),
    "scale before the product": (one([80, 79], "float16", query=80, depth=64), [1, 0]),
    "root of 96 in bfloat16": (lambda: one([0.25, 0], BF16, query=1.25, depth=96), [0.95703125, 0.0454101562]),
    "bias of float32 is not rounded to bfloat16": (
        lambda: one([0, 0], BF16) | {"bias": np.float32([1.01, 1])},
        [0.50390625, 0.49804688],
    ),
    "a scalar is rounded to float16": (one([-20, -30], "float16") | {"bias": 65530.0}, [NAN] * 2),
    "a bias of True adds 1": (one([0, 0], "float16") | {"bias": np.asarray([True, False])}, [0.7310, 0.2690]),
    "a query of inf": (one([0, 1, 2], query=INF), [NAN] * 3),
    "a sum of float16 overflows": (one([0] * 70000, "float16"), [0] * 70000),
    "no keys": (one([]), []),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(library, name):
    arguments, expected = TRAPS[name]
    actual = same_weights(library, arguments() if callable(arguments) else arguments)
    np.testing.assert_array_equal(actual.ravel(), np.asarray(expected, np.float32).astype(actual.dtype))


@pytest.mark.parametrize("dtype", ["float16", BF16], ids=str)
def test_weights_are_rounded_before_the_second_product(library, dtype, random):
    """Step by step in 16 bits: rows that do not sum to one, each step's rounding Flax's."""
    x = random.standard_normal((4, 2, 16)).astype(dtype)
    assert not (same_weights(library, {"query": x, "key": x}).astype(np.float32).sum(axis=-1) == 1).all()


def test_kept_weight_in_bfloat16(library):
    x = np.zeros((4, 1, 1), BF16)
    kept = same_weights(library, {"query": x, "key": x, "dropout_rng": KEY, "dropout_rate": 0.1})
    assert set(kept.ravel().tolist()) == {0.0, 0.27734375}


def test_bits_of_key_zero(library):
    x = np.zeros((5, 1, 1), np.float32)
    options = {"dropout_rng": aa.random.key(0), "dropout_rate": 0.5}
    kept = same_weights(library, {"query": x[:3], "key": x} | options) != 0
    assert kept.ravel().astype(int).tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0]


def test_axes_are_length_heads_depth(library, random):
    x = random.standard_normal((8, 10, 4), dtype=np.float32)
    assert aa.dot_product_attention_weights(library.put(x), library.put(x)).shape == (10, 8, 8)
    agree(library, {"query": x, "key": x, "value": x})


# --- the smoke set gives no warning that Flax does not give: pytest makes every warning an error ---


@pytest.mark.parametrize("dtype", ["int32", "bool", "float64"])
def test_no_warnings(library, dtype):
    for case in FORMS[:: 4 if library.name == "jax" else 1]:  # there test_attention.py runs them all
        arguments = case.inputs()
        arguments |= {name: (arguments[name] * 3).astype(dtype) for name in NAMES[:3]}
        if "bias" in arguments:
            arguments["bias"] = arguments["bias"].astype("float64")
        aa.dot_product_attention(**library.put_all(arguments))
