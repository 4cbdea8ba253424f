"""A case: one call of attention as data, with inputs from a seed, and whether ordinary models make such a call.

Inputs are drawn in NumPy's float64 and rounded once, so every framework sees the same bits.
"""

import importlib.util
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from anyattention_conformance.positions import dense

Array = Any
Edit = tuple[str, Any, Any]  # array, index, value; "min" is the smallest finite number of the compute dtype
ALL = ("float32", "bfloat16", "float16")
LARGE = 30.0  # the scale of a query up to which the attentions of other libraries have Flax's numbers; not at 100
KEY = (0, 7)  # raw key data of every dropout
# Each key's value is a unit vector: the output is the weights.
ONE_HOT: tuple[Edit, ...] = (("value", ..., 0.0), *(("value", (..., k, slice(None), k), 1.0) for k in range(5)))

# The arguments that Flax lacks, with the word for each. They and grouped heads are asked of those that declare them.
ARGUMENTS = {
    "scale": "scale",
    "logits_soft_cap": "soft cap",
    "sinks": "sinks",
    "offset": "offsets",
    "window": "window",
}
BEYOND = frozenset({*ARGUMENTS.values(), "grouped heads"})

# What makes a case a corner, and why: a word of `Case.needs`, a group, or what `Case._marks` finds. On all other cases
# PyTorch's, MLX's, Keras's, Transformers', JAX's and flax.nnx's attentions have Flax's numbers, and declare nothing.
CORNERS = {
    "errors": "Flax refuses these shapes, so no model that runs passes them",
    "rounding": "it is made to show rounding, and not as a model's call",
    "fill": "it shows only where a bias is as low as what replaces hidden logits",
    "huge logits": "logits this large do not occur in ordinary models",
    "depth 0": "no model has heads of depth 0",
    "empty": "no model attends with no queries or to no keys",
    "no batch": "models have a batch axis",
    "several batch dimensions": "models have one batch axis",
    "value depth": "in most models values are as deep as keys",
    "growth": "bias and mask of ordinary models are no larger than the logits",
    "hidden rows": "a mask of an ordinary model leaves each query a key to see",
    "infinities": "infinities and NaN are not what ordinary models compute with",
    "mixed dtypes": "ordinary models pass query, key and value in one dtype",
    "wide bias": "ordinary models pass the bias in the dtype of the query",
    "bool bias": "ordinary models pass a boolean array as mask, not as bias",
    "bool inputs": "models compute in floating point",
    "integer inputs": "models compute in floating point",
    "double precision": "models compute in float32, bfloat16 or float16",
    "dtype": "few models ask for a compute dtype other than that of the arrays",
    "force_fp32_for_softmax": "few models ask for a softmax in float32",
    "dropout rate 1": "no model drops every weight",
    "few axes": "bias and mask of ordinary models have axes for queries and keys",
    "no usual scale": "models scale by a positive number",
    "no usual sinks": "sinks of ordinary models are no larger than their logits",
    "sinks of each query": "models have one sink for each head",
    "other numbers": "masks of ordinary models hold zeros and ones",
}


@dataclass(frozen=True)
class Case:
    """One call of attention, in each of its dtypes. Shapes are ``[batch..., length, heads, depth]``.

    `also` gives arrays a dtype other than the case's; `compute` is what Flax then computes in, where it is another one.
    `edits` are made after the draw. `error` is what Flax raises. `extra` adds to `needs` what shapes do not show.
    `exact`: no order of summation changes the answer; targets that claim Flax's steps have its bits in 16-bit dtypes.
    `sinks` is a shape; `offset` an integer, or an array of integers as a NumPy scalar or a tuple: see `positions.seen`.
    `moot`: Flax's answer depends on its compiler, so that only targets which claim its very steps are asked.
    """

    id: str
    group: str = "layout"
    query: tuple[int, ...] = (2, 3, 2, 4)
    key: tuple[int, ...] = (2, 5, 2, 4)
    v_depth: int = 4
    value: tuple[int, ...] | None = None  # where it is not that of key with `v_depth`
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    mask_dtype: str = "bool"
    sinks: tuple[int, ...] | None = None
    offset: Any = None
    window: tuple[int, int] | None = None
    scale: float = 1.0  # of query
    bias_scale: float = 1.0
    edits: tuple[Edit, ...] = ()
    dropout: float = 0.0
    broadcast_dropout: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    dtypes: tuple[str, ...] = ALL
    also: tuple[tuple[str, str], ...] = ()
    compute: str | None = None
    gradients: bool = True
    error: str = ""
    moot: bool = False
    exact: bool = False
    extra: tuple[str, ...] = ()
    smoke: str = "whole"  # what the smoke tier asks for, see `runs`

    def __hash__(self) -> int:
        return hash(self.id)  # edits have slices

    @property
    def seed(self) -> int:
        """The seed of the inputs."""
        return zlib.crc32(self.id.encode())

    @property
    def size(self) -> int:
        """The elements of query, key and value together."""
        return int(sum(np.prod(shape) for shape in (self.query, self.key, self._value)))

    @property
    def _value(self) -> tuple[int, ...]:
        return self.value or (*self.key[:-1], self.v_depth)

    @property
    def fitting(self) -> "Case":
        """The same call with shapes that fit, where Flax refuses these."""
        logits = (2, 1, 3, 5)
        bias, mask = (logits if shape else None for shape in (self.bias, self.mask))
        return Case(f"{self.id}-mended", bias=bias, mask=mask, dtypes=self.dtypes, gradients=False)

    @cached_property
    def needs(self) -> frozenset[str]:
        """What a function has to support to be asked, besides query, key and value: the words of a claim."""
        found = {
            "bias": self.bias is not None,
            "mask": self.mask is not None,
            "dropout": self.dropout,
            "errors": self.error,
        }
        found |= {
            "bias and mask": self.bias is not None and self.mask is not None,
            "per-head dropout": not self.broadcast_dropout,
        }
        found |= {ARGUMENTS.get(name, name): x is not None and x is not False for name, x in self._given.items()}
        found |= {"grouped heads": not self.error and self.query[-2] != self.key[-2]}
        found |= {"sinks of each query": self.sinks is not None and len(self.sinks) > 1}
        found |= {"offset of each entry": np.ndim(self.offset) > 0}
        found |= {"non-boolean mask": self.mask is not None and self.mask_dtype != "bool"}
        found |= {"no batch": len(self.query) == 3, "several batch dimensions": len(self.query) > 4}
        found |= {"value depth": self._value[-1] != self.query[-1], "empty": 0 in (*self.query, *self._value)}
        found |= {"low-rank mask": self.mask is not None and len(self.mask) < len(self.query)}
        found |= {"low-rank bias": self.bias is not None and len(self.bias) < len(self.query)}
        found |= {"mixed dtypes": any(name != "bias" for name, _ in self.also), "depth 0": not self.query[-1]}
        found |= {"bool inputs": "bool" in self.dtypes, "integer inputs": "int32" in self.dtypes}
        return frozenset({name for name, value in found.items() if value} | set(self.extra))

    @property
    def _given(self) -> dict[str, Any]:
        """The arguments beside those that shapes give."""
        return dict(self.options) | {"sinks": self.sinks, "offset": self.offset, "window": self.window}

    @cached_property
    def beyond(self) -> frozenset[str]:
        """What it needs that Flax lacks."""
        return self.needs & BEYOND

    @cached_property
    def corner(self) -> str:
        """Why this is a corner, in one sentence; empty if ordinary models make such calls."""
        return next((why for word, why in CORNERS.items() if word in self._marks), "")

    @property
    def _marks(self) -> frozenset[str]:
        """The words of `CORNERS` that may hold: what the case needs, its group, and what neither shows."""
        drawn = not {"query", "key"} & {name for name, *_ in self.edits}
        scales = [abs(x) for name, x in self.options if name == "scale"]
        found = {
            "double precision": "float64" in self.dtypes,
            "few axes": any(x is not None and len(x) < 2 for x in (self.bias, self.mask)),
            "other numbers": self.mask_dtype != "bool" and any(name == "mask" for name, *_ in self.edits),
            "rounding": self.exact,
            "huge logits": max(self.scale, self.bias_scale, *scales) > LARGE or not drawn,
            "hidden rows": self.mask is not None and (self.mask[-1:] == (1,) or any(map(_hides_rows, self.edits))),
            "no usual scale": self._given.get("scale", 1.0) <= 0,
            "no usual sinks": any(name == "sinks" and abs(value) > LARGE for name, _, value in self.edits),
        }
        if self.offset is not None or self.window is not None:
            found["hidden rows"] = not dense(self.inputs(self.dtypes[0]))["mask"].any(axis=-1).all()
        return self.needs | {self.group} | {word for word, holds in found.items() if holds}

    @property
    def shows_weights(self) -> bool:
        """Whether the output is the weights, so that a dropout mask can be read from it."""
        return self.edits[-len(ONE_HOT) :] == ONE_HOT

    def runs(self, tier: str) -> Iterator[tuple[str, bool]]:
        """The dtypes to run in, each with whether gradients are asked for.

        Every run costs a compiling library time. The smoke tier asks where `smoke` is "whole" for all dtypes, and in
        the first for gradients; for "outputs" in all dtypes; for "gradients" or the "output" in the first; else for
        nothing.
        """
        if tier == "full":
            yield from ((dtype, self.gradients) for dtype in self.dtypes)
        elif self.smoke:
            asked = self.gradients and self.smoke in ("whole", "gradients")
            dtypes = self.dtypes if self.smoke in ("whole", "outputs") else self.dtypes[:1]
            yield from ((dtype, asked and not i) for i, dtype in enumerate(dtypes))

    def available(self, dtype: str) -> bool:
        """Whether NumPy has the dtypes of a run here: bfloat16 is that of ml_dtypes."""
        narrow = "bfloat16" in (dtype, *(name for _, name in self.also))
        return not narrow or importlib.util.find_spec("ml_dtypes") is not None

    def compute_dtype(self, dtype: str) -> str:
        """What Flax computes in, which is also the dtype of the output unless an option says otherwise."""
        return self.compute or dtype

    def inputs(self, dtype: str = "float32", bias_dtype: str | None = None) -> dict[str, Any]:
        """The arguments, as NumPy arrays and Python values, by their names in Flax's signature."""
        random = np.random.default_rng(self.seed)
        dtypes = dict.fromkeys(("query", "key", "value", "bias", "sinks"), dtype) | dict(self.also)
        dtypes["bias"] = bias_dtype or dtypes["bias"]
        shapes = {"query": self.query, "key": self.key, "value": self._value}
        scales = {"query": self.scale, "bias": self.bias_scale}
        if self.bias is not None:
            shapes["bias"] = self.bias
        arguments: dict[str, Any] = {}
        for name, shape in shapes.items():
            x = np.asarray(random.standard_normal(shape) * scales.get(name, 1.0))
            arguments[name] = x > 0 if dtypes[name] == "bool" else np.rint(3 * x) if "int" in dtypes[name] else x
        if self.sinks is not None:
            arguments["sinks"] = random.standard_normal(self.sinks)
        if self.mask is not None:
            mask = np.asarray(random.random(self.mask) < 0.6)
            if mask.ndim and mask.shape[-1] > 1:
                mask[..., 0] |= ~mask.any(axis=-1)  # hidden rows are cases of their own
            arguments["mask"] = mask.astype(np.float64)
            dtypes["mask"] = self.mask_dtype
        for name, index, value in self.edits:
            arguments[name][index] = lowest(self.compute_dtype(dtype)) if value == "min" else value
        for name, x in arguments.items():
            arguments[name] = _rounded(x, dtypes[name])
        if self.dropout:
            arguments |= {
                "dropout_rate": self.dropout,
                "dropout_rng": np.asarray(KEY, dtype=np.uint32),
                "broadcast_dropout": self.broadcast_dropout,
            }
        if self.offset is not None:
            arguments["offset"] = self.offset if type(self.offset) is int else np.asarray(self.offset, np.int32)
        if self.window is not None:
            arguments["window"] = self.window
        return arguments | dict(self.options)

    def cotangent(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """What the gradients are taken with: a normal draw of the output's shape, in its dtype."""
        return np.random.default_rng(self.seed + 1).standard_normal(shape).astype(dtype)


def _hides_rows(edit: Edit) -> bool:
    name, index, value = edit
    return name == "mask" and value is False and (index is ... or index[-1] == slice(None))


def numpy_dtype(name: str) -> Any:
    """NumPy's dtype of this name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def lowest(dtype: str) -> float:
    """The smallest finite number of a floating-point dtype."""
    return -float.fromhex("0x1.fep127") if dtype == "bfloat16" else float(np.finfo(dtype).min)


def _rounded(x: Array, dtype: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(numpy_dtype(dtype))
