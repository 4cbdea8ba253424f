"""The cases as data."""

import numpy as np
import pytest

from anyattention_conformance import CASES, FORMS, Case
from anyattention_conformance.case import BEYOND, lowest, numpy_dtype

RUNS = [(case, dtype) for case in CASES if case.smoke for dtype in case.dtypes]


def test_names_and_seeds_are_unique():
    assert len({case.id for case in CASES}) == len({case.seed for case in CASES}) == len(CASES)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=lambda x: getattr(x, "id", x))
def test_inputs_are_what_the_case_says(case, dtype):
    arguments, again = case.inputs(dtype), case.inputs(dtype)
    dtypes = dict.fromkeys(("query", "key", "value", "bias"), dtype) | dict(case.also) | {"mask": case.mask_dtype}
    for name in ("query", "key", "bias", "mask"):
        shape = getattr(case, name)
        assert (shape is None) == (name not in arguments)
        if shape is not None:
            assert (arguments[name].shape, arguments[name].dtype) == (shape, numpy_dtype(dtypes[name]))
            assert arguments[name].tobytes() == again[name].tobytes()
    assert case.error or arguments["value"].shape == (*case.key[:-1], case.v_depth)


def test_every_dtype_sees_the_same_numbers_rounded_once():
    case = Case("rounded", bias=(3, 5))
    wide = case.inputs("float64")
    for dtype in ("float32", "float16", "bfloat16"):
        for name, x in case.inputs(dtype).items():
            np.testing.assert_array_equal(x, wide[name].astype(numpy_dtype(dtype)))


@pytest.mark.needs("ml_dtypes")
def test_hidden_rows_are_cases_of_their_own():
    for case in CASES:
        mask = case.inputs(case.dtypes[0]).get("mask")
        if case.group == "mask":
            assert np.asarray(mask, bool).any(axis=-1).all(), case.id
        if case.group == "hidden rows":
            assert not np.asarray(mask, bool).any(axis=-1).all() or "x" in case.id or case.mask == (), case.id


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_lowest(dtype):
    import jax.numpy as jnp
    import ml_dtypes

    info = ml_dtypes.finfo(dtype) if dtype == "bfloat16" else np.finfo(dtype)
    assert lowest(dtype) == float(info.min)
    assert dtype == "float64" or lowest(dtype) == float(jnp.finfo(dtype).min)


def test_tiers():
    for case in CASES:
        full, smoke = dict(case.runs("full")), dict(case.runs("smoke"))
        assert full == dict.fromkeys(case.dtypes, case.gradients)
        assert smoke.keys() <= full.keys()
        assert all(full[dtype] or not gradients for dtype, gradients in smoke.items())
    assert {case.group for case in CASES} == {case.group for case in CASES if case.smoke}
    assert all(any(case.runs("smoke")) for case in FORMS)


def test_needs():
    assert Case("x", bias=(2, 1, 3, 5)).needs == {"bias"}
    assert Case("x", mask=(3, 5), mask_dtype="float32").needs == {"mask", "non-boolean mask", "low-rank mask"}
    assert Case("x", dropout=0.5, broadcast_dropout=False).needs == {"dropout", "per-head dropout"}
    assert Case("x", query=(3, 2, 4), key=(5, 2, 4), v_depth=6).needs == {"no batch", "value depth"}
    assert Case("x", key=(2, 0, 2, 4), options=(("dtype", "float16"),)).needs == {"empty", "dtype"}


def test_needs_beyond_flax():
    assert Case("x", options=(("scale", 0.0),)).needs == Case("x", options=(("scale", 0.0),)).beyond == {"scale"}
    assert Case("x", options=(("logits_soft_cap", 2.0),), bias=(2, 1, 3, 5)).beyond == {"soft cap"}
    assert Case("x", sinks=(2, 2, 1)).needs == {"sinks", "sinks of each query"}
    assert Case("x", offset=(0, 3), window=(1, 0)).needs == {"offsets", "offset of each entry", "window"}
    assert Case("x", offset=0).needs == Case("x", offset=np.int32(2)).needs == {"offsets"}
    assert Case("x", query=(2, 3, 4, 4)).needs == {"grouped heads"}
    assert not Case("x", query=(2, 3, 3, 4), error="AssertionError").beyond
    assert {word for case in CASES for word in case.beyond} == BEYOND


def test_offsets_are_given_as_models_have_them():
    assert type(Case("x", offset=1).inputs()["offset"]) is int
    offset = Case("x", offset=np.int32(1)).inputs()["offset"]
    assert (offset.shape, offset.dtype) == ((), np.int32)
    offset = Case("x", offset=((0,), (3,))).inputs()["offset"]
    assert (offset.shape, offset.dtype) == ((2, 1), np.int32)


def test_corners_beyond_flax():
    corners = {case.id: case.corner for case in CASES if case.beyond}
    ordinary = {
        "scale",
        "soft-cap",
        "sinks",
        "sinks-and-mask",
        "grouped-all",
        "offset",
        "offset-decode",
        "window-offset",
    }
    assert not any(corners[name] for name in ordinary)
    assert corners["scale-0"] == corners["scale-negative"] == "models scale by a positive number"
    assert "no larger than their logits" in corners["sinks-low"]
    assert "leaves each query a key" in corners["offset-negative"] == corners["offset-at-both-ends"]


def test_ordinary_calls_and_corners():
    corners = {case.id: case.corner for case in CASES}
    ordinary = {"plain", "mask", "mask-float", "bias", "mask-and-bias", "q-length-1", "ragged", "dropout", "logits-30"}
    assert not any(corners[name] for name in ordinary)
    assert corners["depth-0"] == "no model has heads of depth 0"
    assert "one dtype" in corners["float16-and-bfloat16"]
    assert "leaves each query a key" in corners["dropout-hidden-row"] == corners["lengths-130x1-bias"]
    assert all(case.corner for case in CASES if case.group in ("errors", "infinities", "hidden rows", "fill", "growth"))
    assert all(case.corner for case in CASES if {"float64", "int32", "bool"} & set(case.dtypes))
