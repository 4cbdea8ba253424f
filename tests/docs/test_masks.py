"""The page about masks and biases: its pictures, and what it says beside its code."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from anyattention import ShapeError, dot_product_attention, dot_product_attention_vjp, masks

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "pictures"
X = np.random.default_rng(0).standard_normal((1, 8, 2, 4), dtype=np.float32)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["exact", "tiled"])


def test_the_pictures_are_those_of_the_code():
    """``python docs/pictures.py`` draws them anew."""
    drawn = runpy.run_path(str(DOCS / "pictures.py"))["pictures"]()
    assert drawn == {name: (PICTURES / name).read_text() for name in drawn}
    assert len(drawn) >= 12


def test_a_picture_has_a_cell_where_a_key_is_visible():
    path = re.search(r'fill-opacity="1" d="(.*?)"', (PICTURES / "causal-mask.svg").read_text())[1]
    assert path.count("M") == np.tri(8).sum()


@IMPLEMENTATIONS
def test_queries_beyond_their_length_are_fully_masked(implementation):
    y = dot_product_attention(X, X, X, mask=masks.LengthMask([3], [5]), implementation=implementation)
    np.testing.assert_allclose(y[:, 5:], np.broadcast_to(X.mean(axis=1, keepdims=True), y[:, 5:].shape), atol=1e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("number", "expected"), [(-np.inf, np.nan), (np.finfo(np.float32).min, X.mean(axis=1))])
def test_padding_as_a_bias_of_whole_rows(implementation, number, expected):
    y = dot_product_attention(X, X, X, bias=np.full(8, number, np.float32), implementation=implementation)
    np.testing.assert_allclose(y, np.broadcast_to(np.asarray(expected), (1, 8, *X.shape[2:])), atol=1e-6)


def test_gradients_of_a_fully_masked_row():
    mask, bias = np.tri(8, dtype=bool), np.zeros((2, 8, 8), np.float32)
    mask[2] = False
    only_row_2 = np.zeros_like(X)
    only_row_2[:, 2] = X[:, 2]
    _, pullback = dot_product_attention_vjp(X, X, X, bias, mask)
    dquery, dkey, dvalue, dbias = pullback(only_row_2)
    assert not dquery.any()
    assert not dkey.any()
    assert not dbias.any()
    np.testing.assert_allclose(dvalue, np.broadcast_to(X[:, 2:3] / 8, X.shape), atol=1e-7)


@pytest.mark.parametrize("heads", [1, 4])
def test_masks_of_grouped_heads_have_the_heads_of_the_query(heads):
    query = np.concatenate([X, X], axis=2)
    mask = np.random.default_rng(1).random((heads, 8, 8)) < 0.7
    y = dot_product_attention(query, X, X, mask=mask)
    repeated = np.repeat(X, 2, axis=2)
    np.testing.assert_allclose(y, dot_product_attention(query, repeated, repeated, mask=mask), atol=1e-6)
    with pytest.raises(ShapeError):
        dot_product_attention(query, X, X, mask=mask[:1].repeat(3, axis=0))
