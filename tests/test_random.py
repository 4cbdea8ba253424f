"""Our threefry against JAX's own, bit for bit."""

import itertools

import jax
import jax.extend.random
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention._src import threefry


@pytest.mark.parametrize("seed", [0, 1, 12345, -1, 2**31, 2**40 + 5, 2**63 - 1])
def test_key(seed):
    np.testing.assert_array_equal(aa.random.key(seed), jax.random.key_data(jax.random.key(seed)))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_split_and_fold_in(seed):
    key = jax.random.key(seed)
    np.testing.assert_array_equal(
        aa.random.split(aa.random.key(seed), 5), jax.random.key_data(jax.random.split(key, 5))
    )
    for data in (0, 5, 2**32 - 1):
        folded = aa.random.fold_in(aa.random.key(seed), data)
        np.testing.assert_array_equal(folded, jax.random.key_data(jax.random.fold_in(key, data)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 3, 5), (2, 3, 4, 5), (33, 65)])
@pytest.mark.parametrize("p", [0.5, 0.9, 1e-3, 1.0, 0.0, np.float32(0.7), np.float16(0.7)], ids=repr)
def test_bernoulli(shape, p):
    for seed in range(4):
        expected = np.asarray(jax.random.bernoulli(jax.random.key(seed), p, shape))
        key = aa.random.key(seed)
        np.testing.assert_array_equal(aa.random.bernoulli(key, p, shape), expected)
        key = torch.tensor(key.astype(np.int64))
        np.testing.assert_array_equal(aa.random.bernoulli(key, p, shape).numpy(), expected)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: aa.random.key("a"), "a seed must be an integer, got str"),
        (lambda: aa.random.split(3), r"a key must be an array, got int: make one with anyattention.random.key\(seed\)"),
        (lambda: aa.random.split(jax.random.key(0)), r"pass jax.random.key_data\(key\)"),
        (lambda: aa.random.fold_in(aa.random.key(0), "a"), "data must be an integer, got str"),
        (lambda: aa.random.bernoulli(None, 0.5, (3,)), "a key must be an array, got NoneType"),
        (lambda: aa.random.bernoulli(aa.random.key(0), 0.5, 3), r"a sequence of integers, such as \(3,\), got 3"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(TypeError, match=sentence):
        call()


def test_indices_beyond_32_bits():
    shape, side = (2**17, 2**17), 3
    start = tuple(size - side for size in shape)
    import array_api_compat.numpy as xp

    counts = threefry.counts(xp, aa.random.key(3), (side, side), start, shape)
    index = np.ravel_multi_index(np.indices((side, side)).reshape(2, -1) + np.reshape(start, (2, 1)), shape)
    assert index.max() == 2**34 - 1
    words = np.concatenate([index >> 32, index & 0xFFFFFFFF]).astype(np.uint32)
    bits = np.asarray(jax.extend.random.threefry_2x32(jax.random.key_data(jax.random.key(3)), words))
    uniform = ((bits[:9] ^ bits[9:]) >> 9) * 2.0**-23
    for p in (*uniform, *(uniform + 2.0**-23)):  # at the number itself and the next, so that every bit of it counts
        np.testing.assert_array_equal(threefry.keep_at(xp, float(p), counts).ravel(), uniform < p)


@pytest.mark.parametrize("origin", [(1, 2, 39_990, 290), (39_990, 290)])
def test_counts_of_a_part_of_more_than_32_bits(origin):
    """The bits of a part are those at its flat indices in the whole, which take two words here."""
    import array_api_compat.numpy as xp

    key, shape, whole = aa.random.key(5), (2, 3, 4, 5), (4, 7, 40_000, 40_000)
    first = (0,) * (4 - len(origin)) + origin
    whole = whole if len(origin) == 4 else (*shape[:2], *whole[2:])
    ends = [range(start, start + size) for start, size in zip(first, shape, strict=True)]
    flat = np.array([np.ravel_multi_index(x, whole) for x in itertools.product(*ends)], np.int64)
    assert flat.max() >= 2**32
    words = tuple(np.array([word], np.int32) for word in (0, 5))
    x, y = threefry.threefry2x32(words, (flat >> 32).astype(np.int32), flat.astype(np.int32))
    counts = threefry.counts(xp, key, shape, origin, whole[-len(origin) :])
    assert np.array_equal(threefry.keep_at(xp, 0.5, counts).ravel(), ((x ^ y) >> 31) == 0)
