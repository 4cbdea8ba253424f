"""The cases: every form that the arguments take, and where ports of Flax's attention go wrong."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from anyattention_conformance.case import ONE_HOT, Case, Edit
from anyattention_conformance.cases_beyond import BEYOND_CASES

INF, NAN = float("inf"), float("nan")
ROW_0, KEY_0 = (..., 0, slice(None)), (..., 0)  # of a mask or a bias
MASK: dict[str, Any] = {"mask": (2, 1, 3, 5)}
BIAS: dict[str, Any] = {"bias": (2, 1, 3, 5)}
HIDE_KEY_0: tuple[Edit, ...] = (("mask", ..., True), ("mask", KEY_0, False))
HIDE_ROW_0: tuple[Edit, ...] = (("mask", ROW_0, False),)
BIAS_ALONE: Edit = ("query", ..., 0.0)  # logits are the bias
# Logits are one product each, so that no order of summation matters.
ONE_PRODUCT: tuple[Edit, ...] = (("query", (..., slice(1, None)), 0.0), ("query", KEY_0, 2.75))
NARROW: dict[str, Any] = {"dtypes": ("bfloat16", "float16"), "gradients": False, "exact": True}
WIDE_BIAS: dict[str, Any] = {**BIAS, "also": (("bias", "float32"),), "extra": ("wide bias",)}
GROWTH: dict[str, Any] = {"group": "growth", "extra": ("growth",)}

FORMS = (  # every form that the arguments take
    Case("plain"),
    Case("no-batch", smoke="gradients", query=(3, 2, 4), key=(5, 2, 4)),
    Case("two-batch", smoke="output", query=(2, 1, 3, 2, 4), key=(2, 1, 5, 2, 4)),
    Case("value-depth", "depth", smoke="gradients", v_depth=7),
    Case("depth-0", "depth", smoke="output", query=(2, 3, 2, 0), key=(2, 5, 2, 0)),
    Case("depth-24", "depth", smoke="output", query=(2, 3, 2, 24), key=(2, 5, 2, 24), v_depth=24),
    Case(
        "large-logits",
        "large logits",
        smoke="output",
        query=(2, 33, 2, 16),
        key=(2, 47, 2, 16),
        v_depth=16,
        scale=30.0,
    ),
    Case("q-length-1", "lengths", smoke="output", query=(2, 1, 2, 4)),
    Case("q-length-0", "lengths", smoke="output", query=(2, 0, 2, 4)),
    Case("kv-length-1", "lengths", smoke="output", key=(2, 1, 2, 4)),
    Case("kv-length-0", "lengths", smoke="output", key=(2, 0, 2, 4)),
    Case("bias", "bias", bias=(2, 2, 3, 5)),
    Case("bias-lower-rank", "bias", smoke="output", bias=(3, 5)),
    Case("bias-keys", "bias", smoke="gradients", bias=(5,)),
    Case(
        "bias-minus-infinity",
        "infinities",
        smoke="output",
        **BIAS,
        edits=(("bias", (..., slice(None, None, 2)), -INF),),
    ),
    Case("bias-row-minus-infinity", "infinities", **BIAS, edits=(("bias", ROW_0, -INF),)),
    Case("mask", "mask", **MASK),
    Case("mask-float", "mask", smoke="outputs", **MASK, mask_dtype="float32"),
    Case("mask-keys", "mask", smoke="output", mask=(2, 1, 1, 5)),
    Case("mask-lower-rank", "mask", smoke="output", mask=(3, 5)),
    Case("mask-hidden-row", "hidden rows", **MASK, edits=HIDE_ROW_0),
    Case("mask-and-bias", "mask", **MASK, bias=(1, 2, 3, 5)),
    Case("bias-higher-rank", smoke="gradients", bias=(3, 1, 2, 3, 5), **GROWTH),
    Case("mask-higher-rank", smoke="output", mask=(3, 1, 1, 3, 5), **GROWTH),
    Case("heads-grown-by-bias", smoke="output", query=(2, 3, 1, 4), key=(2, 5, 1, 4), bias=(3, 3, 5), **GROWTH),
    Case("keys-grown-by-bias", smoke="gradients", key=(2, 1, 2, 4), bias=(3, 5), **GROWTH),
    Case("dropout", "dropout", smoke="output", dropout=0.3),
    Case("dropout-everywhere", "dropout", smoke="gradients", dropout=0.5, broadcast_dropout=False, **MASK),
    Case("force-fp32", "dtypes", options=(("force_fp32_for_softmax", True),), **MASK),
)
CORNERS = (  # where ports of Flax's attention go wrong
    Case("three-batch", smoke="output", query=(1, 2, 1, 3, 2, 4), key=(1, 2, 1, 5, 2, 4)),
    Case("heads-as-many-as-queries", smoke="output", query=(2, 3, 3, 4), key=(2, 3, 3, 4), mask=(2, 1, 3, 3)),
    # The root of 96 is not exact in bfloat16.
    Case("depth-96", "depth", smoke="output", query=(2, 3, 2, 96), key=(2, 5, 2, 96), dtypes=("bfloat16", "float16")),
    Case("bias-heads", "bias", smoke="output", bias=(2, 1, 1)),
    Case("bias-bool", "bias", smoke="output", **BIAS, also=(("bias", "bool"),), extra=("bool bias",), gradients=False),
    Case(
        "ragged", "lengths", smoke="output", query=(2, 33, 2, 16), key=(2, 47, 2, 16), v_depth=16, mask=(2, 1, 33, 47)
    ),
    Case("q-length-1-masked", "lengths", smoke="output", query=(2, 1, 2, 4), mask=(2, 1, 1, 5)),
    Case("mask-rank-3", "mask", smoke="output", mask=(2, 3, 5)),
    Case("mask-heads", "mask", smoke="output", mask=(1, 2, 3, 5)),
    Case(
        "mask-queries",
        "hidden rows",
        smoke="gradients",
        mask=(2, 1, 3, 1),
        edits=(("mask", (..., 1, slice(None)), False),),
    ),
    Case(
        "mask-int",
        "mask",
        smoke="output",
        **MASK,
        mask_dtype="int32",
        edits=(("mask", KEY_0, 2.0), ("mask", (..., 1), -1.0)),
    ),
    Case(
        "mask-fractions",
        "mask",
        smoke="output",
        **MASK,
        mask_dtype="float32",
        edits=(("mask", KEY_0, 0.25), ("mask", (..., 1), -0.5)),
    ),
    Case("mask-hidden-all", "hidden rows", smoke="outputs", **MASK, edits=(("mask", ..., False),)),
    Case("hidden-row-large-bias", "hidden rows", smoke="output", **MASK, **BIAS, bias_scale=30.0, edits=HIDE_ROW_0),
    Case("hidden-nan-bias", "infinities", **MASK, **BIAS, edits=(*HIDE_KEY_0, ("bias", KEY_0, NAN))),
    Case(
        "hidden-infinite-bias", "infinities", smoke="output", **MASK, **BIAS, edits=(*HIDE_KEY_0, ("bias", KEY_0, INF))
    ),
    Case("visible-infinite-bias", "infinities", smoke="output", **BIAS, edits=(("bias", (..., 0, 0), INF),)),
    Case("visible-nan-bias", "infinities", smoke="output", **BIAS, edits=(("bias", (..., 0, 1), NAN),)),
    Case("hidden-nan-key", "infinities", smoke="gradients", **MASK, edits=(*HIDE_KEY_0, ("key", (0, 0), NAN))),
    Case("hidden-nan-value", "infinities", smoke="gradients", **MASK, edits=(*HIDE_KEY_0, ("value", (0, 0), NAN))),
    Case(
        "hidden-infinite-value",
        "infinities",
        smoke="output",
        **MASK,
        edits=(*HIDE_KEY_0, ("value", (0, 0, 0, 1), INF)),
    ),
    Case("visible-nan-key", "infinities", smoke="output", edits=(("key", (0, 1, 0, 2), NAN),)),
    Case("infinite-query", "infinities", smoke="output", edits=(("query", (0, 1, 0, 2), INF),)),
    # The fill is finite: hidden keys win over visible ones at minus infinity.
    Case("fill-over-infinity", "fill", **MASK, **BIAS, edits=(*HIDE_KEY_0, ("bias", (..., slice(1, None)), -INF))),
    # The fill is that of the arrays, not of the wider logits: a hidden key wins over -1e6.
    Case(
        "fill-of-the-arrays",
        "fill",
        **MASK,
        **WIDE_BIAS,
        edits=(*HIDE_KEY_0, BIAS_ALONE, ("bias", ..., -1e6)),
        dtypes=("float16",),
    ),
    Case("fill-tie", "fill", **MASK, **BIAS, edits=(*HIDE_KEY_0, BIAS_ALONE, ("bias", ..., "min"))),
    Case(
        "fill-below-bias",
        "fill",
        smoke="outputs",
        **MASK,
        **BIAS,
        edits=(*HIDE_KEY_0, BIAS_ALONE, ("bias", ..., -3e38)),
        dtypes=("float32", "bfloat16"),
    ),
    # Logits of -20 beside a bias at the minimum: minus infinity in float16.
    Case(
        "overflow-to-infinity",
        "fill",
        **BIAS,
        edits=(("query", ..., 4.0), ("key", ..., -2.5), ("bias", ..., "min")),
        dtypes=("float16",),
        gradients=False,
    ),
    Case("logits-30", "large logits", **MASK, bias=(1, 2, 3, 5), scale=30.0, bias_scale=30.0),
    Case("logits-1e4", "large logits", smoke="outputs", scale=1e4, dtypes=("float32", "bfloat16")),
    Case("logits-all-large", "large logits", smoke="output", edits=(("query", ..., 20.0), ("key", ..., 10.0))),
    # The sum of products overflows float16, unless the query is divided first.
    Case(
        "scale-first",
        "large logits",
        smoke="output",
        query=(2, 3, 2, 64),
        key=(2, 5, 2, 64),
        dtypes=("float16",),
        edits=(
            ("query", ..., 0.0),
            ("query", KEY_0, 80.0),
            ("key", ..., 1000.0),
            ("key", (..., 1, slice(None), 0), 999.0),
        ),
    ),
    Case("queries-grown-by-bias", smoke="", query=(2, 1, 2, 4), bias=(2, 1, 3, 5), **GROWTH),
    Case("batch-grown-by-bias", smoke="", query=(1, 3, 2, 4), key=(1, 5, 2, 4), bias=(4, 1, 3, 5), **GROWTH),
    Case("dropout-mask", "dropout", smoke="output", dropout=0.5, v_depth=5, edits=ONE_HOT),
    Case(
        "dropout-mask-per-head",
        "dropout",
        smoke="output",
        dropout=0.5,
        broadcast_dropout=False,
        v_depth=5,
        edits=ONE_HOT,
    ),
    Case("dropout-no-batch", "dropout", smoke="", query=(3, 2, 4), key=(5, 2, 4), dropout=0.1),
    Case("dropout-and-bias", "dropout", smoke="", dropout=0.1, **MASK, **BIAS),
    Case("dropout-hidden-row", "dropout", smoke="output", dropout=0.5, **MASK, edits=HIDE_ROW_0),
    Case(
        "dropout-rate-1",
        "dropout",
        dropout=1.0,
        moot=True,
        extra=("dropout rate 1",),
        dtypes=("float32",),
        gradients=False,
    ),
    Case("deterministic", "dropout", smoke="output", dropout=0.5, options=(("deterministic", True),)),
    Case("wide-bias", "dtypes", **WIDE_BIAS, dtypes=("bfloat16", "float16")),
    # A bias that 16 bits cannot hold.
    Case(
        "wide-bias-fine",
        "dtypes",
        smoke="outputs",
        **WIDE_BIAS,
        edits=(("bias", ..., 1000.0), ("bias", KEY_0, 1000.9)),
        dtypes=("bfloat16", "float16"),
    ),
    Case("float64", "dtypes", **MASK, bias=(1, 2, 3, 5), dtypes=("float64",)),
    Case("float64-depth-24", "dtypes", smoke="output", query=(2, 3, 2, 24), key=(2, 5, 2, 24), dtypes=("float64",)),
    Case("integers", "dtypes", dtypes=("int32",), compute="float32", gradients=False),
    Case("booleans", "dtypes", dtypes=("bool",), compute="float32", gradients=False),
    Case(
        "float16-and-bfloat16",
        "dtypes",
        smoke="output",
        dtypes=("float16",),
        also=(("key", "bfloat16"),),
        compute="float32",
    ),
    Case("bfloat16-and-float32", "dtypes", dtypes=("bfloat16",), also=(("value", "float32"),), compute="float32"),
    Case("float16-and-integers", "dtypes", dtypes=("float16",), also=(("value", "int32"),), gradients=False),
    Case(
        "dtype",
        "dtypes",
        smoke="outputs",
        options=(("dtype", "float32"),),
        dtypes=("float16", "bfloat16"),
        compute="float32",
    ),
    Case(
        "weights", "rounding", smoke="outputs", v_depth=5, edits=(*ONE_PRODUCT, *ONE_HOT), gradients=False, exact=True
    ),
    Case(
        "weights-of-depth-96",
        "rounding",
        smoke="output",
        query=(2, 3, 2, 96),
        key=(2, 5, 2, 96),
        v_depth=5,
        edits=(*ONE_PRODUCT, *ONE_HOT),
        dtypes=("bfloat16", "float16"),
        exact=True,
    ),
    Case(
        "weights-dropped", "rounding", smoke="output", v_depth=5, edits=(*ONE_PRODUCT, *ONE_HOT), dropout=0.1, **NARROW
    ),
    Case("sums-of-weights", "rounding", edits=(*ONE_PRODUCT, ("value", ..., 1.0)), **NARROW),
    # 70000 equal keys: in float16 the sum of exponentials overflows.
    Case(
        "sum-overflow",
        "rounding",
        query=(1, 1, 1),
        key=(70000, 1, 1),
        v_depth=1,
        dtypes=("float16",),
        edits=(BIAS_ALONE, ("value", ..., 1.0)),
        gradients=False,
    ),
)
ERRORS = tuple(  # what Flax refuses
    replace(case, group="errors", dtypes=("float32",), gradients=False)
    for case in (
        Case("ranks-differ", key=(5, 2, 4), error="AssertionError"),
        Case("batches-differ", key=(1, 5, 2, 4), error="AssertionError"),
        Case("heads-differ", query=(2, 3, 3, 4), error="AssertionError"),
        Case("kv-lengths-differ", value=(2, 6, 2, 4), error="AssertionError"),
        Case("depths-differ", key=(2, 5, 2, 3), v_depth=4, error="AssertionError"),
        Case("bias-does-not-fit", bias=(4,), error="ValueError"),
        Case("mask-does-not-fit", mask=(4,), error="ValueError"),
    )
)


def _full() -> Iterator[Case]:
    """Every broadcast form of mask and bias, ragged lengths, depths, sizes of logits, rates of dropout."""
    for rank in range(5):
        for shape in product(*((1, size) for size in (2, 2, 3, 5)[4 - rank :])):
            name = "x".join(map(str, shape)) or "scalar"
            yield Case(f"mask-{name}", "mask" if shape[-1:] > (1,) else "hidden rows", mask=shape)
            yield Case(f"bias-{name}", "bias", bias=shape)
    for q_length, kv_length in ((33, 47), (1, 130), (130, 1), (127, 129), (64, 256)):
        shapes: dict[str, Any] = {"query": (2, q_length, 2, 8), "key": (2, kv_length, 2, 8), "v_depth": 8}
        name, hidden = f"{q_length}x{kv_length}", (2, 1, q_length, kv_length)
        yield Case(f"lengths-{name}", "lengths", **shapes)
        yield Case(f"lengths-{name}-hidden-row", "hidden rows", **shapes, mask=hidden, edits=HIDE_ROW_0)
        yield Case(f"lengths-{name}-bias", "bias", **shapes, bias=(1, 2, q_length, kv_length), mask=hidden)
        yield Case(f"lengths-{name}-dropout", "dropout", **shapes, dropout=0.2, broadcast_dropout=False)
        yield Case(f"lengths-{name}-logits-100", "large logits", **shapes, scale=100.0)
    for depth in (1, 3, 8, 48, 80, 128):
        yield Case(f"depth-{depth}", "depth", query=(2, 3, 2, depth), key=(2, 5, 2, depth), v_depth=depth)
    for scale in (3.0, 1e2, 1e3):
        yield Case(f"logits-{scale:g}", "large logits", scale=scale, **MASK)
    for rate in (1e-3, 0.25, 0.75, 0.999):
        yield Case(f"dropout-rate-{rate}", "dropout", dropout=rate)
    for batch in ((), (1,), (3, 2), (1, 2, 2)):
        shapes = {"query": (*batch, 6, 3, 4), "key": (*batch, 7, 3, 4)}
        for broadcast in (True, False):
            name = f"dropout-{len(batch)}-batch-{'shared' if broadcast else 'per-head'}"
            yield Case(name, "dropout", **shapes, dropout=0.5, broadcast_dropout=broadcast)


CASES = FORMS + CORNERS + ERRORS + tuple(replace(case, smoke="") for case in _full()) + BEYOND_CASES
