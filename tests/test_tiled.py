"""The tiled implementation against Flax and float64 truth (C3), in tiles so small that no case fits one."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import anyattention as aa
from anyattention._src.registry import backend_of
from anyattention_conformance import FORMS, Answer, flax_answer, flax_attention, truth, within_c3

NAMES = ("query", "key", "value", "bias")
# In queries and keys, where the cases have 3 and 5: ragged at both ends. Each size is a compilation on JAX.
TILES = {"numpy": [(1, 1), (3, 2), (2, 16)], "torch": [(1, 1), (3, 2), (2, 16)], "jax": [(2, 2)]}


@pytest.fixture
def use_tiles(library, monkeypatch):
    """Set the size of tiles, in queries and keys; NumPy takes one head at a time unless tiles are of 3 and 2."""
    kind = type(backend_of(library.put(np.ones(1, np.float32))).tiles)

    def use(size):
        monkeypatch.setattr(kind, "sizes", lambda self, block, ruled: size)
        if library.name == "numpy":
            monkeypatch.setattr(sys.modules[kind.__module__], "_LOGITS", 2**19 if size == (3, 2) else 1)

    return use


@functools.cache
def case_answers(case, dtype):
    """Inputs, a random gradient of the output, Flax's answer, the truth, and the size of its terms."""
    arguments = case.inputs(dtype)
    cotangent = np.random.default_rng(1).standard_normal(flax_attention(**arguments).shape)
    cotangent = cotangent.astype(arguments["query"].dtype)
    return arguments, cotangent, flax_answer(arguments, cotangent), *truth(arguments, dtype, cotangent)


def differentiate(library, arguments, cotangent):
    """Output and gradients by the library's own automatic differentiation."""
    names = [name for name in NAMES if name in arguments]
    placed = library.put_all(arguments)
    rest = {name: x for name, x in placed.items() if name not in names} | {"implementation": "tiled"}
    if library.name == "jax":
        output, pullback = jax.vjp(lambda *x: aa.dot_product_attention(*x[:3], *x[3:], **rest), *map(placed.get, names))
        gradients = pullback(jnp.asarray(cotangent).astype(output.dtype))
    else:
        leaves = [placed[name].requires_grad_() for name in names]
        output = aa.dot_product_attention(*leaves, **rest)
        gradients = torch.autograd.grad(output, leaves, library.put(cotangent).to(output.dtype))
        output = output.detach()
    return Answer(library.get(output), {n: library.get(x) for n, x in zip(names, gradients, strict=True)})


def pull_back(library, arguments, cotangent):
    """The same by the public vjp."""
    output, pullback = aa.dot_product_attention_vjp(**library.put_all(arguments))
    gradients = dict(zip(NAMES, pullback(library.put(cotangent)), strict=True))
    return Answer(library.get(output), {name: library.get(x) for name, x in gradients.items() if name in arguments})


def check(answer, flax, exact, size, dtype):
    assert answer.output.dtype == flax.output.dtype
    assert not within_c3(answer.output, flax.output, exact.output, size.output, dtype)
    assert set(answer.gradients) == set(flax.gradients)
    for name, gradient in answer.gradients.items():
        assert gradient.dtype == flax.gradients[name].dtype, name
        problem = within_c3(gradient, flax.gradients[name], exact.gradients[name], size.gradients[name], dtype)
        assert not problem, f"gradient of {name}: {problem}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_output_and_gradients(library, use_tiles, case, dtype):
    arguments, cotangent, *answers = case_answers(case, dtype)
    for size in TILES[library.name] if case.id != "large-logits" else [(16, 16)]:
        use_tiles(size)
        if library.name != "jax":
            check(pull_back(library, arguments, cotangent), *answers, dtype)
        if library.name != "numpy":
            check(differentiate(library, arguments, cotangent), *answers, dtype)


@pytest.mark.parametrize("name", ["mask-and-bias", "mask-hidden-row", "dropout"])
def test_jax_differentiates_the_loops_to_the_written_gradient(name, monkeypatch):
    case = next(case for case in FORMS if case.id == name)
    arguments = case.inputs("float32")
    arrays = {n: jnp.asarray(arguments[n]) for n in NAMES if n in arguments}
    rest = {n: x for n, x in arguments.items() if n not in arrays}
    monkeypatch.setattr(type(backend_of(arrays["query"]).tiles), "sizes", lambda self, block, ruled: (2, 3))
    output, by_jax = jax.vjp(lambda x: aa.dot_product_attention(**x, **rest, implementation="tiled"), arrays)
    _, by_hand = aa.dot_product_attention_vjp(**arrays, **rest)
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal(output.shape), output.dtype)
    gradients = dict(zip(NAMES, by_hand(cotangent), strict=True))
    for n, gradient in by_jax(cotangent)[0].items():
        np.testing.assert_allclose(gradients[n], gradient, rtol=1e-5, atol=1e-6)


# --- where tiled is less accurate than Flax, as docs/libraries.md says ---


def float64(function, *arrays):
    """A function of Flax's attention in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*(jnp.asarray(x, "float64") for x in arrays)))


@pytest.mark.parametrize(("exponent", "bound"), [(-20, 1e-5), (-30, 1e-4), (-32, 1e-2)])
@pytest.mark.parametrize("library", ["numpy", "torch"], indirect=True)
def test_tiny_cotangents(library, exponent, bound):
    """Of many keys with logits near 20, whose sum of exponentials divides the cotangent first."""
    random, shape = np.random.default_rng(0), (1, 300, 1, 64)
    query, key = np.ones(shape, np.float32), (2.4 + 0.05 * random.standard_normal(shape)).astype(np.float32)
    value, cotangent = random.standard_normal(shape, np.float32), random.standard_normal(shape) * 10.0**exponent
    cotangent = cotangent.astype(np.float32)
    _, pullback = aa.dot_product_attention_vjp(*map(library.put, (query, key, value)))
    exact = float64(
        lambda q, k, v, g: jax.vjp(lambda *x: linen.dot_product_attention(*x), q, k, v)[1](g),
        *(query, key, value, cotangent),
    )
    for found, expected in zip(pullback(library.put(cotangent))[1:3], exact[1:], strict=True):
        assert np.abs(library.get(found) - expected).max() <= bound * np.abs(expected).max()


def test_second_forward_derivative_on_jax():
    """In float32 within 1e-4 of the largest; Flax's within 1e-5."""
    random = np.random.default_rng(0)
    x, one, two = (random.standard_normal((1, 40, 2, 16), np.float32) for _ in range(3))

    def second(attention, x, one, two):
        def first(x):
            return jax.jvp(lambda x: attention(x), (x,), (one,))[1]

        return jax.jvp(first, (x,), (two,))[1]

    def flax(x):
        return linen.dot_product_attention(x, x, x)

    expected = float64(lambda *arrays: second(flax, *arrays), x, one, two)
    tiled = second(
        lambda x: aa.dot_product_attention(x, x, x, implementation="tiled"), *map(jnp.asarray, (x, one, two))
    )
    assert np.abs(tiled - expected).max() <= 1e-4 * np.abs(expected).max()
