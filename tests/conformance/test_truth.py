"""The truth in float64 against JAX's own derivatives of Flax in float64."""

import jax
import numpy as np
import pytest
from flax import linen

from anyattention_conformance import FORMS, Case, Meaning, truth
from anyattention_conformance.truth import NAMES

CLEAN = [case for case in FORMS if "infinity" not in case.id and not case.dropout and not case.options]


def in_float64(arguments, cotangent_of):
    """Output and gradients by JAX in float64; the cotangent is drawn for the output's shape."""
    with jax.enable_x64(True):
        arrays = {name: np.asarray(arguments[name], np.float64) for name in NAMES if name in arguments}
        rest = {name: x for name, x in arguments.items() if name not in arrays}
        output, pullback = jax.vjp(lambda x: linen.dot_product_attention(**x, **rest), arrays)
        (gradients,) = pullback(cotangent_of(output.shape, np.float64))
        return np.asarray(output), {name: np.asarray(x) for name, x in gradients.items()}


@pytest.mark.parametrize("case", CLEAN, ids=lambda case: case.id)
def test_truth_is_flax_in_float64(case):
    arguments = case.inputs("float64")
    output, gradients = in_float64(arguments, case.cotangent)
    right, size = truth(arguments, "float64", case.cotangent(output.shape, np.float64))
    for name, x, y, unit in [("output", right.output, output, size.output)] + [
        (name, right.gradients[name], gradients[name], size.gradients[name]) for name in gradients
    ]:
        assert x.shape == y.shape == unit.shape, name
        assert np.all(np.abs(x) <= unit * (1 + 1e-12)), name
        unit = np.max(unit, axis=-1, keepdims=True, initial=0.0)
        assert np.all(np.abs(x - y) <= 1e-13 * case.scale**2 * unit), name


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (3, 2, 4), (2, 1, 3, 2, 4)])
def test_dropout_mask_is_that_of_jax(shape, broadcast):
    key = (*shape[:-3], 5, *shape[-2:])
    case = Case("dropped", query=shape, key=key, dropout=0.3, broadcast_dropout=broadcast)
    arguments = case.inputs("float32")
    right = truth(arguments, "float32")[0].output
    np.testing.assert_allclose(right, np.asarray(linen.dot_product_attention(**arguments)), rtol=1e-4, atol=1e-5)


def test_what_a_mask_hides_does_not_show():
    case = Case("hidden", mask=(2, 1, 3, 5), edits=(("mask", ..., True), ("mask", (..., 0), False)))
    arguments = case.inputs()
    cotangent = case.cotangent((2, 3, 2, 4), np.float64)
    clean, size = truth(arguments, "float32", cotangent)
    arguments["key"][0, 0], arguments["value"][0, 0] = np.nan, np.inf
    dirty, dirty_size = truth(arguments, "float32", cotangent)
    for x, y in zip(jax.tree.leaves((clean, size)), jax.tree.leaves((dirty, dirty_size)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_meanings():
    case = Case("meanings", mask=(2, 1, 3, 5), edits=(("mask", (..., 0, slice(None)), False),))
    arguments = case.inputs()
    cotangent = np.ones((2, 3, 2, 4))
    mean = np.broadcast_to(arguments["value"].astype(np.float64).mean(axis=-3)[:, None], (2, 1, 2, 4))
    np.testing.assert_allclose(truth(arguments, "float32")[0].output[:, :1], mean, rtol=1e-12)
    zero, _ = truth(arguments, "float32", cotangent, Meaning(fill=float("-inf"), empty=0.0))
    assert not zero.output[:, 0].any()
    assert not zero.gradients["query"][:, 0].any()
    assert np.isnan(truth(arguments, "float32", meaning=Meaning(fill=float("-inf")))[0].output[:, 0]).all()
    # Only two queries reach the values, each with weights that sum to one.
    np.testing.assert_allclose(zero.gradients["value"].sum(axis=-3), 2.0, rtol=1e-12)
