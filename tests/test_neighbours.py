"""A batch entry's bits do not depend on the other entries (C6): not on how many there are, nor on what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, SegmentMask

RANDOM = np.random.default_rng(0)
SHAPES = {  # q_length, kv_length, heads, kv_heads, depth: of several tiles, of one, of heads that go together
    "long": (700, 660, 2, 2, 8),
    "grouped": (300, 700, 4, 2, 8),
    "short": (40, 50, 3, 3, 8),
    "decode": (1, 2000, 4, 4, 16),
}
KINDS = ("plain", "causal", "lengths", "segments", "dense", "bias", "dropout")


def arrays(shape, batch):
    q_length, kv_length, heads, kv_heads, depth = SHAPES[shape]
    sizes = ((q_length, heads), (kv_length, kv_heads), (kv_length, kv_heads))
    random = np.random.default_rng(1)
    first = [random.standard_normal((1, *size, depth), dtype=np.float32) for size in sizes]
    if batch == 1:
        return first
    scale = np.array([1, 100, 1e-3, 1, np.nan, 3e37, 1][: batch - 1], np.float32)[:, None, None, None]
    more = [scale * random.standard_normal((batch - 1, *size, depth), dtype=np.float32) for size in sizes]
    return [np.concatenate(pair) for pair in zip(first, more, strict=True)]


def options(shape, kind, batch, put):
    q_length, kv_length, heads, *_ = SHAPES[shape]
    random = np.random.default_rng(2)
    lengths = np.array([kv_length * 2 // 3, 5, kv_length, 0, 1, 7, 9, 11][:batch])
    ids = np.arange(max(q_length, kv_length)) * np.arange(4, 4 + batch)[:, None] // kv_length
    if kind == "causal":
        return {"is_causal": True}
    if kind == "lengths":
        return {"mask": LengthMask(put(lengths))}
    if kind == "segments":
        return {
            "mask": SegmentMask(put(ids[:, :q_length]), put(ids[:, :kv_length]))
            & CausalMask(max(kv_length - q_length, 0))
        }
    if kind == "dense":
        first = random.random((1, 1, q_length, kv_length)) < 0.5
        more = np.arange(kv_length) < lengths[1:, None, None, None]
        return {"mask": put(np.concatenate([first, np.broadcast_to(more, (batch - 1, *first.shape[1:]))]))}
    if kind == "bias":
        first = random.standard_normal((1, heads, 1, kv_length), dtype=np.float32)
        more = 50 * random.standard_normal((batch - 1, heads, 1, kv_length), dtype=np.float32)
        return {"bias": put(np.concatenate([first, more]))}
    return {"dropout_rng": aa.random.key(0), "dropout_rate": 0.1} if kind == "dropout" else {}


def first_of(library, shape, kind, batch):
    """Output and gradients of the first entry."""
    placed = [library.put(x) for x in arrays(shape, batch)]
    rest = options(shape, kind, batch, library.put)
    if library.name == "jax":
        call = jax.jit(lambda *x: jax.vjp(lambda *x: aa.dot_product_attention(*x, **rest, implementation="tiled"), *x))
        output, pullback = call(*placed)
        return [np.asarray(x[:1]) for x in (output, *pullback(jnp.ones_like(output)))]
    if library.name == "torch":
        leaves = [x.requires_grad_() for x in placed]
        output = aa.dot_product_attention(*leaves, **rest, implementation="tiled")
        return [x[:1].detach().numpy() for x in (output, *torch.autograd.grad(output.sum(), leaves))]
    output, pullback = aa.dot_product_attention_vjp(*placed, **rest)
    return [x[:1] for x in (output, *pullback(np.ones_like(output))[:3])]


NAMES = ("output", "dquery", "dkey", "dvalue")


def check(library, shape, kind, batches, names=NAMES):
    """The same bits alone and in each batch."""
    alone = first_of(library, shape, kind, 1)
    assert np.isfinite(alone[0]).all()
    for batch in batches:
        among_others = first_of(library, shape, kind, batch)
        for name, x, y in zip(names, alone, among_others[: len(names)], strict=False):
            np.testing.assert_array_equal(x, y, err_msg=f"{name}, batch of {batch}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("library", ["numpy", "torch"], indirect=True)
def test_an_entry_has_the_same_bits_alone_and_among_others(library, shape, kind):
    check(library, shape, kind, (2, 8))


ON_JAX = [
    "long causal",
    "long segments",
    "grouped dense",
    "grouped bias",
    "short lengths",
    "short plain",
    "short dropout",
]


@pytest.mark.parametrize("library", ["jax"], indirect=True)
@pytest.mark.parametrize("shape_and_kind", ON_JAX)
def test_on_jax(library, shape_and_kind):
    """Each shape and each kind, of which every pair would be two programs to compile."""
    check(library, *shape_and_kind.split(), (8,))


@pytest.mark.parametrize("library", ["jax"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "lengths"])
def test_one_query_on_jax(library, kind):
    """The output: XLA sums the gradient of one query in another order where it is alone."""
    check(library, "decode", kind, (2, 8), NAMES[:1])


@pytest.mark.parametrize("kind", ["plain", "causal", "lengths"])
@pytest.mark.parametrize("shape", ["long", "grouped", "short"])
def test_the_kernel_of_pytorch_on_cpu(shape, kind):
    """Whose engine tells so in `explain`."""
    outputs = []
    for batch in (1, 2, 8):
        rest = options(shape, kind, batch, torch.tensor)
        outputs.append(
            aa.dot_product_attention(*map(torch.tensor, arrays(shape, batch)), **rest, implementation="fused")
        )
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][0], outputs[2][0])


@pytest.mark.parametrize("shape", SHAPES)
def test_none_chooses_by_one_entry(library, shape):
    plans = [aa.explain(*map(library.put, arrays(shape, batch))) for batch in (1, 2, 8)]
    assert plans[0] == plans[1] == plans[2]
