"""Ids of sequences that are laid end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention.masks import CausalMask, SegmentMask, packed

RANDOM = np.random.default_rng(0)
LENGTHS, KV_LENGTHS = np.array([[3, 0, 4], [1, 2, 2]]), np.array([[2, 2, 1], [0, 5, 4]])


def ids(lengths, total, padding):
    """By a loop over sequences."""
    rows = [np.repeat(np.arange(len(row)), row).tolist() for row in lengths]
    return np.array([row + [padding] * (total - len(row)) for row in rows])


def test_ids(library):
    for put in (library.put, np.ndarray.tolist):
        mask = packed(put(LENGTHS), put(KV_LENGTHS), total=(8, 11))
        assert isinstance(mask, SegmentMask)
        np.testing.assert_array_equal(np.asarray(mask.query_ids), ids(LENGTHS, 8, -1))
        np.testing.assert_array_equal(np.asarray(mask.kv_ids), ids(KV_LENGTHS, 11, -2))
        assert type(mask.kv_ids) is (library.array_type if put is library.put else np.ndarray)
    alone = packed(library.put(LENGTHS.astype(np.uint8)))  # the longest entry is the total
    np.testing.assert_array_equal(np.asarray(alone.query_ids), ids(LENGTHS, 7, -1))
    assert np.asarray(packed(library.put(LENGTHS[0])).kv_ids).tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert np.asarray(packed(library.put(LENGTHS[0, :0]), total=2).kv_ids).tolist() == [-2, -2]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
def test_traced_lengths():
    def kv_ids(lengths):
        return packed(lengths, total=9).kv_ids

    compiled = torch.compile(kv_ids, fullgraph=True, backend="eager")
    for call, xp in (
        (jax.jit(kv_ids), jnp),
        (jax.vmap(kv_ids), jnp),
        (compiled, torch),
        (torch.func.vmap(kv_ids), torch),
    ):
        np.testing.assert_array_equal(call(xp.asarray(LENGTHS)), ids(LENGTHS, 9, -2))
    with pytest.raises(TypeError, match="total must be given where the values of lengths are not known"):
        jax.jit(lambda lengths: packed(lengths).kv_ids)(LENGTHS)


def test_each_sequence_is_attended_alone(library):
    """With causality too, which counts on; what pads the end does not show, and gets the mean of all values."""
    x = RANDOM.standard_normal((2, 9, 2, 8), dtype=np.float32)
    padding = np.arange(9) >= LENGTHS.sum(axis=1)[:, None]
    spoilt = np.where(padding[:, :, None, None], np.float32(np.nan), x)
    placed = [library.put(y) for y in (x, spoilt, spoilt)]
    for more in (None, CausalMask()):
        found = aa.dot_product_attention(*placed, mask=packed(LENGTHS, total=9) & more, implementation="tiled")
        for b, row in enumerate(LENGTHS):
            starts = np.cumsum(row) - row
            for start, length in zip(starts, row, strict=True):
                part = x[b, start : start + length]
                expected = aa.dot_product_attention(part, part, part, is_causal=more is not None)
                np.testing.assert_allclose(library.get(found)[b, start : start + length], expected, rtol=0, atol=2e-6)
    clean = aa.dot_product_attention(*[library.put(x)] * 3, mask=packed(LENGTHS, total=9), implementation="tiled")
    mean = np.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
    np.testing.assert_allclose(library.get(clean)[padding], mean[padding], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (([1.5],), TypeError, "lengths must be integers, got float"),
        ((None,), TypeError, "lengths must be an array, got None"),
        (([True],), TypeError, "lengths must be integers, got bool"),
        ((3,), aa.ShapeError, r"lengths must be \[n\] or \[batch..., n\], got shape \(\)"),
        (([1, 2], [3]), aa.ShapeError, "lengths has 2 sequences, but kv_lengths has 1"),
        (([-1, 2],), ValueError, "lengths must not be negative, got -1"),
        (([2, 2], [2, -2]), ValueError, "kv_lengths must not be negative, got -2"),
        (([[2, 2], [1, 1]], None, 3), ValueError, "lengths are 4 in sum, but total is 3"),
        (([2, 2], [3, 3], (4, 5)), ValueError, "kv_lengths are 6 in sum, but total is 5"),
        (([2, 2], None, 4.0), TypeError, "total must be an integer, or one for queries and one for keys, got 4.0"),
    ],
    ids=str,
)
def test_wrong(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        packed(*arguments)
    if isinstance(arguments[0], list):
        with pytest.raises(error, match=sentence):
            packed(*(torch.tensor(x) if isinstance(x, list) else x for x in arguments))
