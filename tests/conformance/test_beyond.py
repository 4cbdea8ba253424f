"""What Flax lacks: the kit's reference against Flax put together by hand, and the truth against JAX's derivatives."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyattention_conformance import CASES, Claims, positions, suite, targets, truth
from anyattention_conformance.beyond import attention
from anyattention_conformance.budgets import c2, c3
from anyattention_conformance.case import BEYOND, Case
from anyattention_conformance.oracles import of_the_reference
from anyattention_conformance.truth import NAMES

SUM = "...qhd,...khd->...hqk"
# Of each word alone, and of all together, where rounding shows most.
COMPOSED = (
    *("scale-300", "soft-cap-saturated", "soft-cap-bias-and-mask", "sinks-large-logits", "sinks-of-all-sizes"),
    *("sinks-hidden-row", "grouped-all", "window-of-each-entry"),
)
BY_ID = {case.id: case for case in CASES}


def logits_of(x, arguments):
    """Flax's logits, scaled and capped, and the values of each query head."""
    query, group = x["query"], x["query"].shape[-2] // x["key"].shape[-2]
    key, value = (jnp.repeat(x[name], group, axis=-2) for name in ("key", "value"))
    scale, cap = arguments.get("scale"), arguments.get("logits_soft_cap")
    root = jnp.sqrt(query.shape[-1]).astype(query.dtype)
    logits = jnp.einsum(SUM, query / root if scale is None else query * jnp.asarray(scale, query.dtype), key)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return (logits + x["bias"] if "bias" in x else logits), value


def flax_composed(x, arguments):
    """Flax's function, given the logits as its bias; a sink is a key more, with a value of zeros."""
    logits, value = logits_of(x, arguments)
    mask = positions.dense(arguments).get("mask")
    if (sinks := x.get("sinks")) is not None:
        sinks = (sinks[:, None] if sinks.ndim == 1 else sinks)[..., None]
        logits = jnp.concatenate((logits, jnp.broadcast_to(sinks, (*logits.shape[:-1], 1))), axis=-1)
        value = jnp.concatenate((value, jnp.zeros_like(value[..., :1, :, :])), axis=-3)
        mask = None if mask is None else np.concatenate((mask, np.ones_like(mask[..., :1])), axis=-1)
    nothing = jnp.zeros((*value.shape[:-1], x["query"].shape[-1]), logits.dtype)
    # Not in one program with the logits: JAX 0.12 on a CPU fuses the sum of two products and its softmax, and four in
    # ten programs return NaN for large logits.
    flax_alone = jax.jit(flax.linen.dot_product_attention)
    return flax_alone(jnp.zeros_like(x["query"]), nothing, value, bias=logits, mask=mask)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in COMPOSED), ("scale-300", "bfloat16"), ("grouped-all", "bfloat16")],
)
def test_the_reference_stands_for_flax(name, dtype):
    """Flax's own error is within C3 of this yardstick, and its answer within C2 of this answer."""
    case = BY_ID[name]
    arguments, expected = case.inputs(dtype), of_the_reference(case, dtype)
    cotangent = case.cotangent(expected.output.shape, expected.output.dtype)

    arrays = {name: jnp.asarray(arguments[name]) for name in NAMES if name in arguments}
    output, pullback = jax.vjp(lambda x: flax_composed(x, arguments), arrays)
    output, gradients = jax.tree.map(np.asarray, (output, pullback(jnp.asarray(cotangent))[0]))
    assert not c2(output, expected.output, arguments, dtype).message
    right, size = truth(arguments, dtype, cotangent)
    assert gradients.keys() == expected.gradients.keys()
    assert not c3(output, expected.output, right.output, size.output, dtype).message
    for name, x in gradients.items():
        found = c3(x, expected.gradients[name], right.gradients[name], size.gradients[name], dtype)
        assert not found.message, (name, found)


@pytest.mark.parametrize(
    "name",
    ["scale-negative", "sinks-cap-and-scale", "sinks-of-heads-and-queries", "grouped-all", "window-of-each-entry"],
)
def test_truth_is_the_formula_in_float64(name):
    """Output and gradients, those of the sinks too, by JAX in float64."""
    case = BY_ID[name]
    arguments = case.inputs("float64")
    mask = np.asarray(positions.dense(arguments).get("mask", True))

    def formula(x):
        logits, value = logits_of(x, arguments)
        logits = jnp.where(mask, logits, float(np.finfo(np.float64).min))
        sinks = x.get("sinks", jnp.full(logits.shape[-3], -jnp.inf))
        sinks = jnp.broadcast_to((sinks[:, None] if sinks.ndim == 1 else sinks)[..., None], (*logits.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate((logits, sinks), axis=-1))[..., :-1]
        return jnp.einsum("...hqk,...khd->...qhd", weights, value)

    @jax.jit
    def answer(x, cotangent):
        output, pullback = jax.vjp(formula, x)
        return output, pullback(cotangent)[0]

    shape = (*arguments["query"].shape[:-1], arguments["value"].shape[-1])
    cotangent = case.cotangent(shape, np.float64)
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(arguments[name]) for name in NAMES if name in arguments}
        output, gradients = answer(arrays, jnp.asarray(cotangent))
    right, size = truth(arguments, "float64", cotangent)
    np.testing.assert_allclose(right.output, output, rtol=0, atol=1e-13)
    assert right.gradients.keys() == gradients.keys()
    for name, x in gradients.items():
        np.testing.assert_allclose(right.gradients[name], x, rtol=0, atol=1e-13)
        assert np.all(np.abs(right.gradients[name]) <= size.gradients[name] * (1 + 1e-12)), name


@pytest.mark.parametrize("contract", ["C2", "C3"])
def test_the_reference_is_accepted(contract):
    chosen = [run for run in suite.runs("full", contract, supports=BEYOND) if run.case.beyond]
    claims = Claims(contract=contract, supports=BEYOND, scope="all")
    report = suite.certify_here(targets.make(attention, "numpy"), chosen, claims=claims, tier="full")
    assert {x.verdict for x in report.results} == {"conforms"}
    assert {x.contract for x in report.results if x.quantity == "output"} == {"C2"}  # Flax has no bits here
    assert {x.quantity for x in report.results} == {"output", "error", "dq", "dk", "dv", "dbias", "dsinks"}


@pytest.mark.parametrize(("offset", "window"), [(1, None), (-1, None), ([0, 3], None), (2, (1, 0)), ([-9, 9], (0, 2))])
def test_what_positions_leave_visible(offset, window):
    """Key by key, as the words say it."""
    found = np.broadcast_to(positions.seen(offset, window, 3, 5), (2, 1, 3, 5))
    for entry, own in enumerate(np.broadcast_to(offset, 2)):
        for i in range(3):
            for j in range(5):
                seen = j <= i + own if window is None else i + own - window[0] <= j <= i + own + window[1]
                assert found[entry, 0, i, j] == seen


def test_a_mask_takes_in_what_positions_hide():
    arguments = Case("both", mask=(2, 1, 3, 5), offset=(0, 3)).inputs()
    mask = positions.dense(arguments)["mask"]
    assert mask.shape == (2, 1, 3, 5)
    assert not mask[0, 0, 0, 1:].any()
    np.testing.assert_array_equal(mask[1, 0, 2], arguments["mask"][1, 0, 2])
    plain = Case("plain").inputs()
    assert positions.dense(plain) is plain
