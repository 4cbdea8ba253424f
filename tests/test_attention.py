"""The exact implementation against Flax itself: C1 on JAX, C2 elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from anyattention import dot_product_attention
from anyattention_conformance import FORMS, flax_attention, within_c2

DTYPES = ("float32", "bfloat16", "float16")


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_matches_flax(library, case, dtype):
    arguments = case.inputs(dtype)
    expected = flax_attention(**arguments)
    actual = dot_product_attention(**library.put_all(arguments))
    assert isinstance(actual, library.array_type)
    actual = library.get(actual)
    if library.name == "jax":
        assert_same_bits(actual, expected)
    else:
        assert not within_c2(actual, expected, arguments, dtype)


@pytest.mark.parametrize("case", [case for case in FORMS if case.bias], ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bias_wider_than_the_arrays(library, case, dtype):
    arguments = case.inputs(dtype, bias_dtype="float32")
    expected = flax_attention(**arguments)
    actual = library.get(dot_product_attention(**library.put_all(arguments)))
    assert not within_c2(actual, expected, arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_jit_and_gradients_have_the_bits_of_flax(case, dtype):
    arguments = case.inputs(dtype)
    arrays = [name for name, x in arguments.items() if isinstance(x, np.ndarray) and x.dtype.kind not in "bu"]
    fixed = {name: x for name, x in arguments.items() if name not in arrays}

    def results(function):
        def loss(values):
            return function(**values, **fixed).astype(jnp.float32).sum()

        values = {name: jnp.asarray(arguments[name]) for name in arrays}
        return jax.jit(lambda values: (function(**values, **fixed), jax.grad(loss)(values)))(values)

    ours, flax = results(dot_product_attention), results(linen.dot_product_attention)
    jax.tree.map(assert_same_bits, ours, flax)


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_traced_program_has_the_operations_of_flax(case):
    arguments = case.inputs("bfloat16", bias_dtype="float32")

    def operations(function):
        arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
        fixed = {name: x for name, x in arguments.items() if name not in arrays}
        found = []

        def walk(jaxpr):
            for equation in jaxpr.eqns:
                inner = [x.jaxpr for x in equation.params.values() if hasattr(x, "jaxpr")]
                for each in inner:
                    walk(each)
                if not inner and any(x.aval.size > 1 for x in equation.outvars):
                    found.append((equation.primitive.name, [str(x.aval) for x in equation.outvars]))

        walk(jax.make_jaxpr(lambda arrays: function(**arrays, **fixed))(arrays).jaxpr)
        return found

    assert operations(dot_product_attention) == operations(linen.dot_product_attention)
