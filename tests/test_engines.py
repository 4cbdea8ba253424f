"""Every engine and every word of a call: the formula in float64 with its gradients, written here, or a refusal.

On a CPU: FlexAttention with all logits, splash interpreted, and for cuDNN and tokamax's kernels those that JAX and
tokamax have for any machine, called as they are.
"""

from functools import cache, partial

import numpy as np
import pytest

import anyattention as aa
from anyattention.biases import Alibi
from anyattention.masks import LengthMask

pytestmark = [  # PyTorch's own
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
]
LENGTH, HEADS, KV_HEADS, DEPTH, V_DEPTH = 128, 2, 1, 16, 24
ENGINES = {
    **{"cudnn": ("jax", "bfloat16"), "tokamax": ("jax", "bfloat16"), "splash": ("jax", "float32")},
    **{"sdpa": ("torch", "float32"), "flex": ("torch", "float32"), "mlx": ("mlx", "float32")},
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest number; mistakes are about as large as that


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


LENGTHS = {"lengths": np.array([77, 0], np.int32)}  # the second entry is fully masked
SINKS, BIAS = {"sinks": draw(1, HEADS)}, {"bias": draw(2, 1, HEADS, 1, LENGTH)}
DROPOUT = {"dropout_rng": aa.random.key(3), "dropout_rate": 0.25}
WORDS = {
    "scale": {"scale": 0.4, **LENGTHS},
    "a negative scale": {"scale": -0.3},
    "a soft cap": {"logits_soft_cap": 1.0, "scale": 0.4, **LENGTHS},
    "sinks": {**SINKS, **LENGTHS},
    "sinks of each query": {"sinks": draw(4, 2, HEADS, LENGTH), **LENGTHS},
    "a bias": BIAS,
    "a learned bias": {**BIAS, "learned": True},
    "a soft cap and a bias": {"logits_soft_cap": 1.0, **BIAS, "learned": True},
    "dropout": {**DROPOUT, **LENGTHS},
    "dropout of each head": {**DROPOUT, "broadcast_dropout": False},
}
NO_CAP, NO_SINKS = "it has no soft cap", "it has no sinks"
NO_DROPOUT = {"dropout": "it has no dropout of Flax's bits", "dropout of each head": "it has no dropout of Flax's bits"}
WITHOUT = {"a soft cap": NO_CAP, "a soft cap and a bias": NO_CAP, "sinks": NO_SINKS, "sinks of each query": NO_SINKS}
OF_HEADS = {"sinks of each query": "its sinks are the same for all queries"}
REFUSED = {
    "cudnn": {**WITHOUT, **NO_DROPOUT},
    "tokamax": {
        **{"sinks": NO_SINKS, "sinks of each query": NO_SINKS, **NO_DROPOUT},
        "a soft cap and a bias": "its soft cap comes after the bias",
    },
    "splash": {
        **dict.fromkeys(("a bias", "a learned bias", "a soft cap and a bias"), "it has no bias"),
        **{**OF_HEADS, **NO_DROPOUT},
    },
    "sdpa": {**WITHOUT, **NO_DROPOUT, "a learned bias": "the bias needs a gradient"},
    "flex": {},
    "mlx": {"a soft cap": NO_CAP, "a soft cap and a bias": NO_CAP, **OF_HEADS, **NO_DROPOUT},
}


@pytest.fixture
def engine(request, monkeypatch):
    """The engine of this name alone, as on a device that has it."""
    name = request.param
    if ENGINES[name][0] == "mlx":
        return name
    if ENGINES[name][0] == "torch":
        from torch.nn.attention import flex_attention

        from anyattention_backends.torch import backend, flex, sdpa

        chosen = {"flex": flex.Flex, "sdpa": sdpa.SDPA}[name]()
        vars(chosen).update(platforms=("cpu",), compiled=False)
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *arrays: None)  # no gradient on CPU
        monkeypatch.setattr(backend, "engines", (chosen,))
        return name
    import jax

    from anyattention_backends.jax import backend, cudnn, splash, tokamax

    if name == "tokamax":
        pytest.importorskip("tokamax", reason="an extra that wants Python 3.12")
        monkeypatch.setattr("sys.argv", ["tests"])  # which 0.0.12 reads
    chosen = {"cudnn": cudnn.CuDNN, "splash": splash.Splash, "tokamax": tokamax.Tokamax}[name]()
    vars(chosen).update(absent="", most_depth=256, interpret=True, implementation="xla")
    anywhere = partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *x, **options: anywhere(*x, **options | {"implementation": "xla"})
    )
    monkeypatch.setattr(backend, "engines", (chosen,))
    monkeypatch.setattr(backend.arrays, "platform", lambda x: chosen.platform)
    return name


@cache
def arrays(dtype):
    """Query, key, value and the gradient of the output, of numbers that the dtype has."""
    shapes = (HEADS, DEPTH), (KV_HEADS, DEPTH), (KV_HEADS, V_DEPTH), (HEADS, V_DEPTH)
    return [rounded(draw(seed, 2, LENGTH, *shape), dtype) for seed, shape in enumerate(shapes, 5)]


def rounded(x, dtype):
    """Numbers of float32 that are such of a dtype too."""
    if dtype == "float32":
        return x
    return ((x.view(np.uint32) + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def truth(dtype, words):
    """The output and the gradients of query, key, value, and of sinks and bias where there are any."""
    query, key, value, doutput = (np.moveaxis(np.float64(x), 2, 1) for x in arrays(dtype))
    key, value = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (key, value))
    bias, sinks = (None if x is None else np.float64(rounded(x, dtype)) for x in map(words.get, ("bias", "sinks")))
    scale, cap = words.get("scale", DEPTH**-0.5), words.get("logits_soft_cap", np.inf)
    logits = query @ np.swapaxes(key, -1, -2) * scale
    slope = 1 - np.tanh(logits / cap) ** 2
    logits = logits if cap == np.inf else cap * np.tanh(logits / cap)
    logits = logits if bias is None else logits + bias
    visible = np.arange(LENGTH) < words.get("lengths", np.array([LENGTH]))[:, None, None, None]
    logits = np.where(visible, logits, -1e30)
    column = np.full((1, 1, 1), -np.inf) if sinks is None else sinks[:, None] if sinks.ndim == 1 else sinks
    column = np.broadcast_to(column[..., None], (*logits.shape[:-1], 1))
    largest = np.maximum(logits.max(axis=-1, keepdims=True), column)
    exps, sink = np.exp(logits - largest), np.exp(column - largest)
    weights, sink = (x / (exps.sum(axis=-1, keepdims=True) + sink) for x in (exps, sink))
    keep = np.ones(())
    if "dropout_rng" in words:
        shape = (1, 1) if words.get("broadcast_dropout", True) else logits.shape[:2]
        keep = aa.random.bernoulli(words["dropout_rng"], 0.75, (*shape, LENGTH, LENGTH)) / 0.75
    output = (weights * keep) @ value
    dweights = doutput @ np.swapaxes(value, -1, -2) * keep
    delta = (dweights * weights).sum(axis=-1, keepdims=True)
    dlogits = np.where(visible, weights * (dweights - delta), 0.0)
    dscores = dlogits * slope * scale
    dkey, dvalue = np.swapaxes(dscores, -1, -2) @ query, np.swapaxes(weights * keep, -1, -2) @ doutput
    dkey, dvalue = (x.reshape(2, KV_HEADS, -1, LENGTH, x.shape[-1]).sum(axis=2) for x in (dkey, dvalue))
    found = [np.moveaxis(x, 1, 2) for x in (output, dscores @ key, dkey, dvalue)]
    dsinks = (-sink * delta)[..., 0]
    found += [] if sinks is None else [dsinks if sinks.ndim > 1 else dsinks.sum(axis=(0, 2))]
    return [*found, dlogits.sum(axis=(0, 2), keepdims=True)] if bias is not None else found


def ours(library, dtype, words):
    """The same by the engine; in PyTorch a bias has a gradient only if it is `learned`."""
    *given, doutput = arrays(dtype)
    names = [name for name in ("sinks", "bias") if name in words]
    given = [*given, *(rounded(words[name], dtype) for name in names)]
    options = {key: x for key, x in words.items() if key not in (*names, "lengths", "learned", "rule")}

    def call(put, *x):
        mask = LengthMask(put(words["lengths"])) if "lengths" in words else None
        more = dict(zip(names, x[3:], strict=True)) | ({"bias": words["rule"]} if "rule" in words else {})
        return aa.dot_product_attention(*x[:3], mask=mask, implementation="fused", **more, **options)

    if library == "jax":
        import jax
        import jax.numpy as jnp

        output, pullback = jax.vjp(partial(call, jnp.asarray), *(jnp.asarray(x, dtype) for x in given))
        return [output, *pullback(jnp.asarray(doutput, dtype))]
    if library == "torch":
        import torch

        fixed = [name == "bias" and "learned" not in words for name in ("query", "key", "value", *names)]
        leaves = [torch.tensor(x, requires_grad=not still) for x, still in zip(given, fixed, strict=True)]
        output = call(torch.asarray, *leaves)
        wanted = [x for x in leaves if x.requires_grad]
        return [output.detach(), *torch.autograd.grad(output, wanted, torch.tensor(doutput))]
    import mlx.core as mx

    leaves = [mx.array(x) for x in given]
    output, gradients = mx.vjp(partial(call, mx.array), leaves, [mx.array(doutput)])
    return [output[0], *gradients]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    ("library", "engine", "dtype"),
    [(home, name, dtype) for name, (home, dtype) in ENGINES.items()],
    indirect=["engine"],
)
def test_right_or_refused(engine, library, dtype, word):
    words = WORDS[word]
    if reason := REFUSED[engine].get(word):
        with pytest.raises(NotImplementedError, match=f"{engine}: .*{reason}"):
            ours(library, dtype, words)
        return
    found, right = ours(library, dtype, words), truth(dtype, words)
    for x, y in zip(found, right[: len(found)], strict=True):
        x, limit = np.asarray(x, np.float64), TOLERANCE[dtype] * max(1.0, np.abs(y).max())
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=limit)
    assert len(found) == len(right) - (library == "torch" and word == "a bias")


@pytest.mark.parametrize(
    ("library", "engine", "dtype"),
    [(home, name, dtype) for name, (home, dtype) in ENGINES.items()],
    indirect=["engine"],
)
def test_a_bias_by_rule_is_refused(engine, library, dtype):
    with pytest.raises(NotImplementedError, match=f"{engine}: .*it has no bias by rule"):
        ours(library, dtype, {"rule": Alibi(draw(1, HEADS))})


def test_every_engine_is_here():
    """But for that of ONNX, which has no gradients, and tests of its own."""
    from anyattention._src import registry

    assert {*ENGINES, "onnx"} == set(registry.ENGINES)
    assert set(ENGINES) == set(REFUSED)


@pytest.mark.parametrize("word", WORDS)
def test_each_word_makes_a_difference(word):
    """So that an engine that ignored it would be found."""
    plain, found = truth("float32", {}), truth("float32", WORDS[word])
    assert np.abs(found[0] - plain[0]).max() > 10 * TOLERANCE["bfloat16"]
