"""tokamax's function as it is called, with its kernel for any machine in place of Mosaic's."""

import sys
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask
from anyattention_backends.jax import backend
from anyattention_backends.jax.tokamax import Tokamax

fused = partial(aa.dot_product_attention, implementation="fused")
LENGTHS = np.array([0, 5])
ARRAY = np.random.default_rng(1).random((2, 1, 1, 9)) < 0.4


@pytest.fixture
def engine(monkeypatch):
    """The engine as on a GPU that has it."""
    engine = Tokamax()
    monkeypatch.setitem(vars(engine), "absent", "")
    monkeypatch.setattr(backend, "engines", (engine,))
    monkeypatch.setattr(backend.arrays, "platform", lambda x: "gpu")
    return engine


def arrays(q_length=9, kv_heads=4, dtype=jnp.bfloat16):
    random = np.random.default_rng(3)
    shapes = (2, q_length, 4, 16), (2, 9, kv_heads, 16), (2, 9, kv_heads, 8)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        CausalMask(),
        CausalMask(2),
        LocalMask(2, 3),
        LengthMask(LENGTHS),
        LengthMask(LENGTHS) & CausalMask(),
        SegmentMask(np.arange(18).reshape(2, 9) // 4, np.arange(18).reshape(2, 9) // 3) & CausalMask(),
        ~CausalMask(),
        ARRAY,
    ],
    ids=["none", "causal", "later", "window", "lengths", "causal-lengths", "causal-segments", "not-causal", "array"],
)
def test_its_call(engine, monkeypatch, mask, biased):
    pytest.importorskip("tokamax", reason="an extra that wants Python 3.12")
    monkeypatch.setattr(engine, "implementation", "xla")
    monkeypatch.setattr("sys.argv", ["tests"])  # which 0.0.12 reads
    args = arrays(kv_heads=2)
    dense = mask if mask is None or mask is ARRAY else mask.to_array(9, 9)
    wide = [x.astype(jnp.float32) for x in args]
    bias = jnp.where(ARRAY, -jnp.inf, jnp.asarray(np.random.default_rng(5).random((4, 9, 9)))) if biased else None
    bias = None if bias is None else bias.at[..., 0].set(0.5)  # so that no query is without a key

    def flax(query, key, value):
        return linen.dot_product_attention(query, jnp.repeat(key, 2, -2), jnp.repeat(value, 2, -2), bias, dense)

    low = None if bias is None else bias.astype(jnp.bfloat16)
    output, pullback = jax.vjp(partial(fused, bias=low, mask=mask), *args)
    expected, expected_pullback = jax.vjp(flax, *wide)
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=2e-2)
    cotangent = jnp.asarray(np.random.default_rng(4).standard_normal(output.shape), jnp.bfloat16)
    gradients = zip(pullback(cotangent), expected_pullback(cotangent.astype(jnp.float32)), strict=True)
    for actual, right in gradients:
        np.testing.assert_allclose(actual.astype(jnp.float32), right, atol=6e-2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", [None, CausalMask(), LocalMask(9, 3), LengthMask(LENGTHS), ~CausalMask()], ids=str)
def test_the_kernels_take_what_they_are_given(engine, monkeypatch, mask, biased):
    """Mosaic's kernels for Hopper, forward and backward, traced as for such a GPU; only one could run them."""
    pytest.importorskip("tokamax", reason="an extra that wants Python 3.12")
    from tokamax import config
    from tokamax._src import gpu_utils, mosaic_gpu

    gpu = {"platform": "gpu", "device_kind": "NVIDIA H200", "compute_capability": "9.0", "core_count": 132}
    device = type("Device", (), gpu | {"shared_memory_per_block_optin": 232448})()
    monkeypatch.setattr(mosaic_gpu.backend, "get_default_device", lambda: device)
    for name in ("has_mosaic_gpu_support", "is_sm80", "is_sm90", "is_sm100"):
        monkeypatch.setattr(gpu_utils, name, lambda *_, here=name in ("has_mosaic_gpu_support", "is_sm90"): here)
    monkeypatch.setattr(engine, "implementation", "mosaic_gpu")
    monkeypatch.setattr("sys.argv", ["tests"])
    shapes = [(2, 256, 4, 64), (2, 256, 2, 64), (2, 256, 2, 32), *[(1, 4, 256, 256)] * biased]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(*x):
        return fused(*x, mask=mask).astype(jnp.float32).sum()

    with config.cross_compile(True):
        gradients = jax.eval_shape(jax.grad(loss, tuple(range(len(arrays)))), *arrays)
        text = str(jax.make_jaxpr(loss)(*arrays))
    assert [x.shape for x in gradients] == shapes
    assert "wgmma" in text


def test_limits(engine):
    def reason(*args, **kwargs):
        with pytest.raises(NotImplementedError) as error:
            fused(*args, **kwargs)
        return str(error.value)

    assert "no kernel for float32" in reason(*arrays(dtype=jnp.float32))
    assert "its soft cap comes after the bias" in reason(*arrays(), bias=jnp.zeros(9), logits_soft_cap=30.0)
    # Of a cap up to 60 its kernel for Hopper takes exp(logit) in the dtype of the values: exp(12) is 160,000.
    assert "exponentials exceed float16" in reason(*arrays(dtype=jnp.float16), logits_soft_cap=30.0)
    for dtype, cap in ((jnp.float16, 61.0), (jnp.bfloat16, 30.0)):
        assert aa.explain(*arrays(dtype=dtype), logits_soft_cap=cap, implementation="fused").engine == "tokamax"


@pytest.mark.parametrize("q_length", [5, 9, 14])
@pytest.mark.parametrize("mask", [LocalMask(2, 3), CausalMask(2), ~CausalMask(-3), ~CausalMask(1)], ids=str)
def test_windows(engine, monkeypatch, mask, q_length):
    """Of queries and keys of two lengths: an array before tokamax 0.0.17, which takes them as they are."""
    pytest.importorskip("tokamax", reason="an extra that wants Python 3.12")
    monkeypatch.setattr(engine, "implementation", "xla")
    query, key, value = (x.astype(jnp.float32) for x in arrays(q_length))
    expected = linen.dot_product_attention(query, key, value, mask=mask.to_array(q_length, 9))
    actual = fused(*arrays(q_length), mask=mask).astype(jnp.float32)
    seen = mask.to_array(q_length, 9).any(axis=-1)  # the mean of all values else, which test_jax_kernel.py tests
    np.testing.assert_allclose(actual[:, seen], expected[:, seen], atol=2e-2)


def test_masks_that_it_lacks_are_arrays(engine, monkeypatch):
    def remark(*args, mask):
        return str(aa.explain(*args, mask=mask, implementation="fused"))

    monkeypatch.setitem(vars(engine), "version", (0, 0, 16))

    ids = np.zeros((2, 9), int)
    assert "an array of 162 elements: it has no segments" in remark(*arrays(), mask=SegmentMask(ids, ids))
    assert "windows need queries and keys of one length" in remark(*arrays(q_length=7), mask=LocalMask(2, 3))
    assert "elements" not in remark(*arrays(), mask=LocalMask(2, 3) & ARRAY)
    monkeypatch.setitem(vars(engine), "version", (0, 0, 17))
    assert "elements" not in remark(*arrays(q_length=7), mask=LocalMask(2, 3))


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        (None, "9.0", "not installed"),
        ("0.0.12", "9.0", "command line"),
        ("0.0.17", "8.0", "not 8.0"),
        ("0.0.17", "9.0", ""),
        ("0.1.0", "10.3", ""),
        ("0.1.0", "12.0", "not 12.0"),
    ],
    ids=str,
)
def test_where_it_is(monkeypatch, version, capability, reason):
    device = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: version)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setitem(sys.modules, "tokamax", ModuleType("tokamax"))
    absent = Tokamax().absent
    assert (reason in absent) if reason else absent == ""
    if not reason:  # one of its own needs is missing
        monkeypatch.setitem(sys.modules, "tokamax", None)
        assert "cannot be imported: ModuleNotFoundError" in Tokamax().absent
