"""Masks by rule, and the mask helpers, against Flax on each library."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import anyattention as aa
from anyattention._src.registry import backend_of
from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask

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


# --- masks by rule, against Flax with the dense mask that each denotes ---

Q_LENGTH, KV_LENGTH = 37, 53
ROW, COLUMN = np.arange(Q_LENGTH)[:, None], np.arange(KV_LENGTH)
RANDOM = np.random.default_rng(0)
QUERY_IDS, KV_IDS = (np.sort(RANDOM.integers(0, 5, (2, length))) for length in (Q_LENGTH, KV_LENGTH))
KV_LENGTHS, QUERY_LENGTHS = np.asarray([0, 40]), np.asarray([30, 37])
HEADS = RANDOM.random((3, 1, KV_LENGTH)) < 0.7
CAUSAL, SEGMENTS = COLUMN <= ROW, (QUERY_IDS[:, :, None] == KV_IDS[:, None])[:, None]
LENGTHS = KV_LENGTHS[:, None, None, None] > COLUMN
RULES = {  # name: the mask, given how to make arrays; what it denotes
    "causal": (lambda put: CausalMask(), CAUSAL),
    "causal, some see nothing": (lambda put: CausalMask(-9), COLUMN <= ROW - 9),
    "causal, all see all": (lambda put: CausalMask(100), COLUMN <= ROW + 100),
    "local": (lambda put: LocalMask(3, 2), (COLUMN >= ROW - 3) & (COLUMN <= ROW + 2)),
    "local, ahead": (lambda put: LocalMask(-30, 60), (COLUMN >= ROW + 30) & (COLUMN <= ROW + 60)),
    "segments": (lambda put: SegmentMask(put(QUERY_IDS), put(KV_IDS)), SEGMENTS),
    "lengths": (lambda put: LengthMask(put(KV_LENGTHS)), LENGTHS),
    "both lengths": (
        lambda put: LengthMask(put(KV_LENGTHS), put(QUERY_LENGTHS)),
        LENGTHS & (QUERY_LENGTHS[:, None, None, None] > ROW),
    ),
    "and": (lambda put: CausalMask() & SegmentMask(put(QUERY_IDS), put(KV_IDS)), CAUSAL & SEGMENTS),
    "or, not": (lambda put: ~CausalMask() | LengthMask(put(KV_LENGTHS)), ~CAUSAL | LENGTHS),
    "beside an array": (
        lambda put: put(HEADS.astype(np.float32)) & LocalMask(9, 0),
        HEADS & CAUSAL & (COLUMN >= ROW - 9),
    ),
    "guests": (lambda put: LengthMask(KV_LENGTHS) | CausalMask(), LENGTHS | CAUSAL),
}  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(1)
    shapes = (2, Q_LENGTH, 3, 8), (2, KV_LENGTH, 3, 8), (2, KV_LENGTH, 3, 8)
    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("name", RULES)
def test_rule(library, name, implementation, arrays, monkeypatch):
    make, dense = RULES[name]
    expected = linen.dot_product_attention(*arrays, mask=dense)
    mask, placed = make(library.put), [library.put(x) for x in arrays]
    for size in [(16, 16)] if library.name == "jax" else [(3, 2), (16, 16), (512, 512)]:
        monkeypatch.setattr(type(backend_of(placed[0]).tiles), "sizes", lambda self, block, ruled, size=size: size)
        actual = aa.dot_product_attention(*placed, mask=mask, implementation=implementation)
        if library.name == "jax" and implementation == "exact":
            np.testing.assert_array_equal(actual, expected)
        else:
            np.testing.assert_allclose(library.get(actual), expected, rtol=0, atol=2e-6)
    both = aa.dot_product_attention(*placed, mask=mask, is_causal=True, implementation=implementation)
    expected = linen.dot_product_attention(*arrays, mask=dense & CAUSAL)
    np.testing.assert_allclose(library.get(both), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["causal, some see nothing", "and", "both lengths"])
def test_rule_under_transformations_of_jax(name, arrays):
    make, dense = RULES[name]

    def loss(function, mask):
        return lambda arrays: (function(*arrays, mask=mask) ** 2).sum()

    @jax.jit
    def ours(arrays, mask):
        tiled = functools.partial(aa.dot_product_attention, implementation="tiled")
        return jax.value_and_grad(loss(tiled, mask))(arrays)

    expected = jax.value_and_grad(loss(linen.dot_product_attention, dense))(arrays)
    for a, b in zip(jax.tree.leaves(ours(arrays, make(jnp.asarray))), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_mapped_lengths(arrays):
    query, key, value = (x[0] for x in arrays)
    lengths = np.arange(0, KV_LENGTH, 10)

    def ours(length):
        return aa.dot_product_attention(query, jnp.asarray(key), value, mask=LengthMask(length), implementation="tiled")

    expected = [linen.dot_product_attention(query, key, value, mask=n > COLUMN) for n in lengths]
    np.testing.assert_allclose(jax.vmap(ours)(jnp.asarray(lengths)), expected, atol=2e-6)


@pytest.mark.parametrize("name", RULES)
def test_to_array(library, name):
    make, dense = RULES[name]
    mask = make(library.put).to_array(Q_LENGTH, KV_LENGTH)
    np.testing.assert_array_equal(*np.broadcast_arrays(np.asarray(mask), dense))


def test_no_accidents(arrays):
    mask = CausalMask()
    for use in (np.asarray, bool, len, lambda mask: linen.combine_masks(mask, mask), lambda mask: mask.ndim):
        with pytest.raises(TypeError, match="to_array"):
            use(mask)
    with pytest.raises(TypeError, match="offset must be a Python integer"):
        CausalMask(1.0)


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (SegmentMask(QUERY_IDS[:, 1:], KV_IDS), r"query_ids of SegmentMask.* \(2, 36\).* q_length is 37"),
        (SegmentMask(QUERY_IDS, KV_IDS[:, 1:]), r"kv_ids of SegmentMask.* \(2, 52\).* kv_length is 53"),
        (LengthMask(np.zeros(3, int)), r"kv_lengths of LengthMask.* \(3,\).* batch axes \(2,\)"),
        (CausalMask() & LengthMask(np.zeros((2, 2), int)), r"kv_lengths of LengthMask.* \(2, 2\)"),
    ],
    ids=str,
)
def test_rule_that_does_not_fit(library, mask, sentence, arrays):
    for implementation in ("exact", "tiled"):
        with pytest.raises(aa.ShapeError, match=sentence):
            aa.dot_product_attention(*map(library.put, arrays), mask=mask, implementation=implementation)


def test_masks_made_before_jax_is_imported():
    """They are pytrees once a call has seen an array of JAX."""
    code = """
from anyattention.masks import CausalMask, LengthMask
from anyattention import dot_product_attention
import numpy as np
masks = CausalMask(), CausalMask() & LengthMask(np.array([2]))
import jax, jax.numpy as jnp
x = jnp.ones((1, 3, 1, 4))
dot_product_attention(x, x, x)
for mask in masks:
    jax.jit(lambda x, mask: dot_product_attention(x, x, x, mask=mask))(x, mask)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
