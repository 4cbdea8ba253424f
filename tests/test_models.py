"""What today's models ask for beyond Flax: a scale, a soft cap. Against the formula in float64, written out here."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, LocalMask

LIBRARIES = {"numpy": np.asarray, "jax": jnp.asarray, "torch": torch.asarray}
WORDS = {
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.2},
    "zero scale": {"scale": 0.0},
    "soft cap": {"logits_soft_cap": 1.5},
    "both": {"scale": 0.7, "logits_soft_cap": 2.0},
}
BESIDE = {
    "alone": {},
    "causal": {"is_causal": True},
    "window and lengths": {"mask": lambda put: LocalMask(40, 3) & LengthMask(put(np.array([90, 0])))},
    "mask": {"mask": lambda put: put(np.random.default_rng(5).random((2, 1, 130, 150)) > 0.4)},
    "bias": {"bias": lambda put: put(draw(3, (2, 4, 130, 150)))},
    "bias and mask": {
        "bias": lambda put: put(draw(3, (1, 4, 1, 150))),
        "mask": lambda put: put(np.arange(150) < 77),
    },
    "dropout": {"dropout_rate": 0.3, "dropout_rng": lambda put: aa.random.key(7)},
    "dropout of each head": {
        "dropout_rate": 0.3,
        "dropout_rng": lambda put: aa.random.key(7),
        "broadcast_dropout": False,
    },
}


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@functools.cache
def arrays(grouped=False):
    heads = 2 if grouped else 4
    return draw(0, (2, 130, 4, 16)), draw(1, (2, 150, heads, 16)), draw(2, (2, 150, heads, 24))


def beside(name, put):
    return {key: x(put) if callable(x) else x for key, x in BESIDE[name].items()}


@functools.cache
def truth(word, name, grouped=False):
    """The output and the gradients of its sum of squares, by JAX's derivative of the formula in float64."""
    with jax.enable_x64(True):
        words, options = WORDS[word], beside(name, np.asarray)
        q, k, v = (jnp.asarray(x, "float64") for x in arrays(grouped))
        bias = options.get("bias")
        given = [q, k, v] + ([] if bias is None else [jnp.asarray(bias, "float64")])

        def formula(q, k, v, bias=None):
            group = q.shape[-2] // k.shape[-2]
            k, v = (jnp.repeat(x, group, axis=-2) for x in (k, v))
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * words.get("scale", q.shape[-1] ** -0.5)
            if (cap := words.get("logits_soft_cap")) is not None:
                logits = cap * jnp.tanh(logits / cap)
            logits = logits if bias is None else logits + bias
            mask = CausalMask() if options.get("is_causal") else options.get("mask")
            if mask is not None:
                mask = mask if isinstance(mask, np.ndarray) else mask.to_array(*logits.shape[-2:])
                logits = jnp.where(mask, logits, np.finfo(np.float32).min)
            weights = jax.nn.softmax(logits)
            if "dropout_rng" in options:
                shape = (1, 1, *weights.shape[-2:]) if options.get("broadcast_dropout", True) else weights.shape
                keep = aa.random.bernoulli(options["dropout_rng"], np.float32(0.7), shape)
                weights = weights * np.asarray(keep) / 0.7
            return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

        output = formula(*given)
        gradients = jax.grad(lambda *x: (formula(*x) ** 2).sum(), tuple(range(len(given))))(*given)
        return [np.asarray(x) for x in (output, *gradients)]


def ours(library, implementation, word, name, grouped=False):
    """The output of a library, and the gradients of its sum of squares where it has them; of NumPy by the pullback."""
    put = LIBRARIES[library]
    options = {**WORDS[word], **beside(name, put)}
    bias = options.pop("bias", None)
    given = [put(x) for x in arrays(grouped)] + ([] if bias is None else [bias])

    def call(q, k, v, bias=None):
        return aa.dot_product_attention(q, k, v, bias, implementation=implementation, **options)

    if library == "numpy":
        output = call(*given)
        if implementation != "tiled":
            return [output]
        _, pullback = aa.dot_product_attention_vjp(*given, **options)
        return [output, *pullback(2 * output)[: len(given)]]
    if library == "jax":
        output, gradients = jax.jit(lambda *x: (call(*x), jax.vjp(call, *x)[1](2 * call(*x))))(*given)
        return [output, *gradients]
    leaves = [x.clone().requires_grad_() for x in given]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad((output**2).sum(), leaves)]


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("word", "name"), [*itertools.product(("soft cap", "both"), BESIDE), *((x, "mask") for x in WORDS)]
)
def test_the_formula(library, implementation, word, name):
    found, right = ours(library, implementation, word, name), truth(word, name)
    for x, y in zip(found, right, strict=False):
        assert tuple(x.shape) == y.shape
        np.testing.assert_allclose(np.asarray(x), y, atol=3e-6 * max(1.0, np.abs(y).max()), rtol=0)


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_grouped_heads(library, implementation):
    for x, y in zip(ours(library, implementation, "both", "causal", True), truth("both", "causal", True), strict=False):
        np.testing.assert_allclose(np.asarray(x), y, atol=3e-6 * max(1.0, np.abs(y).max()), rtol=0)
