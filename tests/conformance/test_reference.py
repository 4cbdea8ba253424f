"""The kit's own attention against Flax, live: the same bits in 16 bits, C2 elsewhere, and Flax's gradients."""

import ast
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen

from anyattention_conformance import reference
from anyattention_conformance.budgets import within_c2
from anyattention_conformance.reference import attention, promoted

BF16 = jnp.dtype("bfloat16")
KEY = np.asarray([0, 7], np.uint32)
INF, NAN = np.inf, np.nan
NAMES = ("query", "key", "value", "bias")


def draw(dtype, /, query=(2, 3, 2, 4), key=(2, 5, 2, 4), v_depth=4, bias=None, mask=None, scale=1.0, **rest):
    """Arguments of these shapes; `bias` and `mask` are shapes too, or the arrays themselves."""
    random = np.random.default_rng(3)
    shapes = {"query": query, "key": key, "value": (*key[:-1], v_depth)}
    found = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    found["query"] = (found["query"] * scale).astype(dtype)
    if bias is not None:
        found["bias"] = random.standard_normal(bias).astype(dtype) if isinstance(bias, tuple) else bias
    if mask is not None:
        found["mask"] = random.random(mask) < 0.6 if isinstance(mask, tuple) else mask
    return found | rest


def flax(**arguments):
    """Flax's answer, eagerly, as a NumPy array."""
    arrays, rest = split(arguments)
    return np.asarray(linen.dot_product_attention(**arrays, **rest))


def split(arguments):
    """Query, key, value and bias as JAX arrays, and the other arguments."""
    arrays = {name: jnp.asarray(arguments[name]) for name in NAMES if isinstance(arguments.get(name), np.ndarray)}
    return arrays, {name: x for name, x in arguments.items() if name not in arrays}


def same(actual, expected):
    """The same dtype and shape, and the same numbers, NaN included."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(wide(actual), wide(expected))


def flax_gradients(cotangent, **arguments):
    """Flax's gradients by name, compiled, as NumPy arrays."""
    arrays, rest = split(arguments)

    @jax.jit
    def gradients(arrays):
        return jax.vjp(lambda x: linen.dot_product_attention(**x, **rest), arrays)[1](jnp.asarray(cotangent))[0]

    return {name: np.asarray(x) for name, x in gradients(arrays).items()}


def agree(arguments, compute=None):
    """Flax's answer: to the bit if it is computed in 16 bits, else within C2."""
    expected, actual = flax(**arguments), attention(**arguments)
    name = compute or expected.dtype.name
    single = arguments["key"].shape[-3] == 1  # whose weights, if it has several, Flax adds up first
    grown = expected.shape[-2] != arguments["query"].shape[-2] and jax.__version_info__ >= (0, 12)  # adds in 16 bits
    if expected.dtype.name in ("float16", "bfloat16") and not single and not grown:
        same(actual, expected)
    plain = {n: np.asarray(x) if n in (*NAMES, "mask") else x for n, x in arguments.items()}
    assert not within_c2(actual, expected, plain, name)
    return actual


def agree_on_gradients(arguments):
    """NaN where Flax has NaN; elsewhere within 2 eps (1 + largest logit) of the largest number in any gradient."""
    output, pullback = attention.vjp(**arguments)
    same(output, attention(**arguments))
    cotangent = np.random.default_rng(4).standard_normal(output.shape).astype(output.dtype)
    found = dict(zip(NAMES, pullback(cotangent), strict=True))
    assert (found["bias"] is None) == ("bias" not in arguments)
    products = np.einsum("...qhd,...khd->...hqk", wide(arguments["query"]), wide(arguments["key"]))
    kappa = np.max(np.abs(np.nan_to_num(products)), initial=0.0) / max(arguments["query"].shape[-1], 1) ** 0.5
    eps = float(ml_dtypes.finfo(arguments.get("dtype", arguments["query"].dtype)).eps)
    expected = flax_gradients(cotangent, **arguments)
    size = max(np.max(np.abs(np.nan_to_num(wide(x))), initial=0.0) for x in expected.values())
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        np.testing.assert_allclose(wide(found[name]), wide(x), rtol=0, atol=2 * eps * (1 + kappa) * size, err_msg=name)
    return found


def wide(x):
    """In float64."""
    return x.astype(np.float64)


FORMS = {
    "plain": {},
    "no batch": {"query": (3, 2, 4), "key": (5, 2, 4)},
    "two batch axes": {"query": (2, 1, 3, 2, 4), "key": (2, 1, 5, 2, 4)},
    "as many heads as positions": {"query": (2, 3, 3, 4), "key": (2, 3, 3, 4)},
    "depths": {"query": (2, 3, 2, 24), "key": (2, 5, 2, 24), "v_depth": 7},
    "large logits": {"query": (2, 9, 2, 16), "key": (2, 11, 2, 16), "scale": 30.0},
    "bias": {"bias": (2, 2, 3, 5)},
    "bias of a key": {"bias": (5,)},
    "bias of a head": {"bias": (2, 1, 1)},
    "mask": {"mask": (2, 1, 3, 5)},
    "mask of a lower rank": {"mask": (3, 5)},
    "mask and bias": {"mask": (2, 1, 3, 5), "bias": (1, 2, 3, 5)},
    "many keys, mask of each head": {"key": (2, 67, 2, 4), "mask": (2, 3, 67)},
    "a hidden row": {"mask": np.tri(3, 5, k=-1)},
    "bias -inf": {"bias": np.asarray([-INF, 0, -INF, 1, 2], np.float16)},
    "bias of a higher rank": {"bias": (3, 1, 2, 3, 5)},
    "mask of a higher rank": {"mask": (3, 1, 1, 3, 5)},
    "grown heads": {"query": (2, 3, 1, 4), "key": (2, 5, 1, 4), "bias": (3, 3, 5)},
    "grown keys": {"key": (2, 1, 2, 4), "bias": (3, 5)},
    "grown queries": {"query": (2, 1, 2, 4), "bias": (3, 5)},
    "grown batch": {"query": (1, 3, 2, 4), "key": (1, 5, 2, 4), "bias": (4, 1, 3, 5)},
    "grown from no batch": {"query": (3, 2, 4), "key": (5, 2, 4), "mask": (1, 1, 3, 5)},
    "dropout": {"dropout_rate": 0.3, "dropout_rng": KEY},
    "dropout of each head": {"dropout_rate": 0.5, "dropout_rng": KEY, "broadcast_dropout": False, "mask": (3, 5)},
    "forced float32": {"force_fp32_for_softmax": True, "mask": (3, 5)},
    "forced float32, dropout": {"force_fp32_for_softmax": True, "dropout_rate": 0.3, "dropout_rng": KEY},
    "dtype": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("dtype", ["float32", BF16, "float16"], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, dtype):
    arguments = draw(dtype, **FORMS[form])
    agree(arguments, compute=FORMS[form].get("dtype", np.dtype(dtype).name))
    if dtype != "float16":
        agree_on_gradients(arguments)


@pytest.mark.parametrize(
    "form",
    [
        *("plain", "depths", "large logits", "mask and bias", "a hidden row", "bias -inf"),
        *("grown keys", "dropout", "forced float32"),
    ],
)
def test_float64(form):
    """The dropout bits are those of x64 off: a float32 rate asks JAX for them."""
    arguments = draw("float64", **FORMS[form])
    if "dropout_rate" in arguments:
        arguments["dropout_rate"] = np.float32(arguments["dropout_rate"])
    with jax.enable_x64(True):
        agree(arguments, compute="float32" if "force_fp32_for_softmax" in arguments else None)
        if "force_fp32_for_softmax" not in arguments:
            agree_on_gradients(arguments)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
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
    ],
    ids=["no keys", "no queries", "no batch", "no heads", "no value depth", "no depth", "no keys nor depth"],
)
def test_empty(query, key, v_depth, dtype):
    arguments = draw(dtype, query, key, v_depth, bias=(1,))
    output = agree(arguments)
    assert key[-3] or not output.any()
    agree(arguments | {"mask": np.asarray(False)})
    agree(arguments | {"dropout_rate": 0.5, "dropout_rng": KEY})
    agree_on_gradients(draw(dtype, query, key, v_depth, mask=np.asarray(True)))


# --- dtypes ---


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        *((name, "float32") for name in ("bool", "int8", "int64", "uint64")),
        (("float16", BF16, BF16), "float32"),
        (("float16", "int64", "int32"), "float16"),
        ((BF16, "int32", "bool"), "bfloat16"),
        (("float32", "int64", "float16"), "float32"),
        (("float32", "float64", BF16), "float64"),
        (("float16", "float16", "float32"), "float32"),
    ],
    ids=str,
)
def test_promotion(dtypes, expected):
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 3
    arguments = draw("float32", scale=2.0)
    arguments |= {name: np.abs(arguments[name] * 3).astype(d) for name, d in zip(NAMES[:3], dtypes, strict=True)}
    with jax.enable_x64(True):
        assert agree(arguments).dtype == expected
    assert promoted(*map(np.dtype, dtypes)) == expected


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [
        *(("float16", bias) for bias in ("bool", "int64", BF16, "float32", "float64")),
        *((BF16, bias) for bias in ("bool", "float16", "float32")),
        *(("float32", bias) for bias in ("bool", "int32", BF16, "float64")),
    ],
    ids=str,
)
def test_bias_dtype(dtype, bias):
    arguments = draw(dtype)
    with jax.enable_x64(True):
        agree(arguments | {"bias": (np.random.default_rng(0).standard_normal((3, 5)) * 2).astype(bias)})


@pytest.mark.parametrize("bias", [True, 2, 0.1, -1e9, np.float32(0.1), np.ones(())], ids=repr)
def test_scalar_bias(bias):
    agree(draw(BF16) | {"bias": bias})


def test_a_float32_bias_is_not_rounded_to_16_bits():
    bias = np.asarray([1000, 1000.9, 1000.3, 999.7, 1000], np.float32)
    arguments = draw(BF16, bias=bias)
    agree(arguments)
    agree_on_gradients(arguments)
    assert np.abs(wide(attention(**arguments)) - wide(attention(**arguments | {"bias": bias.astype(BF16)}))).max() > 0.1


@pytest.mark.parametrize("dtype", [int, bool, "int32", jnp.int32], ids=repr)
def test_dtypes_that_are_refused(dtype):
    fails_alike(draw("float32", dtype=dtype))


# --- masks, and values that poison ---


@pytest.mark.parametrize("mask", [True, False, 0, 0.5, -0.0, NAN, np.zeros(())], ids=repr)
def test_scalar_mask(mask):
    agree(draw("float32", mask=mask))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", BF16, "float64"], ids=str)
def test_mask_is_truth(dtype):
    mask = np.asarray([0, 1, 2, -0.0, 3]).astype(dtype)
    same(agree(draw(BF16, mask=mask)), attention(**draw(BF16, mask=mask != 0)))
    agree(draw(BF16, mask=np.asarray([0.001, -0.001, NAN, 0.0, -0.0])))


KEYS, VALUES = (0.0, 1.0, 2.0), (1.0, 10.0, 100.0)
POISON = {  # bias, mask, key, value, for a query of 1
    "plain": ((0, 0, 0), (1, 1, 1), KEYS, VALUES),
    "mask all false": ((0, 0, 0), (0, 0, 0), KEYS, VALUES),
    "bias all -inf": ((-INF,) * 3, (1, 1, 1), KEYS, VALUES),
    "bias all -1e30": ((-1e30,) * 3, (1, 1, 1), KEYS, VALUES),
    "fill over -inf": ((-INF, -INF, 0), (1, 1, 0), KEYS, VALUES),
    "bias +inf": ((INF, 0, 0), (1, 1, 1), KEYS, VALUES),
    "hidden bias +inf": ((INF, 0, 0), (0, 1, 1), KEYS, VALUES),
    "bias NaN": ((NAN, 0, 0), (1, 1, 1), KEYS, VALUES),
    "hidden bias NaN": ((NAN, 0, 0), (0, 1, 1), KEYS, VALUES),
    "hidden value NaN": ((0, 0, 0), (1, 0, 1), KEYS, (1, NAN, 100)),
    "hidden value inf": ((0, 0, 0), (1, 0, 1), KEYS, (1, INF, 100)),
    "hidden key NaN": ((0, 0, 0), (1, 0, 1), (0, NAN, 2), VALUES),
    "hidden key inf": ((0, 0, 0), (1, 0, 1), (0, INF, 2), VALUES),
    "key inf": ((0, 0, 0), (1, 1, 1), (0, INF, 2), VALUES),
    "bias -3e38": ((-3e38, -3e38, 0), (1, 1, 0), KEYS, VALUES),
}


@pytest.mark.parametrize("dtype", ["float32", BF16], ids=str)
def test_values_that_poison(dtype):
    bias, mask, key, value = (np.asarray(x, np.float32) for x in zip(*POISON.values(), strict=True))
    arguments = {
        "query": np.ones((len(POISON), 1, 1, 1)).astype(dtype),
        "key": key[:, :, None, None].astype(dtype),
        "value": value[:, :, None, None].astype(dtype),
        "bias": bias[:, None, None].astype(dtype),
        "mask": mask[:, None, None],
    }
    output = agree(arguments)[:, 0, 0, 0]
    answers = dict(zip(POISON, output, strict=True))
    assert answers["mask all false"] == 37.0
    assert answers["fill over -inf"] == 100.0
    assert {name for name, x in answers.items() if np.isnan(x)} == {
        *("bias all -inf", "bias +inf", "bias NaN", "hidden value NaN", "hidden value inf", "key inf")
    }
    arguments["bias"] = np.where(np.isinf(arguments["bias"]), 0, arguments["bias"]).astype(dtype)  # NaN is enough
    found = agree_on_gradients(arguments)
    row = list(POISON).index
    for name in ("query", "key", "bias"):
        assert not found[name][row("mask all false")].any()
    assert np.isnan(found["query"][row("hidden key NaN")]).all()
    assert not np.isnan(found["key"][row("hidden key NaN")]).any()


@pytest.mark.parametrize(
    ("bias", "key", "expected"),
    [
        (np.full(3, -1e6, np.float32), 0.0, [0, 0, 1]),  # the fill of float16, in float32 logits
        (np.full(3, -65504, np.float16), 0.0, [1 / 3, 1 / 3, 1 / 3]),  # a tie with the fill
        (np.asarray([-INF, -INF, 0], np.float16), 0.0, [0, 0, 1]),
        (np.full(3, -65504, np.float16), -30.0, [0, 0, 1]),  # overflow to minus infinity
    ],
    ids=["wider", "tie", "-inf", "overflow"],
)
def test_fill_of_float16(bias, key, expected):
    arguments = {
        "query": np.ones((1, 1, 1), np.float16),
        "key": np.full((3, 1, 1), key, np.float16),
        "value": np.eye(3, dtype=np.float16)[:, None],
        "bias": bias,
        "mask": np.asarray([True, True, False]),
    }
    np.testing.assert_allclose(agree(arguments)[0, 0], np.asarray(expected, np.float16))


def test_overflow_of_float16():
    one = {"query": np.full((1, 1, 64), 80, np.float16), "value": np.asarray([[[1]], [[2]]], np.float16)}
    key = np.full((2, 1, 64), 80, np.float16)
    key[1] = 79
    assert agree(one | {"key": key}) == 1.0  # the query is scaled before the product
    logits = {"query": np.ones((1, 1, 1), np.float16), "key": np.full((2, 1, 1), -20, np.float16)}
    assert np.isnan(agree(one | logits | {"bias": np.float16(-65504)}))
    many = {"query": np.ones((1, 1, 1)), "key": np.ones((70000, 1, 1)), "value": np.ones((70000, 1, 1))}
    assert not agree({name: x.astype(np.float16) for name, x in many.items()}).any()  # the sum overflows


# --- dropout ---


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("batch", [(), (2,), (2, 1)], ids=str)
@pytest.mark.parametrize("rate", [0.1, np.float32(0.9)], ids=str)
def test_dropout_bits(batch, broadcast, rate):
    """The values are unit vectors, so the output is the weights."""
    arguments = draw(BF16, (*batch, 3, 2, 4), (*batch, 5, 2, 4), 5)
    arguments["value"] = np.broadcast_to(np.eye(5)[:, None], arguments["value"].shape).astype(BF16)
    agree(arguments | {"dropout_rate": rate, "dropout_rng": KEY, "broadcast_dropout": broadcast})


@pytest.mark.parametrize("rate", [1.0, 1, 1.5, -0.5, NAN, 0.0], ids=str)
def test_odd_rates(rate):
    actual = attention(**draw("float32"), dropout_rate=rate, dropout_rng=KEY)
    expected = flax(**draw("float32"), dropout_rate=rate, dropout_rng=KEY)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_keys_are_looked_at_only_when_needed():
    same(attention(**draw(BF16), dropout_rng="x", dropout_rate=0.5, deterministic=True), attention(**draw(BF16)))
    same(attention(**draw(BF16), dropout_rng="x"), attention(**draw(BF16)))


# --- errors ---


def fails_alike(arguments, sentence=True):
    """Both raise, exceptions of one class that begin with one sentence."""
    caught = []
    for function in (flax, attention):
        with pytest.raises(Exception) as found:
            function(**arguments)
        caught.append(found.value)
    expected, actual = caught
    assert type(actual) is type(expected)
    if sentence:
        assert str(actual).splitlines()[0] == str(expected).splitlines()[0]


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 2, 4), (5, 2, 4), (2, 5, 2, 4)),
        ((2, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4)),
        ((2, 3, 4, 4), (2, 5, 2, 4), (2, 5, 2, 4)),
        ((2, 3, 2, 4), (2, 5, 2, 4), (2, 6, 2, 4)),
        ((2, 3, 2, 4), (2, 5, 2, 1), (2, 5, 2, 4)),
        ((2, 4), (2, 4), (2, 4)),
        ((4,), (4,), (4,)),
        ((), (), ()),
    ],
    ids=["ranks", "batch", "heads", "lengths", "depths", "rank 2", "rank 1", "rank 0"],
)
def test_shapes_that_are_refused(shapes):
    fails_alike({name: np.ones(shape, np.float32) for name, shape in zip(NAMES, shapes, strict=False)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"bias": (4,)},
        {"mask": (4,)},
        {"bias": (3, 3, 5)},
        {"mask": (3, 1, 1, 5)},
        {"bias": [0.0] * 5},
        {"mask": [True] * 5},
        {"dropout_rate": 0.5},
        {"dropout_rate": 0.5, "dropout_rng": [0, 7]},
    ],
    ids=str,
)
def test_arguments_that_are_refused(wrong):
    fails_alike(draw("float32", **wrong))


@pytest.mark.parametrize("key", [KEY.astype(np.int32), np.ones(4, np.uint32), np.ones((2, 2), np.uint32)], ids=repr)
def test_keys_that_are_refused(key):
    fails_alike(draw("float32", dropout_rate=0.5, dropout_rng=key), sentence=False)


# --- in Flax's modules ---


@pytest.mark.parametrize("sow", [False, True])
def test_module(sow):
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    outputs = []
    for function in (linen.dot_product_attention, attention):
        layer = linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=function, dropout_rate=0.3)
        variables = layer.init(jax.random.key(0), x, deterministic=True)
        rest = {"mask": linen.make_causal_mask(x[..., 0]), "sow_weights": sow, "deterministic": True}
        outputs.append(layer.apply({"params": variables["params"]}, x, **rest, mutable=["intermediates"]))
    (expected, sown), (actual, own) = outputs
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(own) == jax.tree.structure(sown)
    assert bool(own) == sow
    for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(sown), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_parameters_are_flax_own():
    ours = list(inspect.signature(attention).parameters.values())
    theirs = list(inspect.signature(linen.dot_product_attention).parameters.values())[: len(ours)]
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_it_owes_nothing_to_the_package():
    """A fault shared with what is held against it would not show."""
    tree = ast.parse(inspect.getsource(reference))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert modules <= {
        "anyattention_conformance.threefry",
        "collections.abc",
        "dataclasses",
        "functools",
        "ml_dtypes",
        "numpy",
        "typing",
    }


def test_overflow_does_not_warn():
    """It is an answer; the tests turn warnings into errors."""
    attention(**draw("float16") | {"query": np.full((2, 3, 2, 4), 6e4, np.float16)})
