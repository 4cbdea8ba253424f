"""Splash attention as JAX interprets it on a CPU, and lowered for TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask
from anyattention_backends.jax import backend
from anyattention_backends.jax.splash import Splash

fused = partial(aa.dot_product_attention, implementation="fused")
IDS = np.arange(256)[None] // 60, np.arange(384)[None] // 200  # most segments of queries have no keys
MASKS = {
    "none": None,
    "causal": CausalMask(),
    "window": CausalMask(5) & LocalMask(130, 9),
    "lengths": LengthMask(np.array([0, 300]), np.array([256, 7])),
    "segments": SegmentMask(*IDS),
    "causal-segments": SegmentMask(*IDS) & CausalMask(),
}


@pytest.fixture
def splash(monkeypatch):
    engine = Splash()
    monkeypatch.setattr(backend, "engines", (engine,))
    monkeypatch.setattr(backend.arrays, "platform", lambda x: "tpu")
    return engine


def arrays(kv_heads, depth=64, v_depth=32):
    random = np.random.default_rng(3)
    shapes = (2, 256, 2, depth), (2, 384, kv_heads, depth), (2, 384, kv_heads, v_depth)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_interpreted(splash, monkeypatch, name):
    monkeypatch.setattr(splash, "interpret", True)
    args, mask = arrays(1 if name == "causal" else 2), MASKS[name]
    dense = None if mask is None else mask.to_array(256, 384)

    def flax(query, key, value):
        key, value = (jnp.repeat(x, 2 // x.shape[-2], -2) for x in (key, value))
        return linen.dot_product_attention(query, key, value, mask=dense)

    (output, pullback), (expected, expected_pullback) = (jax.vjp(f, *args) for f in (partial(fused, mask=mask), flax))
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    cotangent = jnp.asarray(np.random.default_rng(4).standard_normal(output.shape), jnp.float32)
    for actual, right in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        np.testing.assert_allclose(actual, right, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scale_and_soft_cap(splash, monkeypatch):
    monkeypatch.setattr(splash, "interpret", True)
    words = {"mask": MASKS["causal"], "scale": 0.3, "logits_soft_cap": 1.5}
    (output, pullback), (right, right_pullback) = (
        jax.vjp(partial(aa.dot_product_attention, implementation=name, **words), *arrays(2))
        for name in ("fused", "exact")
    )
    np.testing.assert_allclose(output, right, rtol=1e-5, atol=1e-5)
    for actual, expected in zip(pullback(right), right_pullback(right), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sinks_of_each_entry(splash, monkeypatch, dtype):
    """Of float32 in a call of 16 bits too; beside fully masked rows one of finfo.min weighs as one key."""
    monkeypatch.setattr(splash, "interpret", True)
    given = [x.astype(dtype) for x in arrays(1)]
    sinks = jnp.array([[0.5, float(jnp.finfo(dtype).min)], [-1.0, -jnp.inf]])[..., None]
    call = partial(aa.dot_product_attention, mask=MASKS["lengths"])
    output, pullback = jax.vjp(lambda *x: call(*x[:3], sinks=x[3], implementation="fused"), *given, sinks)
    right, right_pullback = jax.vjp(lambda *x: call(*x[:3], sinks=x[3], implementation="exact"), *given, sinks)
    step = float(jnp.finfo(dtype).eps) * (4 if dtype == "bfloat16" else 100)
    assert output.dtype == dtype
    for x, y in ((output, right), *zip(pullback(right), right_pullback(right), strict=True)):
        x, y = x.astype("float32"), y.astype("float32")
        np.testing.assert_allclose(x, y, atol=step * max(1.0, float(jnp.abs(y).max())))


@pytest.mark.parametrize("name", MASKS)
def test_lowers_for_tpus(splash, name):
    """Forward and backward, with nothing as large as the logits."""
    call = partial(fused, mask=MASKS[name], sinks=jnp.zeros(2) if name == "causal" else None)
    program = jax.jit(jax.grad(lambda *x: call(*x).sum(), (0, 1, 2))).trace(*arrays(2))
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3
    assert "x256x384xf32>" not in text


def test_limits(splash):
    query, key, value = (x.astype(jnp.bfloat16) for x in arrays(2))

    def reason(*args, **kwargs):
        with pytest.raises(NotImplementedError) as error:
            fused(*args, **kwargs)
        return str(error.value)

    assert "multiples of 128" in reason(query[:, :100], key, value)
    assert "no bias" in reason(query, key, value, bias=1.0)
    assert "no arrays" in reason(query, key, value, mask=np.ones((256, 384), bool))
    both = LengthMask(np.array([3, 4])) & SegmentMask(*IDS)
    assert "not both" in reason(query, key, value, mask=both)
    assert "same for all queries" in reason(query, key, value, sinks=jnp.zeros((2, 256)))
    assert "float16" in reason(*(x.astype(jnp.float16) for x in (query, key, value)))
    assert aa.explain(query, key, value, implementation="fused").engine == "splash"
    assert aa.explain(query, key, value).engine is None  # until a run on a device is on record
    with aa.config(engines=["splash"]):
        assert aa.explain(query, key, value).engine == "splash"
