"""Masks by rule, and the mask helpers, against Flax on each library."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import anyattention as aa
from anyattention._src.registry import backend_of
from anyattention._src.rules import short
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
    with pytest.raises(TypeError, match="offset of CausalMask must be an integer or an array"):
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
    """They are pytrees from that import on."""
    code = """
from anyattention.masks import CausalMask, LengthMask
from anyattention import dot_product_attention
import numpy as np
masks = CausalMask(), CausalMask() & LengthMask(np.array([2]))
import jax, jax.numpy as jnp
x = jnp.ones((1, 3, 1, 4))
assert len(jax.tree.leaves(masks)) == 1
for mask in masks:
    jax.jit(lambda x, mask: dot_product_attention(x, x, x, mask=mask))(x, mask)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- integers of every dtype ---

WIDE = {  # lengths and ids in a dtype, some beyond 32 bits where it has them; what they denote
    dtype: (
        np.array([40, np.iinfo(dtype).max], dtype),
        np.where(QUERY_IDS > 2, np.array(np.iinfo(dtype).max, dtype), QUERY_IDS.astype(dtype)),
    )
    for dtype in ("uint8", "int8", "uint16", "uint32", "int64", "uint64")
}


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("dtype", WIDE)
def test_integers_of_every_dtype(library, dtype, implementation, arrays):
    """Lengths and ids as tokenizers and Arrow hand them out, of the library and as guests, beside ids of int32."""
    lengths, ids = WIDE[dtype]
    other = np.where(KV_IDS > 2, -1, KV_IDS).astype(np.int32)
    placed = [library.put(x) for x in arrays]
    for put in (library.put, np.asarray):
        if library.name == "jax" and put is library.put and dtype.endswith("64"):
            continue  # which JAX has not, with x64 off
        masks = {
            "lengths": (LengthMask(put(lengths)), lengths[:, None, None, None] > COLUMN),
            "ids": (SegmentMask(put(ids), put(KV_IDS.astype(dtype))), ids[:, None, :, None] == KV_IDS[:, None, None]),
            "unlike": (SegmentMask(put(ids), put(other)), ids[:, None, :, None].astype(object) == other[:, None, None]),
        }
        for name, (mask, dense) in masks.items():
            expected = linen.dot_product_attention(*arrays, mask=dense.astype(bool))
            actual = aa.dot_product_attention(*placed, mask=mask, implementation=implementation)
            np.testing.assert_allclose(library.get(actual), expected, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_guests_beyond_32_bits_on_jax(arrays, implementation):
    """JAX keeps the last 32 bits, which would be other lengths and ids."""
    ids, other = (x.astype(np.int64) * 2**40 - 2**45 for x in (QUERY_IDS, KV_IDS))
    for mask, dense in (
        (~SegmentMask(ids, other) | CausalMask(), ~SEGMENTS | CAUSAL),
        (SegmentMask(ids, jnp.asarray(KV_IDS)), np.zeros((Q_LENGTH, KV_LENGTH), bool)),
        (
            LengthMask(np.array([2**40, 3]), np.array([2**32, 2**32 + 1])),
            np.array([KV_LENGTH, 3])[:, None, None, None] > COLUMN,
        ),
        (LengthMask(np.int64(2**40)), np.ones(KV_LENGTH, bool)),
    ):
        expected = linen.dot_product_attention(*arrays, mask=dense)
        actual = aa.dot_product_attention(*map(jnp.asarray, arrays), mask=mask, implementation=implementation)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


# --- as values ---


def test_masks_compare_by_value():
    """Numbers do, arrays are themselves alone; so masks are keys, and JAX's static arguments."""
    lengths = np.array([3, 4])
    assert CausalMask() == CausalMask(0) != CausalMask(1)
    assert CausalMask(1) != LocalMask(1, 0)
    assert len({CausalMask(), CausalMask(0), ~LocalMask(1, 2), ~LocalMask(1, 2), LocalMask(1, 2)}) == 3
    assert CausalMask() & LengthMask(lengths) == CausalMask() & LengthMask(lengths)
    assert LengthMask(lengths) != LengthMask(lengths.copy())
    assert hash(CausalMask() & lengths) == hash(CausalMask() & lengths)
    traces = []

    @functools.partial(jax.jit, static_argnames="mask")
    def attend(x, mask):
        traces.append(mask)
        return aa.dot_product_attention(x, x, x, mask=mask)

    for _ in range(2):
        attend(jnp.ones((1, 4, 1, 4)), mask=CausalMask() & LocalMask(1, 1))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (CausalMask(), "CausalMask(0)"),
        (CausalMask(0) & LengthMask(np.zeros(3, int)), "CausalMask(0) & LengthMask(array(3,))"),
        (~(CausalMask() & np.eye(3)), "~(CausalMask(0) & array(3, 3))"),
        (~~LocalMask(1, 0), "~~LocalMask(1, 0)"),
        ((CausalMask() | LocalMask(1, 2)) & ~CausalMask(), "(CausalMask(0) | LocalMask(1, 2)) & ~CausalMask(0)"),
        (LengthMask([3], [2]) | CausalMask() | np.eye(2), "LengthMask([3], [2]) | CausalMask(0) | array(2, 2)"),
        (SegmentMask(jnp.zeros((1, 2)), np.zeros(3)), "SegmentMask(array(1, 2), array(3,))"),
    ],
    ids=str,
)
def test_masks_are_shown_as_they_are_written(mask, text):
    assert repr(mask) == str(mask) == text


def test_none_among_masks(arrays):
    """As in Flax's `combine_masks` it is no mask; beside `|` it would mean that all is visible."""
    mask = CausalMask()
    assert mask & None is mask
    assert None & mask is mask
    with pytest.raises(TypeError, match=r"CausalMask\(0\) \| None: .* pass mask=None"):
        mask | None
    for scalar, dense in ((True, CAUSAL), (False, CAUSAL & False)):
        for implementation in ("exact", "tiled"):
            actual = aa.dot_product_attention(*arrays, mask=mask & scalar, implementation=implementation)
            np.testing.assert_allclose(actual, linen.dot_product_attention(*arrays, mask=dense), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CausalMask() & CausalMask, r"the class CausalMask: pass CausalMask\(\.\.\.\)"),
        (lambda: CausalMask() & [True], "a list: pass an array"),
        (lambda: "causal" | CausalMask(), "a str: pass an array"),
        (lambda: LengthMask(None), "kv_lengths of LengthMask must be an array of integers, got None"),
        (lambda: SegmentMask("ids", [1]), "query_ids of SegmentMask must be an array of integers, got 'ids'"),
        (lambda: LocalMask(None, 1), "left of LocalMask must be an integer"),
        (lambda: aa.combine_masks(np.eye(2), CausalMask()), r"masks\[1\] is CausalMask\(0\).* CausalMask\(0\) & other"),
        (lambda: aa.combine_masks([1]), r"masks\[0\] must be an array"),
        (lambda: aa.make_causal_mask(CausalMask()), "x must be an array, got the mask by rule"),
        (lambda: aa.make_attention_mask(None, np.ones(2)), "query_input must be an array, got None"),
        (lambda: aa.make_causal_mask(np.ones(2), dtype="bf16"), "dtype='bf16' .* such as 'bfloat16'"),
        (lambda: aa.make_causal_mask(torch.ones(2), dtype="fp32"), "dtype='fp32' .* such as 'float32'"),
        (lambda: aa.make_causal_mask(jnp.ones(2), dtype="nonsense"), "dtype='nonsense' .* such as 'float32'"),
        (lambda: linen.combine_masks(CausalMask(), jnp.ones((1, 5, 5))), "write `mask & other` to join"),
    ],
)
def test_what_is_no_mask(make, sentence):
    with pytest.raises(TypeError, match=sentence):
        make()


def test_lengths_as_kernels_take_them(library):
    for dtype in ("int8", "uint16", "uint32", "int64", "uint64"):
        largest = np.iinfo(dtype).max
        if library.name == "jax" and dtype.endswith("64"):
            continue
        found = short(backend_of(library.put(HEADS)).arrays, library.put(np.array([0, 5, largest], dtype)))
        assert library.get(found).tolist() == [0, 5, min(largest, 2**31 - 1)]
        assert library.get(found).dtype == np.int32


@pytest.mark.parametrize("put", [np.asarray, jnp.asarray, torch.asarray])
def test_lengths_and_ids_that_are_no_integers(put):
    """A boolean mask of padding is no length, nor is a number with a fraction."""
    x, padding, halves = (put(y) for y in (np.ones((2, 3, 1, 4), np.float32), TOKENS > 0, np.full((2, 3), 0.5)))
    for mask, message in (
        (LengthMask(padding[:, 0]), "kv_lengths of .* must be integers, got bool"),
        (LengthMask(put(np.array([2, 1])), halves[:, 0]), "query_lengths of .* must be integers, got float"),
        (SegmentMask(halves, halves), "query_ids of .* must be integers, got float"),
    ):
        for implementation in (None, "tiled"):
            with pytest.raises(TypeError, match=message):
                aa.dot_product_attention(x, x, x, mask=mask, implementation=implementation)
        with pytest.raises(TypeError, match=message):
            mask.to_array(3, 3)
