"""ONNX's Attention node as an engine: Flax's numbers wherever it serves, and a reason wherever it does not."""

import ndonnx as ndx
import numpy as np
import onnxruntime
import pytest

import anyattention as aa
from anyattention import masks
from anyattention_conformance import flax_attention

SIZES = {7: "batch", 3: "q_length", 6: "kv_length"}  # of the traced arrays; 2, 4, 5 and 8 are heads and depths
MASKS = {  # of a model's inputs; the arrays that they stand for at these lengths
    "none": lambda given: None,
    "array": lambda given: given["mask"],
    "array of each head": lambda given: given["head_mask"],
    "keys": lambda given: given["mask"][:1, :, :1, :],
    "queries": lambda given: given["mask"][..., :1],
    "causal": lambda given: masks.CausalMask(),
    "offset": lambda given: masks.CausalMask(-1),  # the first query sees nothing
    "window": lambda given: masks.LocalMask(1, 0),
    "lengths": lambda given: masks.LengthMask(given["lengths"]),
    "both": lambda given: masks.CausalMask(1) & given["mask"],
}


def arrays(batch=7, q_length=3, kv_length=6):
    random = np.random.default_rng(0)
    shapes = {"query": (q_length, 4, 8), "key": (kv_length, 2, 8), "value": (kv_length, 2, 5)}
    found = {name: random.standard_normal((batch, *shape), dtype=np.float32) for name, shape in shapes.items()}
    return found | {
        "mask": random.random((batch, 1, q_length, kv_length)) > 0.6,
        "head_mask": random.random((4, q_length, kv_length)) > 0.6,
        "lengths": np.arange(batch) % (kv_length + 1),
    }


def traced(given, known=False):
    def of(x):
        shape = x.shape if known else tuple(SIZES.get(size, size) for size in x.shape)
        return ndx.argument(shape=shape, dtype=getattr(ndx, str(x.dtype)))

    return {name: of(x) for name, x in given.items()}


def every_mask(given, **options):
    heads = [given[name] for name in ("query", "key", "value")]
    return {
        f"with {name}": aa.dot_product_attention(*heads, mask=mask(given), implementation="fused", **options)
        for name, mask in MASKS.items()
    }


def run(model, given):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [x.name for x in session.get_outputs()]
    outputs = session.run(names, {x.name: given[x.name] for x in session.get_inputs()})
    return dict(zip(names, outputs, strict=True))


def flax(given, mask, scale=8**-0.5):
    """Flax's answer, which has one head of keys for each of the query, and no masks by rule."""
    q, k, v = (given[name] for name in ("query", "key", "value"))
    lengths = q.shape[1], k.shape[1]
    mask = np.asarray(mask.to_array(*lengths)) if hasattr(mask, "to_array") else mask
    q, k, v = q * np.float32(scale * 8**0.5), np.repeat(k, 2, 2), np.repeat(v, 2, 2)
    return flax_attention(query=q, key=k, value=v, **{} if mask is None else {"mask": mask})


@pytest.mark.parametrize(("known", "options"), [(False, {"scale": 0.2}), (True, {})], ids=["unknown sizes", "known"])
def test_every_mask(known, options):
    """Rows that see nothing get the mean of all values, though ONNX gives them zero."""
    inputs = traced(arrays(), known)
    outputs = every_mask(inputs, **options)
    assert {x.shape for x in outputs.values()} == {(*((7, 3) if known else (None, None)), 4, 5)}
    model = ndx.build(inputs, outputs)
    assert [x.version for x in model.opset_import if not x.domain] == [23]
    assert sum(node.op_type == "Attention" for node in model.graph.node) == len(MASKS)
    for sizes in ((7, 3, 6),) if known else ((7, 3, 6), (2, 9, 4), (1, 1, 1)):
        given = arrays(*sizes)
        for name, output in run(model, given).items():
            mask = MASKS[name.removeprefix("with ")](given)
            np.testing.assert_allclose(output, flax(given, mask, **options), atol=2e-6, err_msg=name)


def test_hidden_padding_does_not_show():
    given = arrays()
    spoiled = given | {
        name: np.where(np.arange(6)[:, None, None] < 4, given[name], np.nan) for name in ("key", "value")
    }
    inputs = traced({name: x for name, x in given.items() if "mask" not in name})
    heads = [inputs[name] for name in ("query", "key", "value")]
    lengths = {"mask": masks.LengthMask(inputs["lengths"]), "implementation": "fused"}
    model = ndx.build(inputs, {"output": aa.dot_product_attention(*heads, **lengths)})
    given["lengths"] = spoiled["lengths"] = np.array([1, 2, 3, 4, 4, 1, 2])
    same = [
        run(model, x)["output"] for x in (given, {name: x.astype(given[name].dtype) for name, x in spoiled.items()})
    ]
    np.testing.assert_array_equal(*same)


def test_without_a_batch():
    given = {name: x[0] for name, x in arrays().items() if name in ("query", "key", "value")}
    inputs = traced(given)
    model = ndx.build(inputs, {"output": aa.dot_product_attention(**inputs, is_causal=True, implementation="fused")})
    causal = np.tri(3, 6, dtype=bool)
    wanted = flax({name: x[None] for name, x in given.items()}, causal)[0]
    np.testing.assert_allclose(run(model, given)["output"], wanted, atol=2e-6)


def test_it_is_smaller_than_exact():
    inputs = traced({name: x for name, x in arrays().items() if name in ("query", "key", "value")})
    sizes = {
        name: len(ndx.build(inputs, {"y": aa.dot_product_attention(**inputs, implementation=name)}).graph.node)
        for name in ("exact", "fused")
    }
    assert sizes["fused"] <= 10 < sizes["exact"] / 4


X = ndx.argument(shape=("batch", "length", 2, 4), dtype=ndx.float32)
REFUSED = {
    "onnxruntime gives zero to a row whose biases": {"bias": np.zeros(1, np.float32)},
    "two to four times as long as exact for a soft cap": {"logits_soft_cap": 1.0},
    "it has no sinks": {"sinks": np.zeros(2, np.float32)},
    "it has no dropout": {"dropout_rate": 0.5, "dropout_rng": aa.random.key(0)},
    "it takes no scale of zero or below": {"scale": -0.5},
    "there is no kernel for float64": {"dtype": "float64"},
    "the mask has axes, or known sizes, that query and key lack": {"mask": np.ones((1, 1, 2, 3, 3), bool)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_refuses(reason):
    with pytest.raises(NotImplementedError, match=f"onnx: .*{reason}"):
        aa.dot_product_attention(X, X, X, **REFUSED[reason], implementation="fused")


def test_refused_shapes():
    more, unknown, empty = (
        ndx.argument(shape=shape, dtype=ndx.float32)
        for shape in (("a", "b", "c", 2, 4), ("a", "b", None, 4), ("a", 0, 2, 4))
    )
    for x, reason in ((more, "one batch axis"), (unknown, "heads and depths are unknown"), (empty, "an axis is empty")):
        with pytest.raises(NotImplementedError, match=reason):
            aa.dot_product_attention(x, x, x, implementation="fused")


def test_none_stays_exact():
    """A model of opset 23 is for newer programs alone, so that it is made by name."""
    assert aa.explain(X, X, X).implementation == "exact"
    plan = aa.explain(X, X, X, implementation="fused")
    assert (plan.implementation, plan.engine) == ("fused", "onnx")
    assert "the model needs opset 23: onnxruntime 1.23 or later" in plan.reasons
