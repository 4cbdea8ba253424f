"""ONNX models through ndonnx: traced with unknown lengths, run by onnxruntime, held against Flax."""

from dataclasses import replace

import ndonnx as ndx
import numpy as np
import onnxruntime
import pytest

import anyattention as aa
from anyattention import masks
from anyattention_conformance import FORMS, flax_attention, within_c2

# The axes whose sizes must be known when the model is traced, by the ids of the cases; what happens otherwise; why.
FAILS = onnxruntime.capi.onnxruntime_pybind11_state.Fail
KNOWN = {
    "keys-grown-by-bias": ({"kv_length"}, FAILS, "a single key is summed over, as in einsum: another program"),
    "dropout": ({"q_length", "kv_length"}, ValueError, "the number of random bits is part of the program"),
    "dropout-everywhere": (
        {"batch", "q_length", "kv_length"},
        ValueError,
        "the number of random bits is part of the program",
    ),
}


def axes_of(name, rank):
    """Names of the axes; those of bias and mask are only unknown, since any may be broadcast."""
    if name in ("bias", "mask"):
        return (None,) * rank
    lead = ("batch", "more")[: rank - 3]
    return (*lead, "q_length" if name == "query" else "kv_length", "heads", "depth")


def signature(arguments, known=()):
    """The arguments with (shape, dtype) for each array; heads, depth and the axes in `known` have sizes in it."""
    known = {"heads", "depth", *known}

    def of(name, x):
        axes = axes_of(name, x.ndim)
        return tuple(size if axis in known else axis for axis, size in zip(axes, x.shape, strict=True)), str(x.dtype)

    return {
        name: of(name, x) if isinstance(x, np.ndarray) and name != "dropout_rng" else x for name, x in arguments.items()
    }


def trace(plan):
    """The arguments with a placeholder for each array, and those placeholders alone."""
    inputs = {
        name: ndx.argument(shape=x[0], dtype=getattr(ndx, x[1])) for name, x in plan.items() if isinstance(x, tuple)
    }
    return plan | inputs, inputs


MODELS = {}


def export(arguments, known=()):
    """A function from NumPy arguments to the answer of an exported model, the same for all of one signature."""
    plan = signature(arguments, known)
    if repr(plan) not in MODELS:
        traced, inputs = trace(plan)
        model = ndx.build(inputs, {"output": aa.dot_product_attention(**traced)})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # raising is enough; it also warns that it folds no constants in float16
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        MODELS[repr(plan)] = session
    session = MODELS[repr(plan)]
    names = [x.name for x in session.get_inputs()]
    return lambda arguments: session.run(None, {name: arguments[name] for name in names})[0]


def longer(case):
    """The case with one more in the batch, one more query and one more key."""

    def grow(shape, old):
        return shape and tuple(size + (size == old.get(axis - len(shape), -1)) for axis, size in enumerate(shape))

    batch = {-4: case.query[-4]} if len(case.query) == 4 else {}
    q, k = case.query[-3], case.key[-3]
    weights = {**batch, -2: q, -1: k}
    return replace(
        case,
        query=grow(case.query, {**batch, -3: q}),
        key=grow(case.key, {**batch, -3: k}),
        bias=grow(case.bias, weights),
        mask=grow(case.mask, weights),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_model_matches_flax(case, dtype):
    known, *_ = KNOWN.get(case.id, ((),))
    run = export(case.inputs(dtype), known)
    for each in (case,) if known or dtype == "float16" else (case, longer(case)):
        arguments = each.inputs(dtype)
        assert not within_c2(run(arguments), flax_attention(**arguments), arguments, dtype)


@pytest.mark.parametrize("case", [case for case in FORMS if case.id in KNOWN], ids=lambda case: case.id)
def test_no_size_is_known_without_need(case):
    arguments = case.inputs()
    known, error, _ = KNOWN[case.id]
    for axis in known:
        with pytest.raises(error):
            export(arguments, known - {axis})(arguments)


def inputs(batch, q_length, kv_length, heads=2, kv_heads=2, dtype="float32"):
    random = np.random.default_rng(q_length)
    shapes = {"query": (q_length, heads, 4), "key": (kv_length, kv_heads, 4), "value": (kv_length, kv_heads, 5)}
    return {name: random.standard_normal((batch, *shape)).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("guests", "kv_heads", "known"),
    [
        ((), 4, ()),
        (("mask", "bias"), 2, ()),
        ((), 4, {"q_length"}),
        ((), 4, {"kv_length"}),
    ],
    ids=["alone", "grouped heads, mask and bias", "known q_length", "known kv_length"],
)
def test_causal_model_at_several_lengths(guests, kv_heads, known):
    def arguments(*sizes):
        result = inputs(*sizes, heads=4, kv_heads=kv_heads)
        random = np.random.default_rng(1)
        result |= {"mask": random.random(sizes[1:]) < 0.7} if "mask" in guests else {}
        return result | ({"bias": random.standard_normal(sizes[1:], np.float32)} if "bias" in guests else {})

    sizes = [(2, 3, 5), (1, 5, 3), (3, 1, 4), (2, 3, 1), (2, 0, 3), (0, 3, 3)]
    if known:
        sizes = [s for s in sizes if s[1 if "q_length" in known else 2] == 3]
    run = export(arguments(*sizes[0]) | {"is_causal": True}, known)
    for size in sizes:
        given = arguments(*size)
        causal = np.tri(*size[1:], dtype=bool)
        expected = given | {"mask": causal & given.get("mask", True)}
        expected |= {name: np.repeat(given[name], 4 // kv_heads, axis=2) for name in ("key", "value")}
        assert not within_c2(run(given), flax_attention(**expected), expected, "float32"), size


def test_known_sizes_stay_known():
    arguments, _ = trace(signature(inputs(2, 3, 5, heads=4, kv_heads=2)))
    assert aa.dot_product_attention(**arguments).shape == (None, None, 4, 5)


WORDS = {  # options of a call, of a model's inputs
    "scale": lambda given: {"scale": -0.3},
    "soft cap": lambda given: {"logits_soft_cap": 1.5},
    "sinks": lambda given: {"sinks": given["sinks"]},
    "NumPy's sinks": lambda given: {"sinks": np.linspace(-1, 1, 4, dtype=np.float32)},
    "sinks of each query": lambda given: {"sinks": given["row_sinks"]},
    "window": lambda given: {"mask": masks.LocalMask(2, 1)},
    "offset": lambda given: {"mask": masks.CausalMask(-1)},
    "lengths": lambda given: {"mask": masks.LengthMask(given["lengths"])},
    "segments": lambda given: {"mask": masks.SegmentMask(given["query_ids"], given["kv_ids"])},
    "causal, window": lambda given: {"is_causal": True, "mask": masks.LocalMask(1, 1) | ~masks.CausalMask(2)},
    "all": lambda given: {
        **{"is_causal": True, "scale": 0.3, "logits_soft_cap": 1.5, "sinks": given["sinks"]},
        **{"bias": given["bias"], "mask": masks.LengthMask(given["lengths"])},
    },
}


def words(q_length, kv_length):
    random = np.random.default_rng(0)
    return inputs(7, q_length, kv_length, heads=4, kv_heads=2) | {
        "sinks": random.standard_normal(4).astype(np.float32),
        "row_sinks": random.standard_normal((7, 4, q_length)).astype(np.float32),
        "bias": random.standard_normal((4, 1, kv_length)).astype(np.float32),
        "lengths": np.array([kv_length - 1, 0, 1, 2, 3, 9, 1]),
        "query_ids": np.arange(7 * q_length).reshape(7, q_length) // 2,
        "kv_ids": np.arange(7 * kv_length).reshape(7, kv_length) // 3,
    }


def every_word(given):
    """All calls on these arrays, of NumPy or traced, by exact."""
    arrays = [given[name] for name in ("query", "key", "value")]
    return {f"with {name}": aa.dot_product_attention(*arrays, **options(given)) for name, options in WORDS.items()}


@pytest.mark.parametrize("known", [False, True], ids=["unknown sizes", "known sizes"])
def test_every_word(known):
    """In one model, against float64: all that is beyond Flax, and masks by rule, of lengths that are not known too."""
    sizes = {7: "batch", 3: "q_length", 6: "kv_length"}  # 2, 4 and 5 are heads and depths
    traced = {}
    for name, x in words(3, 6).items():
        shape = x.shape if known else tuple(sizes.get(size, size) for size in x.shape)
        traced[name] = ndx.argument(shape=shape, dtype=getattr(ndx, str(x.dtype)))
    model = ndx.build(traced, every_word(traced))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for lengths in ((3, 6),) if known else ((3, 6), (6, 4), (1, 9)):
        given = words(*lengths)
        wide = {name: x.astype("float64") if x.dtype.kind == "f" else x for name, x in given.items()}
        for name, wanted in every_word(wide).items():
            (found,) = session.run([name], given)
            np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=name)


EAGER = {"bias", "mask", "mask-float", "mask-and-bias", "keys-grown-by-bias", "kv-length-0"}


@pytest.mark.parametrize("case", [case for case in FORMS if case.id in EAGER], ids=lambda case: case.id)
def test_arrays_with_values_beside_numpy_guests(case):
    arguments = case.inputs()
    arrays = {name: ndx.asarray(arguments[name]) for name in ("query", "key", "value")}
    actual = aa.dot_product_attention(**arguments | arrays)
    assert isinstance(actual, ndx.Array)
    assert not within_c2(actual.unwrap_numpy(), flax_attention(**arguments), arguments, "float32")


# What ndonnx lacks, or a model cannot hold: each is refused when it is traced. Arguments, then the error.
UNKNOWN = ("batch", "length", 2, 4)
LACKING = {
    "unknown depth: its root is part of the model": (
        (("batch", "length", 2, "depth"), "float32", {}),
        (ValueError, "known depth"),
    ),
    "bfloat16: ndonnx has none": ((UNKNOWN, "float32", {"dtype": "bfloat16"}), (TypeError, "no dtype bfloat16")),
    "complex: ndonnx has none": ((UNKNOWN, "float32", {"dtype": "complex64"}), (TypeError, "no dtype complex64")),
    "nullable dtypes: Flax has none": ((UNKNOWN, "nfloat32", {}), (TypeError, "cannot compute with dtypes nfloat32")),
}


@pytest.mark.parametrize("what", LACKING)
def test_refuses_what_it_lacks(what):
    (shape, dtype, options), (error, message) = LACKING[what]
    x = ndx.argument(shape=shape, dtype=getattr(ndx, dtype))
    with pytest.raises(error, match=message):
        aa.dot_product_attention(x, x, x, **options)
