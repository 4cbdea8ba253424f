"""JAX's own corners: transforms, weak types, things that become arrays, settings; the bits are Flax's throughout."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import anyattention as aa
from anyattention_conformance import FORMS

OURS, FLAX = aa.dot_product_attention, linen.dot_product_attention
CASES = {case.id: case for case in FORMS}


@pytest.fixture
def arguments():
    random = np.random.default_rng(5)
    shapes = {"query": (2, 3, 2, 4), "key": (2, 5, 2, 4), "value": (2, 5, 2, 4)}
    return {name: jnp.asarray(random.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def same_bits(actual, expected):
    def same(x, y):
        assert (x.dtype, x.shape, x.weak_type) == (y.dtype, y.shape, y.weak_type)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(same, actual, expected)


def both(program):
    """The program with each function; the same bits."""
    actual, expected = program(OURS), program(FLAX)
    same_bits(actual, expected)
    return actual


# --- transforms ---


def test_transforms(arguments):
    x = arguments["query"]

    def loss(function):
        return lambda x: (function(x, x, x, mask=jnp.tri(3)) * jnp.cos(x)).sum()

    both(lambda f: jax.jit(jax.hessian(loss(f)))(x))
    both(lambda f: jax.jit(lambda x: jax.jvp(loss(f), (x,), (x,)))(x))


@pytest.mark.parametrize("axes", [(1, None, None), (-1, 0, 0)], ids=str)
def test_vmap(arguments, axes):
    q, k, v = arguments.values()
    q, k, v = (
        jnp.moveaxis(jnp.stack([x, 2 * x]), 0, 0 if a is None else a) for x, a in zip((q, k, v), axes, strict=True)
    )
    q, k, v = (x if a is not None else x[0] for x, a in zip((q, k, v), axes, strict=True))
    both(lambda f: jax.vmap(f, in_axes=axes)(q, k, v))
    both(lambda f: jax.jit(jax.vmap(jax.grad(lambda q, k, v: f(q, k, v).sum()), in_axes=axes))(q, k, v))


def test_vmap_over_keys_and_masks(arguments):
    keys, masks = jax.random.split(jax.random.key(0), 3), jnp.arange(45).reshape(3, 3, 5) % 2
    both(
        lambda f: jax.vmap(lambda key, mask: f(**arguments, mask=mask, dropout_rng=key, dropout_rate=0.5))(keys, masks)
    )


def test_eval_shape(arguments):
    for dtype in (jnp.bfloat16, jnp.float32):
        specs = {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in arguments.items()}
        ours, flax = (jax.eval_shape(f, **specs) for f in (OURS, FLAX))
        assert ours == flax


def test_donated_arguments(arguments):
    expected = FLAX(**arguments)
    query = arguments.pop("query")
    actual = jax.jit(OURS, donate_argnums=0)(query, *arguments.values())
    assert query.is_deleted()
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.needs("flatbuffers")
def test_export(arguments):
    exported = jax.export.export(jax.jit(OURS))(*arguments.values())
    exported = jax.export.deserialize(exported.serialize())
    same_bits(exported.call(*arguments.values()), jax.jit(FLAX)(*arguments.values()))
    shape = jax.export.symbolic_shape("batch, length, 2, 4")
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: OURS(x, x, x, is_causal=True)))(x)
    assert exported.out_avals[0].shape == shape
    x = arguments["query"]
    same_bits(exported.call(x), jax.jit(lambda x: FLAX(x, x, x, mask=jnp.tri(3)))(x))


# --- eager against eager, jit against jit: XLA keeps excess precision where it compiles bfloat16 ---


def test_eager_and_jit_in_bfloat16():
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 64, 4, 64)), jnp.bfloat16)
    eager = both(lambda f: f(q, k, v, mask=jnp.tri(64)))
    jitted = both(lambda f: jax.jit(f)(q, k, v, mask=jnp.tri(64)))
    assert (eager != jitted).any()


@pytest.mark.parametrize("name", ["mask-and-bias", "depth-24"])
def test_float64(name):
    with jax.enable_x64(True):
        arguments = {
            n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in CASES[name].inputs("float64").items()
        }
        free = {n: arguments.pop(n) for n in ("query", "key", "value", "bias") if n in arguments}

        def program(function):
            return lambda free: jax.value_and_grad(lambda free: jnp.nansum(function(**free, **arguments)))(free)

        output = both(lambda f: f(**free, **arguments))
        assert output.dtype == jnp.float64
        both(lambda f: jax.jit(program(f))(free))


# --- dtypes ---


def test_promotion_with_x64_off(arguments):
    q, k, v = (np.asarray(x) for x in arguments.values())
    for dtypes in (("f8", "f8", "f8"), ("f4", "f8", "f2"), ("i8", "u8", "f2"), ("i8", "i8", "i8"), ("c16", "f8", "f4")):
        given = [x.astype(dtype) for x, dtype in zip((q, abs(k), v), dtypes, strict=True)]
        expected = FLAX(*given)
        same_bits(OURS(*(jnp.asarray(x) for x in given)), expected)
        same_bits(OURS(jnp.asarray(given[0]), *given[1:]), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
def test_weak_types(arguments, dtype):
    """They take the dtype of the others, as query and as bias; a list of Python numbers is float32."""
    _, k, v = (x.astype(dtype) for x in arguments.values())
    weak = jnp.full((2, 3, 2, 4), 0.5)
    assert weak.weak_type
    assert both(lambda f: f(weak, k, v)).dtype == (jnp.float32 if dtype == "int32" else dtype)
    both(lambda f: f(k, k, v, jnp.full(5, 0.3), jnp.full(5, 2)))
    assert both(lambda f: f(weak.tolist(), k, v)).dtype == jnp.float32
    assert not both(lambda f: f(weak, weak, weak)).weak_type


@pytest.mark.parametrize("precision", [
    *("default", "high", "highest", "float32", "tensorfloat32", "bfloat16_3x", jax.lax.Precision.HIGH),
    *(("high", "highest"), ("high", None), ("high",), ["high"] * 2, "nonsense", 7, ""),
    *("BF16_BF16_F32", "TF32_TF32_F32", "F16_F16_F32", jax.lax.DotAlgorithmPreset.F32_F32_F32),
], ids=str)  # fmt: skip
def test_precision(arguments, precision):
    q, k, v = (x.astype(jnp.float16) for x in arguments.values())
    try:
        expected = FLAX(q, k, v, precision=precision)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            OURS(q, k, v, precision=precision)
        assert str(caught.value) == str(error)  # noqa: PT017
    else:
        same_bits(OURS(q, k, v, precision=precision), expected)
        changes = "BF16" in str(precision)
        assert changes == bool((expected != FLAX(q, k, v)).any())


def test_einsum_dot_general(arguments):
    def program(function):
        calls = []

        def dot_general(lhs, rhs, dimension_numbers, *precision, **options):
            calls.append((lhs.shape, rhs.shape, dimension_numbers, precision, options))
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, *precision, **options)

        return function(**arguments, einsum_dot_general=dot_general), calls

    (actual, ours), (expected, flax) = program(OURS), program(FLAX)
    same_bits(actual, expected)
    assert ours == flax
    assert len(ours) == 2
    assert ours[1][:2] == ((2, 5, 2, 4), (2, 2, 3, 5))  # the value, then the weights


# --- things that become arrays ---


class Wrapped:
    def __init__(self, x):
        self.x = x

    def __jax_array__(self):
        return self.x


def test_things_that_become_arrays(arguments):
    expected = FLAX(**arguments, bias=jnp.arange(5.0), mask=jnp.tri(3, 5))
    for kind in (Wrapped, nnx.Variable, nnx.Param):
        given = {name: kind(x) for name, x in arguments.items()}
        same_bits(OURS(**given, bias=kind(jnp.arange(5.0)), mask=jnp.tri(3, 5)), expected)
        same_bits(OURS(arguments["query"], given["key"], given["value"], jnp.arange(5.0), jnp.tri(3, 5)), expected)
    same_bits(OURS(**arguments, bias=jnp.arange(5.0), mask=nnx.Variable(jnp.tri(3, 5))), expected)


def test_numpy_arrays_and_scalars_beside_tracers(arguments):
    q, k, v = arguments.values()
    mask, bias = np.tri(3, 5), np.arange(5, dtype=np.float64)
    both(lambda f: jax.jit(lambda q: f(q, np.asarray(k), np.asarray(v), bias, mask))(q))
    both(lambda f: jax.jit(lambda q, bias: f(q, k, v, bias, True))(q, 0.5))
    both(lambda f: jax.jit(lambda mask: f(np.asarray(q), np.asarray(k), np.asarray(v), None, mask))(mask))


# --- arguments that must be concrete ---


def test_traced_rate_and_deterministic(arguments):
    for function in (OURS, FLAX):
        for name, value in (("dropout_rate", 0.5), ("deterministic", True)):
            fixed = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
            with pytest.raises(jax.errors.TracerBoolConversionError):
                jax.jit(lambda x, f=function, n=name, o=fixed: f(**arguments, **{**o, n: x}))(value)


def test_rates_in_arrays(arguments):
    for rate in (jnp.float32(0.3), jnp.asarray([0.3])):
        both(lambda f, rate=rate: f(**arguments, dropout_rng=jax.random.key(0), dropout_rate=rate))


# --- settings ---


def test_debug_nans_finds_none_in_a_hidden_row(arguments):
    with jax.debug_nans(True):
        both(
            lambda f: jax.grad(lambda q: f(q, *list(arguments.values())[1:], mask=jnp.zeros(())).sum())(
                arguments["query"]
            )
        )
        with pytest.raises(FloatingPointError):
            OURS(**arguments, bias=jnp.full(5, -jnp.inf))


# --- tiles ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "doutput"])
def test_what_is_not_finite_stays_in_its_head(name, bad):
    """Few queries of all heads share products."""
    random = np.random.default_rng(6)
    shapes = {"query": (2, 3, 4, 8), "key": (2, 40, 4, 8), "value": (2, 40, 4, 8), "bias": (2, 4, 3, 40)}
    shapes["doutput"] = shapes["query"]
    clean = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    spoilt = {name: x.copy() for name, x in clean.items()}
    spoilt[name][(1, 2, 1, 3) if name == "bias" else (1, 1, 2, 3)] = bad

    def results(query, key, value, bias, doutput):
        tiled = partial(OURS, implementation="tiled")
        output, pullback = jax.vjp(tiled, query, key, value, bias)
        *gradients, dbias = pullback(jnp.asarray(doutput))
        arrays = [jnp.moveaxis(x, -2, 0) for x in (output, *gradients)] + [jnp.moveaxis(dbias, -3, 0)]
        return [np.asarray(x) for x in arrays]

    for one, other in zip(results(**clean), results(**spoilt), strict=True):
        np.testing.assert_allclose(other[[0, 1, 3]], one[[0, 1, 3]], rtol=1e-5, atol=1e-6)
    head = [x[..., 2:3, :] for x in (spoilt["query"], spoilt["key"], spoilt["value"])]
    expected = FLAX(*head, bias=spoilt["bias"][:, 2:3])
    np.testing.assert_allclose(results(**spoilt)[0][2], expected[..., 0, :], rtol=1e-5, atol=1e-6)
