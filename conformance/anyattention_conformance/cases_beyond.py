"""The cases of what Flax lacks: scale, soft cap, sinks, grouped heads, offsets and windows, alone and with the rest.

They are asked of targets that declare the words they need (`Claims.supports`).
"""

from dataclasses import replace
from typing import Any

import numpy as np

from anyattention_conformance.case import ONE_HOT, Case, Edit

MASK: dict[str, Any] = {"mask": (2, 1, 3, 5)}
BIAS: dict[str, Any] = {"bias": (2, 1, 3, 5)}
HIDE_ROW_0: tuple[Edit, ...] = (("mask", (..., 0, slice(None)), False),)
# Logits are one product each, so that no order of summation matters.
ONE_PRODUCT: tuple[Edit, ...] = (("query", (..., slice(1, None)), 0.0), ("query", (..., 0), 2.75))
NARROW: dict[str, Any] = {"dtypes": ("bfloat16", "float16"), "gradients": False, "exact": True}
LONG: dict[str, Any] = {"query": (2, 33, 2, 16), "key": (2, 47, 2, 16), "v_depth": 16}
GROUPED: dict[str, Any] = {"query": (2, 3, 4, 4)}  # two query heads for each key head


def scaled(scale: float) -> dict[str, Any]:
    """The parameter `scale`."""
    return {"options": (("scale", scale),)}


def capped(cap: float, scale: float | None = None) -> dict[str, Any]:
    """The parameter `logits_soft_cap`, and `scale` beside it."""
    return {"options": (("logits_soft_cap", cap), *(() if scale is None else (("scale", scale),)))}


SCALE = (
    Case("scale", "scale", **scaled(0.3)),
    Case("scale-1", "scale", smoke="", **scaled(1.0)),
    Case("scale-0", "scale", smoke="gradients", **scaled(0.0)),
    Case("scale-negative", "scale", smoke="gradients", **scaled(-0.7)),
    Case("scale-20", "scale", smoke="", **scaled(20.0)),
    Case("scale-300", "scale", smoke="", **LONG, **scaled(300.0)),
    Case("scale-bias-and-mask", "scale", smoke="gradients", **MASK, bias=(1, 2, 3, 5), **scaled(0.7)),
    Case("scale-value-depth", "scale", smoke="", v_depth=7, **scaled(0.7)),
    Case("scale-long", "scale", smoke="", **LONG, **scaled(0.1)),
    Case("scale-hidden-row", "scale", smoke="", **MASK, edits=HIDE_ROW_0, **scaled(0.7)),
    Case("scale-dropout", "scale", smoke="output", dropout=0.3, **scaled(0.7)),
    # 0.3 is not exact in 16 bits, and the query is multiplied before the product.
    Case("scale-weights", "scale", smoke="output", v_depth=5, edits=(*ONE_PRODUCT, *ONE_HOT), **NARROW, **scaled(0.3)),
    # The products alone are beyond float16.
    Case(
        "scale-before-the-product",
        "scale",
        smoke="output",
        query=(2, 3, 2, 8),
        key=(2, 5, 2, 8),
        edits=(
            ("query", ..., 0.0),
            ("query", (..., 0), 80.0),
            ("key", ..., 1000.0),
            ("key", (..., 1, slice(None), 0), 999.0),
        ),
        dtypes=("float16",),
        **scaled(0.05),
    ),
    Case("scale-float64", "scale", smoke="", dtypes=("float64",), **scaled(0.3)),
)
SOFT_CAP = (
    Case("soft-cap", "soft cap", scale=3.0, **capped(1.5)),
    Case("soft-cap-50", "soft cap", smoke="gradients", **capped(50.0)),
    Case("soft-cap-saturated", "soft cap", smoke="gradients", scale=30.0, **capped(5.0)),
    Case("soft-cap-and-bias", "soft cap", smoke="gradients", **BIAS, bias_scale=3.0, **capped(2.0)),
    Case("soft-cap-and-mask", "soft cap", smoke="gradients", **MASK, **capped(2.0)),
    Case("soft-cap-bias-and-mask", "soft cap", smoke="", **MASK, bias=(1, 2, 3, 5), **capped(2.0)),
    Case("soft-cap-hidden-row", "soft cap", smoke="", **MASK, edits=HIDE_ROW_0, **capped(2.0)),
    Case("soft-cap-and-scale", "soft cap", smoke="gradients", scale=3.0, **capped(2.0, 0.3)),
    Case("soft-cap-dropout", "soft cap", smoke="", dropout=0.3, **capped(2.0)),
    Case("soft-cap-long", "soft cap", smoke="output", **LONG, scale=10.0, **capped(20.0)),
    Case(
        "soft-cap-weights",
        "soft cap",
        smoke="output",
        v_depth=5,
        edits=(*ONE_PRODUCT, *ONE_HOT),
        **NARROW,
        **capped(1.5),
    ),
    Case("soft-cap-float64", "soft cap", smoke="", scale=3.0, dtypes=("float64",), **capped(1.5)),
)
SINKS = (
    Case("sinks", "sinks", smoke="gradients", sinks=(2,)),
    Case("sinks-0", "sinks", smoke="", sinks=(2,), edits=(("sinks", ..., 0.0),)),
    # exp(12) is beyond float16.
    Case("sinks-of-all-sizes", "sinks", sinks=(2,), edits=(("sinks", 0, -12.0), ("sinks", 1, 12.0))),
    Case("sinks-low", "sinks", smoke="output", sinks=(2,), edits=(("sinks", ..., -1e30),)),
    Case("sinks-large", "sinks", smoke="", sinks=(2,), edits=(("sinks", ..., 40.0),)),
    Case("sinks-far-above", "sinks", smoke="", sinks=(2,), edits=(("sinks", ..., 1000.0),)),
    Case("sinks-of-each-entry", "sinks", smoke="", sinks=(2, 2, 1)),
    Case("sinks-of-each-query", "sinks", smoke="gradients", sinks=(2, 2, 3)),
    Case("sinks-of-heads-and-queries", "sinks", smoke="", sinks=(2, 3)),
    Case("sinks-and-bias", "sinks", smoke="", **BIAS, bias_scale=3.0, sinks=(2,)),
    Case("sinks-and-mask", "sinks", smoke="gradients", **MASK, sinks=(2,)),
    Case("sinks-hidden-row", "sinks", smoke="gradients", **MASK, edits=HIDE_ROW_0, sinks=(2,)),
    Case("sinks-dropout", "sinks", smoke="gradients", dropout=0.3, sinks=(2,)),
    Case("sinks-one-key", "sinks", smoke="", key=(2, 1, 2, 4), sinks=(2,)),
    Case("sinks-no-keys", "sinks", smoke="output", key=(2, 0, 2, 4), sinks=(2,)),
    Case("sinks-long", "sinks", smoke="", **LONG, scale=3.0, sinks=(2,)),
    Case("sinks-large-logits", "sinks", smoke="output", **LONG, scale=30.0, sinks=(2,)),
    Case("sinks-cap-and-scale", "sinks", **MASK, bias=(1, 2, 3, 5), sinks=(2,), **capped(2.0, 0.7)),
    Case("sinks-no-batch", "sinks", smoke="", query=(3, 2, 4), key=(5, 2, 4), sinks=(2,)),
    Case("sinks-float64", "sinks", smoke="", sinks=(2,), dtypes=("float64",)),
)
GROUPED_HEADS = (
    Case("grouped-heads", "grouped heads", smoke="gradients", **GROUPED),
    Case("grouped-heads-of-one", "grouped heads", smoke="", query=(2, 3, 4, 4), key=(2, 5, 1, 4)),
    Case("grouped-bias-and-mask", "grouped heads", smoke="gradients", **GROUPED, bias=(2, 4, 3, 5), mask=(1, 4, 3, 5)),
    Case("grouped-dropout", "grouped heads", smoke="output", **GROUPED, dropout=0.5, broadcast_dropout=False),
    Case("grouped-scale", "grouped heads", smoke="", **GROUPED, **scaled(0.3)),
    Case("grouped-soft-cap", "grouped heads", smoke="", **GROUPED, scale=3.0, **capped(1.5)),
    Case("grouped-sinks", "grouped heads", smoke="gradients", **GROUPED, sinks=(4,)),
    Case("grouped-all", "grouped heads", smoke="gradients", **GROUPED, **MASK, sinks=(4,), **capped(2.0, 0.7)),
    Case("grouped-offset", "grouped heads", smoke="", **GROUPED, offset=(0, 3)),
)
# There are two keys more than queries: an offset of 2 is what those mean that align the ends.
OFFSETS = (
    Case("offset", "offsets", smoke="gradients", offset=1),
    Case("offset-0", "offsets", smoke="", offset=0),
    Case("offset-3", "offsets", smoke="", offset=3),
    Case("offset-array", "offsets", smoke="", offset=np.int32(1)),
    Case("offset-of-each-entry", "offsets", smoke="gradients", offset=(0, 3)),
    Case("offset-decode", "offsets", smoke="output", query=(2, 1, 2, 4), offset=(3, 1)),
    Case("offset-negative", "offsets", smoke="gradients", offset=-1),
    Case("offset-before-all", "offsets", smoke="", offset=-9),
    Case("offset-behind-all", "offsets", smoke="", offset=9),
    Case("offset-at-both-ends", "offsets", smoke="output", offset=(-9, 9)),
    Case("offset-bias-and-mask", "offsets", smoke="gradients", mask=(2, 1, 1, 5), bias=(1, 2, 3, 5), offset=1),
    Case("offset-dropout", "offsets", smoke="", dropout=0.3, offset=1),
    Case("offset-sinks-cap-and-scale", "offsets", smoke="gradients", sinks=(2,), offset=(0, 3), **capped(2.0, 0.7)),
    Case("offset-no-batch", "offsets", smoke="", query=(3, 2, 4), key=(5, 2, 4), offset=1),
    Case(
        "offset-two-batch",
        "offsets",
        smoke="",
        query=(2, 1, 3, 2, 4),
        key=(2, 1, 5, 2, 4),
        offset=((0,), (3,)),
    ),
    Case("offset-long", "offsets", smoke="output", **LONG, offset=(3, 9)),
)
WINDOW = (
    Case("window", "offsets", smoke="gradients", window=(1, 1)),
    Case("window-left", "offsets", smoke="output", window=(1, 0)),
    Case("window-offset", "offsets", smoke="gradients", window=(2, 0), offset=1),
    Case("window-offset-both-sides", "offsets", smoke="output", window=(1, 1), offset=2),
    Case("window-of-each-entry", "offsets", smoke="", window=(1, 0), offset=(0, 3)),
    Case("window-decode", "offsets", smoke="", query=(2, 1, 2, 4), window=(1, 0), offset=(3, 1)),
    Case("window-behind-all", "offsets", smoke="", window=(1, 0), offset=(1, 9)),
    Case("window-and-mask", "offsets", smoke="", mask=(2, 1, 1, 5), window=(2, 1), offset=1),
    Case("window-sinks-and-cap", "offsets", smoke="", window=(1, 0), offset=1, sinks=(2,), **capped(2.0)),
    Case("window-long", "offsets", smoke="output", **LONG, window=(8, 0), offset=(0, 14)),
)
MISFITS = tuple(
    replace(case, group="errors", dtypes=("float32",), gradients=False, error="ValueError")
    for case in (
        Case("sinks-do-not-fit", sinks=(3,)),
        Case("offset-does-not-fit", offset=(0, 1, 2)),
    )
)
BEYOND_CASES = SCALE + SOFT_CAP + SINKS + GROUPED_HEADS + OFFSETS + WINDOW + MISFITS
