"""The mask helpers against Flax's, on each library."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import anyattention as aa

TOKENS = np.asarray([[2.0, 3.0, 0.0], [1.0, 0.0, 0.5]], dtype=np.float32)
KEYS = np.asarray([[5.0, 1.0], [0.25, 0.0]], dtype=np.float32)


def same(library, actual, expected):
    assert isinstance(actual, library.array_type)
    actual = library.get(actual)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("options", [{}, {"extra_batch_dims": 2}, {"dtype": bool}, {"dtype": "int32"}], ids=str)
def test_make_attention_mask(library, options):
    expected = linen.make_attention_mask(jnp.asarray(TOKENS), jnp.asarray(KEYS), **options)
    same(library, aa.make_attention_mask(library.put(TOKENS), library.put(KEYS), **options), np.asarray(expected))


@pytest.mark.parametrize("options", [{}, {"extra_batch_dims": 1}, {"dtype": bool}], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 4), (0,)], ids=str)
def test_make_causal_mask(library, shape, options):
    x = np.full(shape, np.nan, dtype=np.float32)
    expected = linen.make_causal_mask(jnp.asarray(x), **options)
    same(library, aa.make_causal_mask(library.put(x), **options), np.asarray(expected))


def test_combine_masks(library):
    one, two = np.asarray([[0.5, 0.0]], dtype=np.float32), np.asarray([[2.0], [0.0]], dtype=np.float32)
    for masks in ((one,), (one, None, two), (one, two, one)):
        expected = np.asarray(linen.combine_masks(*masks))
        same(library, aa.combine_masks(*(None if m is None else library.put(m) for m in masks)), expected)
    assert aa.combine_masks(None, None) is None
    with pytest.raises(aa.ShapeError, match="masks must have same rank"):
        aa.combine_masks(library.put(one), library.put(one[0]))
