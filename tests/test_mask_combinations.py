"""Two dozen masks by rule, joined at random, against a formula in float64 with the dense mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention._src.registry import backend_of
from anyattention.masks import CausalMask, LengthMask, LocalMask, Rule, packed

Q_LENGTH, KV_LENGTH = 12, 20
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE = (RANDOM.standard_normal((2, n, 4, 8), dtype=np.float32) for n in (Q_LENGTH, KV_LENGTH, KV_LENGTH))
COTANGENT = RANDOM.standard_normal(QUERY.shape, dtype=np.float32)
ROW, COLUMN = np.arange(Q_LENGTH)[:, None], np.arange(KV_LENGTH)


def near(i, j, ti, tj):
    return abs(ti - tj) < 0.5


def stripes(i, j):
    return (i + 2 * j) % 3


def leaf(random):
    """A mask, given how to make arrays, and what it denotes, ``[2, 1, q_length, kv_length]``."""
    offset = [random.integers(-4, 20), random.integers(-4, 20), random.integers(-4, 20, 2)][random.integers(3)]
    middle = ROW + np.reshape(offset, (-1, 1, 1, 1))
    left, right = random.integers(-2, 9, 2)
    lengths, times = random.integers(0, KV_LENGTH + 2, 2), [random.random((2, n)) for n in (Q_LENGTH, KV_LENGTH)]
    counts = random.integers(0, 5, (2, 2, 3))
    ids = [
        np.stack([np.searchsorted(np.cumsum(row), np.arange(n), "right") for row in x])
        for x, n in zip(counts, (Q_LENGTH, KV_LENGTH), strict=True)
    ]
    same = (ids[0][:, None, :, None] == ids[1][:, None, None]) & (ids[0] < 3)[:, None, :, None]
    close_by = abs(times[0][:, None, :, None] - times[1][:, None, None]) < 0.5
    return [
        (lambda put: CausalMask(put(offset)), middle >= COLUMN),
        (lambda put: LocalMask(left, right, put(offset)), (middle - left <= COLUMN) & (middle + right >= COLUMN)),
        (lambda put: LengthMask(put(lengths)), lengths[:, None, None, None] > COLUMN),
        (lambda put: packed(*map(put, counts), total=(Q_LENGTH, KV_LENGTH)), same),
        (lambda put: Rule(near, (put(times[0]),), (put(times[1]),)), close_by),
        (lambda put: Rule(stripes), (ROW + 2 * COLUMN) % 3 != 0),
    ][random.integers(6)]  # fmt: skip


def joined(random, leaves):
    if leaves == 1:
        make, dense = leaf(random)
        return (lambda put: ~make(put), ~dense) if random.random() < 0.3 else (make, dense)
    (one, dense), (two, other) = joined(random, leaves - leaves // 2), joined(random, leaves // 2)
    if random.random() < 0.5:
        return lambda put: one(put) & two(put), dense & other
    return lambda put: one(put) | two(put), dense | other


COMBINATIONS = [joined(np.random.default_rng(seed), 1 + seed % 5) for seed in range(24)]


def formula(dense):
    """Output and gradients of query, key and value, in float64; a fully masked row is the mean of all values."""
    query, key, value, doutput = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (QUERY, KEY, VALUE, COTANGENT))
    turned = functools.partial(np.swapaxes, axis1=-1, axis2=-2)
    logits = np.where(dense, query @ turned(key) / np.sqrt(8), -1e300)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    output, dweights = weights @ value, doutput @ turned(value)
    dlogits = np.where(dense, weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True)), 0) / np.sqrt(8)
    return [x.swapaxes(1, 2) for x in (output, dlogits @ key, turned(dlogits) @ query, turned(weights) @ doutput)]


def close(library, found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(library.get(x), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", range(24))
def test_combination(library, number, monkeypatch):
    """JAX, which compiles for seconds, has every sixth in tiles. So small, None is exact but on PyTorch."""
    make, dense = COMBINATIONS[number]
    put, placed = library.put, [library.put(x) for x in (QUERY, KEY, VALUE)]
    mask = make(lambda x: put(x) if isinstance(x, np.ndarray) else int(x))
    if library.name != "jax":
        monkeypatch.setattr(type(backend_of(placed[0]).tiles), "sizes", lambda self, block, ruled: (5, 6))
    tiled, chosen = library.name != "jax" or number % 6 == 0, library.name == "torch"
    for name in ("exact", *["tiled"] * tiled, *[None] * chosen):
        found = aa.dot_product_attention(*placed, mask=mask, implementation=name)
        close(library, [found], formula(dense)[:1])


@pytest.mark.parametrize("number", [9, 17])
def test_gradients_of_a_combination(library, number):
    make, dense = COMBINATIONS[number]
    put, placed = library.put, [library.put(x) for x in (QUERY, KEY, VALUE)]
    mask = make(lambda x: put(x) if isinstance(x, np.ndarray) else int(x))
    output, pullback = aa.dot_product_attention_vjp(*placed, mask=mask)
    close(library, [output, *pullback(put(COTANGENT))[:3]], formula(dense))

    def call(*arrays):
        return aa.dot_product_attention(*arrays, mask=mask, implementation="tiled")

    if library.name == "jax":
        output, pullback = jax.vjp(jax.jit(call), *placed)
        close(library, [output, *pullback(jnp.asarray(COTANGENT))], formula(dense))
    if library.name == "torch":
        output, pullback = torch.func.vjp(call, *placed)
        close(library, [output, *pullback(torch.asarray(COTANGENT))], formula(dense))


def test_the_combinations_differ():
    """Most have rows without a key, and none is trivial."""
    shares = [np.broadcast_to(dense, (2, 1, Q_LENGTH, KV_LENGTH)).mean() for _, dense in COMBINATIONS]
    assert len({round(share, 6) for share in shares}) > 18
    assert np.quantile(shares, 0.2) > 0.02
    assert np.quantile(shares, 0.8) < 0.98
