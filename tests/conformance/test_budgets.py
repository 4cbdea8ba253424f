"""The contracts as comparisons: what passes, what does not, and what is said of it."""

import numpy as np
import pytest

from anyattention_conformance import Case, flax_attention, truth
from anyattention_conformance.budgets import EPS, c2, c3, same_bits, within_c2, within_c3

NAN, INF = np.nan, np.inf


def test_c1_is_every_bit():
    x = np.asarray([1.0, 0.0, NAN], np.float32)
    assert not same_bits(x, x.copy()).message
    assert same_bits(np.nextafter(x, np.float32(2)), x).message == "2 of 3 numbers have other bits"
    assert same_bits(x * np.asarray([1, -1, 1], np.float32), x).worst == (1,)  # minus zero
    assert "float64" in same_bits(x.astype(np.float64), x).message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_c2_allows_its_budget_and_no_more(dtype):
    """The budget written out: eps (1 + kappa) max_d sum_k w abs(v), for each row."""
    arguments = Case("budget", bias=(2, 1, 3, 5), mask=(2, 1, 3, 5)).inputs(dtype)
    expected = flax_attention(**arguments)
    query, key, value, bias = (arguments[name].astype(np.float64) for name in ("query", "key", "value", "bias"))
    kappa = (np.einsum("bqhd,bkhd->bhqk", abs(query), abs(key)) / 2 + abs(bias)).max(axis=-1)
    logits = np.where(arguments["mask"], np.einsum("bqhd,bkhd->bhqk", query, key) / 2 + bias, -1e30)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    spread = np.einsum("bhqk,bkhd->bqhd", weights, abs(value)).max(axis=-1)
    budget = EPS[dtype] * (1 + np.swapaxes(kappa, 1, 2)) * spread
    for factor, holds in ((0.99, True), (1.01, False)):
        actual = expected.astype(np.float64)
        actual[1, 2, 1, 3] += factor * budget[1, 2, 1]
        found = c2(_as(actual, expected), _as(expected, expected), arguments, dtype)
        assert (not found.message) == holds
        assert found.ratio == pytest.approx(factor, rel=1e-6)
        assert found.worst == (1, 2, 1, 3)


def _as(x, like):
    """In float64, but with a dtype's name: to add less than it can hold."""
    return np.asarray(x, np.float64)


def test_c2_wants_dtype_shape_and_nan_as_flax():
    arguments = Case("kinds").inputs()
    expected = flax_attention(**arguments)
    assert not within_c2(expected, expected, arguments, "float32")
    assert within_c2(expected.astype(np.float64), expected, arguments, "float32").startswith("float64")
    assert "instead of" in within_c2(expected[..., :3], expected, arguments, "float32")
    broken = expected.copy()
    broken[0, 0, 0, 0] = NAN
    assert "NaN in other places" in within_c2(broken, expected, arguments, "float32")


def test_c3_is_twice_flax_and_four_eps():
    right, size = np.zeros((2, 4)), np.ones((2, 4))
    flax, actual = np.full((2, 4), 1e-3), np.zeros((2, 4))
    for error, holds in ((1.9e-3, True), (2.1e-3, False)):
        actual[1, 1] = error
        assert (not within_c3(actual, flax, right, size, "float32")) == holds
    assert within_c3(actual, flax, right, size, "float32").startswith("maximum error 0.0021, Flax's 0.001")
    # A small maximum does not excuse a large mean.
    flax = np.zeros((2, 4))
    flax[0, 0] = 1e-3
    assert within_c3(np.full((2, 4), 1.5e-3), flax, right, size, "float32").startswith("rms")
    assert not within_c3(np.full((2, 4), 3.9 * EPS["float32"]), right, right, size, "float32")
    assert within_c3(np.full((2, 4), 4.1 * EPS["float32"]), right, right, size, "float32")


@pytest.mark.parametrize(
    ("actual", "flax", "right", "holds"),
    [
        (NAN, NAN, 1.0, True),  # as Flax
        (1.0, NAN, 1.0, True),  # or as it should be
        (2.0, NAN, 1.0, False),
        (NAN, 1.0, 1.0, False),
        (INF, INF, 1.0, True),
        (-INF, INF, 1.0, False),
        (NAN, NAN, NAN, True),
        (1.0, NAN, NAN, False),
        (INF, INF, INF, True),
        (1.0, 1.0, INF, False),
    ],
)
def test_c3_where_numbers_are_not_finite(actual, flax, right, holds):
    one = np.ones((1, 1))
    assert (not c3(actual * one, flax * one, right * one, one, "float32").message) == holds


def test_c3_does_not_excuse_by_flax_where_another_meaning_is_declared():
    right, size, usual = np.zeros((2, 4)), np.ones((2, 4)), np.zeros((2, 4))
    usual[0] = 0.5  # Flax's mean, where zero is declared
    assert not c3(usual, usual, right, size, "float32").message  # as if this were Flax's own error
    assert c3(usual, usual, right, size, "float32", (usual, size)).message
    assert not c3(right, usual, right, size, "float32", (usual, size)).message
    infinite = np.where(usual > 0, np.nan, usual)
    assert c3(infinite, infinite, right, size, "float32", (infinite, size)).message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_flax_is_within_its_own_budgets(dtype):
    arguments = Case("own", mask=(2, 1, 3, 5)).inputs(dtype)
    flax = flax_attention(**arguments)
    right, size = truth(arguments, dtype)
    assert 0 < c3(flax, flax, right.output, size.output, dtype).ratio <= 0.5
    assert c2(flax, flax, arguments, dtype).ratio == 0
