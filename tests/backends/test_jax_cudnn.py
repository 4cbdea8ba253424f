"""cuDNN without a GPU: what is chosen on a pretended one, and the calls of cuDNN in programs lowered for CUDA."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask
from anyattention_backends.jax import backend

LENGTHS = np.array([0, 100])


@pytest.fixture
def gpu(gpu_with_cudnn, monkeypatch):
    """For lowering too, not for running."""
    for name, answer in (
        ("check_cudnn_version", lambda: 91000),
        ("check_compute_capability", lambda capability: True),
        ("is_cuda_compute_capability_equal", lambda capability: False),
    ):
        monkeypatch.setattr(fused_attention_stablehlo, name, answer)


def shapes(*batch, q_length=256, kv_length=128, kv_heads=4, depth=64, v_depth=64, dtype="bfloat16"):
    each = (q_length, 4, depth), (kv_length, kv_heads, depth), (kv_length, kv_heads, v_depth)
    return [jax.ShapeDtypeStruct((*batch, *shape), dtype) for shape in each]


def attend(query, key, value, **kwargs):
    return aa.dot_product_attention(query, key, value, implementation="fused", **kwargs)


def gradients(query, key, value, **kwargs):
    return jax.grad(lambda *x: attend(*x, **kwargs).astype("float32").sum(), (0, 1, 2))(query, key, value)


def lowered(function, *arrays):
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r"@__cudnn\$(\w+)", text)
    found = re.findall(r"(?:mask_type|sliding_window_length): (\w+)", text.replace(r"\22", ""))
    return sorted(names), set(found)


@pytest.mark.parametrize(
    ("mask", "kind", "window"),
    [
        (None, "NO_MASK", "0"),
        (CausalMask(), "CAUSAL", "0"),
        (CausalMask() & LocalMask(200, 7), "CAUSAL", "201"),
        (LengthMask(LENGTHS), "PADDING", "0"),
        (LengthMask(LENGTHS) & CausalMask(), "PADDING_CAUSAL", "0"),
    ],
    ids=["none", "causal", "window", "lengths", "causal-lengths"],
)
def test_masks_are_flags(gpu, mask, kind, window):
    """Nothing is as large as the logits."""
    arrays = shapes(2) if window == "0" else shapes(2, kv_length=384)  # windows want as many keys as queries
    for function, names in ((attend, ["fmhaSoftmax"]), (gradients, ["fmhaSoftmax", "fmhaSoftmaxBackward"])):
        assert lowered(partial(function, mask=mask), *arrays) == (names, {kind, window})
        text = jax.jit(partial(function, mask=mask)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert not re.search(r"tensor<2x4x256x(128|384)x(bf16|i1)>", text)


@pytest.mark.parametrize(
    ("mask", "lengths", "kind", "window"),
    [
        (None, (301, 301), "NO_MASK", "0"),
        (None, (301, 128), "NO_MASK", "0"),
        (CausalMask(), (256, 129), "CAUSAL", "0"),
        (CausalMask() & LocalMask(200, 7), (301, 301), "CAUSAL", "201"),
        (LengthMask(LENGTHS), (256, 129), "PADDING", "0"),
        (LengthMask(LENGTHS, LENGTHS), (301, 301), "PADDING", "0"),
        (LengthMask(LENGTHS) & CausalMask(), (301, 128), "PADDING_CAUSAL", "0"),
    ],
    ids=["none", "queries", "causal", "window", "lengths", "both-lengths", "causal-lengths"],
)
def test_odd_lengths(gpu, mask, lengths, kind, window):
    """They are padded where there is a derivative, and cuDNN is told the lengths; an output alone has no copy."""
    arrays = shapes(2, q_length=lengths[0], kv_length=lengths[1], kv_heads=2)
    assert lowered(partial(attend, mask=mask), *arrays) == (["fmhaSoftmax"], {kind, window})
    text = jax.jit(partial(attend, mask=mask)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.pad" not in text
    names = ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    told = {"NO_MASK": "PADDING", "CAUSAL": "PADDING_CAUSAL"}.get(kind, kind)
    assert lowered(partial(gradients, mask=mask), *arrays) == (names, {told, window})
    assert [x.shape for x in jax.eval_shape(partial(gradients, mask=mask), *arrays)] == [x.shape for x in arrays]
    text = jax.jit(partial(gradients, mask=mask)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"dense<{length}> : tensor<i32>" in text for length in lengths)
    assert "dense<302> : tensor<i32>" not in text


def test_odd_lengths_mapped(gpu):
    arrays = shapes(2, q_length=301, kv_length=129)
    mapped = jax.vmap(gradients, in_axes=(0, None, None))
    found = lowered(mapped, jax.ShapeDtypeStruct((3, *arrays[0].shape), "bfloat16"), *arrays[1:])
    assert found == (["fmhaSoftmax", "fmhaSoftmaxBackward"], {"PADDING", "0"})


def test_arrays_are_a_bias(gpu):
    mask = np.random.default_rng(0).random((2, 1, 1, 128)) < 0.5
    assert lowered(partial(attend, mask=mask), *shapes(2))[0] == ["fmhaScaleBiasSoftmax"]
    names = ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
    assert lowered(partial(gradients, mask=mask), *shapes(2))[0] == names
    bias = jax.ShapeDtypeStruct((4, 256, 128), "bfloat16")

    def both(*x):
        return jax.grad(lambda *x: attend(*x[:3], bias=x[3]).astype("float32").sum(), (0, 3))(*x)

    assert lowered(both, *shapes(2), bias)[0] == names


@pytest.mark.parametrize(
    ("mask", "biased", "kind", "reason"),
    [
        (CausalMask(1), False, "NO_MASK", "of bands it has"),
        (LocalMask(200, 1), False, "NO_MASK", "of bands it has"),
        (LocalMask(130, 0), False, "NO_MASK", "windows need no more queries than keys"),
        (CausalMask(), True, "CAUSAL", ""),
        (SegmentMask(np.zeros(256, int), np.zeros(128, int)), False, "NO_MASK", "no segments"),
        (SegmentMask(np.zeros(256, int), np.zeros(128, int)) & CausalMask(), False, "CAUSAL", "no segments"),
        (LengthMask(LENGTHS), True, "NO_MASK", "no lengths beside"),
        (LengthMask(LENGTHS) & LocalMask(200, 0) & np.ones((256, 128)), False, "NO_MASK", "window beside lengths"),
        (~CausalMask() & CausalMask(3), False, "NO_MASK", "joined by &"),
    ],
    ids=str,
)
def test_masks_that_it_lacks_are_a_bias(gpu, mask, biased, kind, reason):
    """What is a flag stays one; `explain` says what is not."""
    arrays = shapes(2)
    call = {"mask": mask, "bias": jnp.zeros((256, 128), jnp.bfloat16) if biased else None}
    for function, names in (
        (attend, ["fmhaScaleBiasSoftmax"]),
        (gradients, ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]),
    ):
        assert lowered(partial(function, **call), *arrays) == (names, {kind, "0"})
    plans = []
    jax.eval_shape(lambda *x: plans.append(aa.explain(*x, **call, implementation="fused")), *arrays)
    arrays_of_pairs = [x for x in plans[0].reasons if "an array of 65536 elements" in x]
    assert bool(arrays_of_pairs) == bool(reason)
    assert not reason or any(reason in x for x in arrays_of_pairs)


def test_no_window_beside_a_bias(gpu):
    plans, bias = [], jnp.zeros((256, 384), jnp.bfloat16)
    explain = partial(aa.explain, bias=bias, mask=LocalMask(130, 0), implementation="fused")
    jax.eval_shape(lambda *x: plans.append(explain(*x)), *shapes(2, kv_length=384))
    assert "no window beside a bias" in str(plans[0])


@pytest.mark.parametrize(
    "options",
    [{"kv_heads": 2}, {"depth": 20, "v_depth": 20}, {"depth": 32, "v_depth": 80}, {"dtype": "float16"}],
    ids=["grouped", "depth", "v-depth", "float16"],
)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_shapes(gpu, batch, options):
    arrays = shapes(*batch, **options)
    assert lowered(attend, *arrays)[0] == ["fmhaSoftmax"]
    assert jax.eval_shape(attend, *arrays).shape == (*batch, 256, 4, arrays[2].shape[-1])
    assert [x.shape for x in jax.eval_shape(gradients, *arrays)] == [x.shape for x in arrays]


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, 0)], ids=str)
@pytest.mark.parametrize("function", [attend, gradients])
def test_vmap(gpu, function, axes):
    """Mapped over some arguments, which JAX's rule for cuDNN does not know."""
    mapped = jax.vmap(function, in_axes=axes)
    arrays = [shapes(3, 2)[i] if axis == 0 else shapes(2)[i] for i, axis in enumerate(axes)]
    assert "fmhaSoftmax" in lowered(mapped, *arrays)[0]
    lengths = jax.ShapeDtypeStruct((3, 2), "int32")
    by_length = jax.vmap(lambda n, *x: function(*x, mask=LengthMask(n)), in_axes=(0, *axes))
    assert "fmhaSoftmax" in lowered(by_length, lengths, *arrays)[0]


def test_what_is_chosen(gpu):
    """The rules of the plan for JAX on GPUs, row by row."""

    def plan(*arrays, **kwargs):
        found = []
        jax.eval_shape(lambda *x: found.append(aa.explain(*x, **kwargs)), *arrays)
        return found[0]

    large = shapes(2)
    assert (plan(*large).implementation, plan(*large).engine) == ("fused", "cudnn")
    assert plan(*shapes(2, q_length=8, kv_length=8)).implementation == "exact"
    assert plan(*large, dropout_rng=jax.random.key(0), dropout_rate=0.1).implementation == "exact"
    longest = shapes(16, q_length=16384, kv_length=16384)
    assert plan(*longest).implementation == "fused"
    dropped = plan(*longest, dropout_rng=jax.random.key(0), dropout_rate=0.1)
    assert dropped.implementation == "tiled"
    assert any("cudnn: it has no dropout" in reason for reason in dropped.reasons)
    with aa.config(engines=["-cudnn"]):
        assert plan(*large).implementation == "exact"
        assert "cudnn: it is switched off" in str(plan(*large))
    with aa.config(engines=["tokamax"]):
        assert "tokamax is not installed" in str(plan(*large))
    with aa.config(implementation="tiled"):
        assert plan(*large).implementation == "tiled"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "no kernel for float32"),
        ({"depth": 264}, "depth 264 is more than 256"),
        ({"mask": np.ones((256, 128), bool), "dtype": "float16"}, "float16"),
        ({"bias": jnp.zeros((255, 128), jnp.bfloat16), "q_length": 255}, "even"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x,
)
def test_limits(gpu, options, reason):
    call = {name: options[name] for name in options.keys() & {"mask", "bias"}}
    arrays = shapes(2, **{name: options[name] for name in options.keys() - call.keys()})
    with pytest.raises(NotImplementedError, match=f"cudnn: .*{reason}"):
        jax.eval_shape(partial(attend, **call), *arrays)


def test_tokamax_comes_first_where_there_is_an_array(gpu, monkeypatch):
    monkeypatch.setitem(vars(backend.engines[1]), "absent", "")

    def engine(*arrays, **kwargs):
        found = []
        jax.eval_shape(lambda *x: found.append(aa.explain(*x, implementation="fused", **kwargs)), *arrays)
        return found[0].engine

    assert engine(*shapes(2)) == "cudnn"
    assert engine(*shapes(2), mask=np.ones((2, 1, 1, 128), bool)) == "tokamax"
    assert engine(*shapes(2), bias=np.zeros((256, 128), jnp.bfloat16)) == "tokamax"
    assert engine(*shapes(2, kv_length=256), mask=LocalMask(3, 3)) == "tokamax"


def test_a_machine_without_a_gpu():
    x = jnp.ones((2, 4, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"cudnn: it runs on gpu, not on cpu.*tokamax: it runs on gpu"):
        attend(x, x, x)
