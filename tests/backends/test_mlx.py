"""MLX's own kernel as an engine: within C3 wherever it serves, and a reason wherever it does not."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

import anyattention as aa
from anyattention import masks
from anyattention._src import plan, registry
from anyattention_backends.mlx import backend
from anyattention_conformance import Golden, suite, targets

fused = partial(aa.dot_product_attention, implementation="fused")
exact = partial(aa.dot_product_attention, implementation="exact")


def arrays(batch=(2,), q_length=5, kv_length=7, kv_heads=4, v_depth=8, dtype=mx.float32):
    random = np.random.default_rng(0)
    shapes = (q_length, 4, 8), (kv_length, kv_heads, 8), (kv_length, kv_heads, v_depth)
    return [mx.array(random.standard_normal((*batch, *shape)).astype(np.float32)).astype(dtype) for shape in shapes]


def with_gradients(function, args, **options):
    output = function(*args, **options)
    cotangent = mx.array(np.random.default_rng(1).standard_normal(output.shape).astype(np.float32))
    return output, *mx.grad(lambda args: mx.sum(function(*args, **options) * cotangent))(args)


def same(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-5, atol=2e-6)


def test_mlx_has_its_backend():
    assert registry.backend_of(mx.ones(1)) is backend
    assert backend.name == "mlx"
    with mx.stream(mx.cpu):
        assert backend.arrays.platform(mx.ones(1)) == "cpu"


def test_the_platform_is_the_device_of_mlx(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert backend.arrays.platform(mx.ones(1)) == "gpu"


def test_the_cases():
    """Contract C3 of every case that the kernel takes, gradients too; what it does not take it refuses."""
    target = targets.make(fused, "mlx")
    outcomes = {run: target.run(*run) for run in suite.runs("smoke") if not run.case.error}
    served = {run: x for run, x in outcomes.items() if "cannot serve this call" not in x.message}
    report = suite.certify("fused", "mlx", served.items(), list(served), oracle=Golden())
    assert [(x.case, x.quantity) for x in report.failures] == []
    assert len(served) > 60
    assert {run.case.id for run in outcomes.keys() - served.keys() if run.dtype == "float32"} >= {"mask-and-bias"}
    assert {"mask", "hidden rows", "bias", "infinities", "lengths"} <= {run.case.group for run in served}


HIDDEN = np.random.default_rng(2).random((2, 1, 5, 7)) > 0.5
HIDDEN[1, :, 2] = False
HIDDEN[0, :, 0] = False
BIAS = np.random.default_rng(3).standard_normal((4, 5, 7)).astype(np.float32)
OPTIONS = {
    "causal": {"is_causal": True},
    "lengths": {"mask": masks.LengthMask(np.array([3, 0]))},
    "rows without a key": {"mask": HIDDEN},
    "of one head": {"mask": HIDDEN & np.array([True, True, False, True])[:, None, None]},
    "numbers as mask": {"mask": np.array([2.0, 0.0, np.nan, 1.0, 0.0, 0.5, 0.0], np.float32)},
    "bias": {"bias": BIAS},
    "integers as bias": {"bias": BIAS.astype(np.int32)},
    "booleans as bias": {"bias": BIAS > 0},
}


@pytest.mark.parametrize(("kv_heads", "v_depth"), [(4, 8), (2, 8), (2, 3)])
@pytest.mark.parametrize("batch", [(2,), (1, 2), ()], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_exact_with_its_gradients(options, batch, kv_heads, v_depth):
    if not batch:
        if isinstance(options.get("mask"), masks.LengthMask):
            options = {"mask": masks.LengthMask(np.array(0))}
        options = {name: x[1] if isinstance(x, np.ndarray) and x.ndim == 4 else x for name, x in options.items()}
    args = arrays(batch, 7 if "is_causal" in options else 5, 7, kv_heads, v_depth)
    same(with_gradients(fused, args, **options), with_gradients(exact, args, **options))


def test_a_scalar_as_bias_changes_nothing():
    same(with_gradients(fused, arrays(), bias=0.5), with_gradients(exact, arrays()))


def test_a_bias_of_minus_infinity_is_nan():
    bias = BIAS.copy()
    bias[1, 3] = -np.inf
    output = np.asarray(fused(*arrays(), bias=bias))
    np.testing.assert_array_equal(np.isnan(output), np.isnan(np.asarray(exact(*arrays(), bias=bias))))
    assert np.isnan(output[:, 3, 1]).all()


@pytest.mark.parametrize("options", [{}, {"bias": BIAS}, {"mask": HIDDEN}], ids=["alone", "bias", "mask"])
def test_sinks(options):
    """With their gradient; beside fully masked rows one as low as their logits weighs as one key."""
    lowest = float(np.finfo(np.float32).min)
    for sinks in ([0.3, -1.0, 40.0, -40.0], [lowest, -np.inf, -1e30, 1e30]):
        sinks = mx.array(sinks)
        for shape in ((4,), (4, 1), (1, 4, 1)):

            def call(function, query, key, value, sinks, shape=shape):
                return function(query, key, value, sinks=mx.reshape(sinks, shape), **options)

            found, right = (with_gradients(partial(call, f), [*arrays(kv_heads=2), sinks]) for f in (fused, exact))
            same(found, right)


def test_sinks_beside_a_bias_of_minus_infinity():
    """Zero, but for a sink of minus infinity too."""
    bias = BIAS.copy()
    bias[:, 3] = -np.inf
    sinks = mx.array([0.0, -np.inf, 1.0, -1e30])
    output, expected = (np.asarray(f(*arrays(), bias=bias, sinks=sinks)) for f in (fused, exact))
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-6)
    assert (output[:, 3, 0] == 0).all()
    assert np.isnan(output[:, 3, 1]).all()


@pytest.mark.parametrize("empty", [0.0, float("nan")], ids=["zero", "nan"])
def test_rows_without_a_key_are_not_left_to_the_kernel(empty, monkeypatch):
    def kernel(query, key, value, scale, mask, sinks=None):
        logits = mx.where(mask, scale * query @ mx.swapaxes(key, -1, -2), -mx.inf)
        seen = mx.any(mask, axis=-1, keepdims=True)
        return mx.where(seen, mx.softmax(logits, axis=-1), empty) @ value

    expected = with_gradients(exact, arrays(), mask=HIDDEN)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", kernel)
    same(with_gradients(fused, arrays(), mask=HIDDEN), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_biases_do_not_overflow(dtype, monkeypatch):
    """A kernel of powers of two multiplies logits by more than one."""

    def kernel(query, key, value, scale, mask, sinks=None):
        logits = (scale * query @ mx.swapaxes(key, -1, -2) + mask).astype(mx.float32) * 1.44269504
        weights = mx.power(2.0, logits - mx.maximum(mx.max(logits, axis=-1, keepdims=True), -3.4e38))
        return (weights / mx.sum(weights, axis=-1, keepdims=True)).astype(value.dtype) @ value

    bias = np.where(np.arange(7) % 2, backend.steps.lowest(dtype), 0.0) * np.ones((5, 1))
    bias[2] = backend.steps.lowest(dtype)
    bias[3] = [-1e37, *[-2e37] * 6]
    given = [x.astype(getattr(mx, dtype)) for x in (*arrays(), mx.array(bias.astype(np.float32)))]
    expected = exact(*given[:3], bias=given[3])
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", kernel)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    output = fused(*given[:3], bias=given[3])
    np.testing.assert_allclose(*(np.asarray(x.astype(mx.float32)) for x in (output, expected)), atol=tolerance)


def test_transformations():
    query, key, value = arrays()

    def loss(function, query):
        return mx.sum(function(query, key, value, mask=HIDDEN) ** 2)

    def twice(function):
        return mx.grad(lambda query: mx.sum(mx.grad(partial(loss, function))(query) ** 2))(query)

    same([twice(fused)], [twice(exact)])
    compiled = mx.compile(lambda query: fused(query, key, value, is_causal=False, mask=HIDDEN))
    same([compiled(query)], [exact(query, key, value, mask=HIDDEN)])
    mapped = (mx.vmap(lambda query, f=f: f(query, key[0], value[0]))(query) for f in (fused, exact))
    same([next(mapped)], [next(mapped)])


REASONS = {
    "dropout": ({"dropout_rng": aa.random.key(0), "dropout_rate": 0.5}, "no dropout"),
    "precision": ({"precision": "highest"}, "precision"),
    "a float32 softmax": ({"force_fp32_for_softmax": True, "dtype": "bfloat16"}, "returns float32"),
    "float64": ({"dtype": "float64"}, "no kernel for float64"),
    "complex64": ({"dtype": "complex64"}, "no kernel for complex64"),
    "a bias beside a mask": ({"bias": BIAS, "mask": HIDDEN}, "beside a bias"),
    "a wide bias": ({"bias": BIAS, "dtype": "float16"}, "logits float32"),
    "wide sinks": ({"sinks": np.zeros(4, np.float32), "dtype": "bfloat16"}, "of the call's dtype, not float32"),
    "sinks of each entry": ({"sinks": np.zeros((2, 4, 1), np.float32)}, "the same for all batch entries"),
    "sinks of each query": ({"sinks": np.zeros((4, 5), np.float32)}, "the same for all queries"),
    "another axis": ({"mask": np.ones((2, 2, 1, 5, 7))}, "axes"),
    "causality of other lengths": ({"is_causal": True}, "stands alone, and an array has 70 elements"),
    "a window": ({"mask": masks.LocalMask(1, 1)}, "stands alone, and an array has 70 elements"),
    "lengths of queries": (
        {"mask": masks.LengthMask(np.array([3, 4]), np.array([3, 4]))},
        "no lengths, and an array has 70 elements",
    ),
}


@pytest.mark.parametrize(("options", "reason"), REASONS.values(), ids=REASONS)
def test_refuses_with_the_reason(options, reason):
    with pytest.raises(NotImplementedError, match="cannot serve this call: mlx: .*" + reason):
        fused(*arrays(), **options)


def test_refuses_what_is_empty_and_a_later_causality():
    with pytest.raises(NotImplementedError, match="empty"):
        fused(*arrays(kv_length=0))
    with pytest.raises(NotImplementedError, match="an array has 98 elements"):
        fused(*arrays(q_length=7), mask=masks.CausalMask(1))


def test_explain(monkeypatch):
    """By name, or by the rule on a GPU where `config` names it, since no run on such a device is on record."""
    small, large = arrays(), arrays(q_length=128, kv_length=64)
    assert aa.explain(*large).implementation == "exact"
    assert str(aa.explain(*small, implementation="fused")).split("\n")[2].split() == ["engine", "mlx"]
    monkeypatch.setattr(type(backend.arrays), "platform", lambda self, x: "gpu")
    (rule,) = plan.RULES["mlx", "gpu"]
    assert rule == plan.Rule("fused", of_a_head=2**10)
    assert "no run of it in float32 on a gpu is on record" in str(aa.explain(*large))
    with aa.config(engines=["mlx"]):
        assert aa.explain(*large).engine == "mlx"
    assert aa.explain(*small).implementation == "exact"
    assert aa.explain(*large, mask=masks.LocalMask(1, 1)).implementation == "exact"
    with aa.config(engines=["-mlx"]):
        assert "not fused: mlx: it is switched off" in aa.explain(*large).reasons
