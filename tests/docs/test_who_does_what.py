"""The page that says who does what: Flax, of which it speaks in prose, and the others, of which tables speak."""

import json
import re
import runpy
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from anyattention_conformance import Report
from anyattention_conformance.cases import CASES
from anyattention_conformance.oracles import Golden
from anyattention_conformance.results import BUG

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "who-does-what.md").read_text()
CORNERS = runpy.run_path(str(DOCS / "corners.py"))
PEERS = runpy.run_path(str(DOCS / "peers.py"))
RECORD = json.loads((DOCS / "peers.json").read_text())
BY_ID = {case.id: case for case in CASES}


def asked(case, dtype="float32"):
    """The arguments of a case, and Flax's recorded answer."""
    return BY_ID[case].inputs(dtype), Golden().answer(BY_ID[case], dtype)


def mean_of_values(inputs):
    return inputs["value"].mean(axis=1)


def attended(inputs):
    """Attention in the dtype of the inputs, by the textbook."""
    logits = np.einsum("bqhd,bkhd->bhqk", inputs["query"], inputs["key"]) / inputs["query"].shape[-1] ** 0.5
    logits = np.where(inputs.get("mask", True), logits + inputs.get("bias", 0), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), inputs["value"])


def finite(x):
    return np.isfinite(x.astype(np.float32))


def fully_masked_rows():
    inputs, flax = asked("mask-hidden-row")
    np.testing.assert_allclose(flax.output[:, 0], mean_of_values(inputs), atol=1e-6)
    assert not flax.gradients["query"][:, 0].any()
    inputs, flax = asked("mask-hidden-all")
    cotangent = BY_ID["mask-hidden-all"].cotangent(flax.output.shape, "float32")
    share = cotangent.sum(axis=1, keepdims=True) / inputs["value"].shape[1]
    np.testing.assert_allclose(flax.gradients["value"], np.broadcast_to(share, inputs["value"].shape), atol=1e-6)
    assert not flax.gradients["key"].any()


def rows_of_minus_infinity():
    _, flax = asked("bias-row-minus-infinity")
    assert np.isnan(flax.output[:, 0]).all()
    assert all(np.isnan(x).any() for x in flax.gradients.values())


def nan_in_a_hidden_key():
    _, flax = asked("hidden-nan-key")
    assert finite(flax.output).all()
    assert np.isnan(flax.gradients["query"][0]).all()


def nan_in_a_hidden_value():
    for case in ("hidden-nan-value", "hidden-infinite-value"):
        inputs, flax = asked(case)
        assert (np.isnan(flax.output).any(axis=1) == ~finite(inputs["value"]).all(axis=1)).all()


def nan_in_a_hidden_bias():
    for case in ("hidden-nan-bias", "hidden-infinite-bias"):
        inputs, flax = asked(case)
        assert not finite(inputs["bias"]).all()
        assert finite(flax.output).all()
        assert all(finite(x).all() for x in flax.gradients.values())


def visible_infinities():
    rows = {"visible-infinite-bias": 0, "visible-nan-bias": 0, "visible-nan-key": slice(None), "infinite-query": 1}
    for case, row in rows.items():
        assert np.isnan(asked(case)[1].output[0, row, 0]).all(), case


def hidden_keys_beside_minus_infinity():
    inputs, flax = asked("fill-over-infinity")
    np.testing.assert_allclose(flax.output, np.broadcast_to(inputs["value"][:, :1], flax.output.shape))


def hidden_keys_beside_the_smallest_number():
    inputs, flax = asked("fill-tie")
    np.testing.assert_allclose(flax.output[:, 0], mean_of_values(inputs), atol=1e-6)


def hidden_keys_beside_a_wider_bias():
    inputs, flax = asked("fill-of-the-arrays", "float16")
    assert (inputs["bias"].dtype, inputs["bias"].min()) == (np.float32, -1e6)
    np.testing.assert_array_equal(flax.output[:, 0], inputs["value"][:, 0])


def dtype_of_the_mask():
    inputs, flax = asked("mask-fractions")
    assert {0.25, -0.5} < set(inputs["mask"].flat)
    np.testing.assert_allclose(flax.output, attended(inputs | {"mask": inputs["mask"] != 0}), atol=1e-6)


def a_mask_or_bias_that_enlarges_the_result():
    assert asked("bias-higher-rank")[1].output.shape == (3, 2, 3, 2, 4)
    assert asked("mask-higher-rank")[1].output.shape == (3, 2, 3, 2, 4)
    assert asked("heads-grown-by-bias")[1].output.shape[-2] == 3 > asked("heads-grown-by-bias")[0]["query"].shape[-2]


def boolean_bias():
    inputs, flax = asked("bias-bool")
    np.testing.assert_allclose(flax.output, attended(inputs), atol=1e-6)


def scale_before_or_after():
    inputs, flax = asked("scale-first", "float16")
    assert not finite(np.einsum("bqhd,bkhd->bhqk", inputs["query"], inputs["key"])).all()
    assert finite(flax.output).all()


def rounding_of_the_scale():
    for dtype in (ml_dtypes.bfloat16, np.float16):
        root = np.sqrt(96).astype(dtype)
        assert float(root) != np.sqrt(96)
        inputs, flax = asked("weights-of-depth-96", np.dtype(dtype).name)
        query = inputs["query"].astype(np.float32)
        logits = {
            of: np.einsum("bqhd,bkhd->bhqk", query / of, inputs["key"].astype(np.float32)) for of in (root, 96**0.5)
        }
        assert not np.array_equal(*(x.astype(dtype) for x in logits.values()))
        assert flax.output.dtype == dtype


def softmax_in_half_precision():
    for dtype in ("bfloat16", "float16"):
        _, flax = asked("sums-of-weights", dtype)  # the values are one: the output is the sum
        assert (flax.output.astype(np.float32) != 1).any()


def sums_over_many_keys():
    inputs, flax = asked("sum-overflow", "float16")
    assert inputs["key"].shape[0] == 70000
    assert not flax.output.any()


def overflow_to_minus_infinity():
    inputs, flax = asked("overflow-to-infinity", "float16")
    assert (inputs["query"][0, 0, 0] @ inputs["key"][0, 0, 0] / 2, inputs["bias"].min()) == (-20, -65504)
    assert np.isnan(flax.output).all()


def bias_of_a_wider_dtype():
    inputs, flax = asked("wide-bias-fine", "bfloat16")
    rounded = inputs["bias"].astype(ml_dtypes.bfloat16)
    assert (rounded == rounded.flat[0]).all()  # the bias would be lost
    expected = attended({name: x.astype(np.float32) for name, x in inputs.items()})
    np.testing.assert_allclose(flax.output.astype(np.float32), expected, atol=0.03)


def double_precision():
    inputs, flax = asked("float64", "float64")
    np.testing.assert_allclose(flax.output, attended(inputs), atol=1e-14)


def mixed_dtypes():
    assert asked("float16-and-bfloat16", "float16")[1].output.dtype == np.float32
    assert asked("float16-and-integers", "float16")[1].output.dtype == np.float16


def integers_and_booleans():
    assert asked("integers", "int32")[1].output.dtype == asked("booleans", "bool")[1].output.dtype == np.float32


def another_dtype_for_the_computation():
    assert asked("dtype", "float16")[1].output.dtype == np.float32


def values_of_another_depth():
    assert asked("value-depth")[1].output.shape[-1] == 7 > asked("value-depth")[0]["query"].shape[-1]


def depth_zero():
    inputs, flax = asked("depth-0")
    np.testing.assert_allclose(flax.output[:, 0], mean_of_values(inputs), atol=1e-6)


def no_keys():
    _, flax = asked("kv-length-0")
    assert flax.output.size
    assert not flax.output.any()


def no_queries():
    assert asked("q-length-0")[1].output.shape[1] == 0


def shapes_that_do_not_fit():
    for case in ("ranks-differ", "batches-differ", "heads-differ", "depths-differ"):
        assert asked(case)[1] == "AssertionError"


def more_values_than_keys():
    assert asked("kv-lengths-differ")[1] == "AssertionError"


def masks_that_do_not_fit():
    assert asked("mask-does-not-fit")[1] == asked("bias-does-not-fit")[1] == "ValueError"


FLAX = [
    *(fully_masked_rows, rows_of_minus_infinity, nan_in_a_hidden_key, nan_in_a_hidden_value, nan_in_a_hidden_bias),
    *(visible_infinities, hidden_keys_beside_minus_infinity, hidden_keys_beside_the_smallest_number),
    *(hidden_keys_beside_a_wider_bias, dtype_of_the_mask, a_mask_or_bias_that_enlarges_the_result, boolean_bias),
    *(scale_before_or_after, rounding_of_the_scale, softmax_in_half_precision, sums_over_many_keys),
    *(overflow_to_minus_infinity, bias_of_a_wider_dtype, double_precision, mixed_dtypes, integers_and_booleans),
    *(another_dtype_for_the_computation, values_of_another_depth, depth_zero, no_keys, no_queries),
    *(shapes_that_do_not_fit, more_values_than_keys, masks_that_do_not_fit),
]


@pytest.mark.parametrize("check", FLAX, ids=lambda check: check.__name__)
def test_flax_does_what_the_page_says(check):
    check()


def test_every_corner_of_the_page_is_checked_against_flax():
    """The two others broadcast a mask, or take two arguments: the kit's cases show it by passing."""
    headings = {x.lower().replace(" ", "_") for x in re.findall(r"^### (.*)$", PAGE, flags=re.MULTILINE)}
    measured = {x.replace("-", "_") for x in CORNERS["QUESTIONS"]}
    assert {check.__name__ for check in FLAX} == headings - measured - {"mask_and_bias_together", "shape_of_the_mask"}


def test_every_corner_has_a_heading_and_known_cases():
    headings = [x.lower().replace(" ", "-") for x in re.findall(r"^### (.*)$", PAGE, flags=re.MULTILINE)]
    assert sorted(headings) == sorted([*CORNERS["CORNERS"], *CORNERS["QUESTIONS"]])
    assert {case for corner in CORNERS["CORNERS"].values() for case in corner.cases} <= set(BY_ID)


def row_of(corner, attention):
    """What the page says that an attention does in a corner."""
    (table,) = re.findall(rf"<!-- {corner} -->\n(.*?)<!-- end -->", PAGE, flags=re.DOTALL)
    (row,) = re.findall(rf"^\|[^|]*{re.escape(attention)}[^|]*\| (.*) \|$", table, flags=re.MULTILINE)
    return row.split(" | ")


def test_facts_of_the_page():
    """What readers come for, in words that no change of the generator should lose."""
    assert row_of("fully-masked-rows", "torch SDPA")[0] == "the weights are zero"
    assert row_of("fully-masked-rows", "jax.nn") == ["as Flax", "as Flax"]
    assert "weights that do not sum to one" in row_of("fully-masked-rows", "Keras on PyTorch")[1]
    assert "NaN there stays" in row_of("nan-in-a-hidden-key", "torch SDPA")[0]
    assert row_of("nan-in-a-hidden-value", "ours (tiled)")[0] == "finite"
    assert row_of("overflow-to-minus-infinity", "torch SDPA") == ["finite"]
    assert row_of("overflow-to-minus-infinity", "mlx.fast") == ["as Flax"]
    assert row_of("hidden-keys-beside-minus-infinity", "torch SDPA") == ["a hidden logit is minus infinity"]
    assert "in float32" in row_of("double-precision", "jax.nn")[0]
    assert row_of("causal-alignment", "mlx.fast") == ["bottom-right"]
    assert row_of("causal-alignment", "torch SDPA") == ["top-left"]
    assert row_of("grouped-heads", "torch SDPA") == ["RuntimeError, computed with `enable_gqa=True`"]
    assert row_of("dropout", "torch SDPA") == ["a mask for each batch entry and head"]
    assert row_of("a-mask-of-zeros-and-ones", "torch SDPA") == ["added to the logits"]


@pytest.mark.parametrize("name", [x for x in CORNERS["NAMES"] if not x.startswith("anyattention")])
def test_every_other_library_differs_in_some_corner(name):
    """As certify.md says."""
    asked = CORNERS["CORNERS"].values()
    marks = {CORNERS["mark"](CORNERS["phrases"](name, corner, corner.columns[0][1])) for corner in asked}
    assert any("≠" in mark for mark in marks)


@pytest.mark.parametrize("name", CORNERS["NAMES"])
def test_the_committed_results_have_no_failure(name):
    report = Report.from_json((CORNERS["RESULTS"] / f"{name}.json").read_text())
    assert not report.problems
    assert BUG not in {result.verdict for result in report.results}
    assert len(report.results) > 100


@pytest.mark.slow
@pytest.mark.parametrize("group", PEERS["GROUPS"])
def test_peers_do_what_is_recorded(group):
    """``python docs/peers.py`` records it anew."""
    for kind, found in PEERS["measured"](group).items():
        assert found == {name: RECORD[kind][name] for name in found}
