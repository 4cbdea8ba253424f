"""Offsets of bands that are arrays, one number for each batch entry: decoding and chunked prefill with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention._src.registry import backend_of
from anyattention.masks import CausalMask, LengthMask, LocalMask

Q_LENGTH, KV_LENGTH = 7, 24
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    RANDOM.standard_normal((2, 3, n, 2, 8), dtype=np.float32) for n in (Q_LENGTH, KV_LENGTH, KV_LENGTH)
)
ROW, COLUMN = np.arange(Q_LENGTH)[:, None], np.arange(KV_LENGTH)
GRID = np.array([[3, -2, 11], [40, 0, -30]])  # some rows see nothing, and some all
ENDS = np.array([2**31 - 1, -(2**31), 0], np.int32)
FAR = np.array([2**40, -(2**40), 2**31])  # of int64
OFFSETS = {  # as it is passed, given how to make arrays; as integers
    "a Python integer": (lambda put: 5, 5),
    "a scalar of NumPy": (lambda put: np.int64(5), 5),
    "no axis": (lambda put: put(np.array(5, np.int32)), 5),
    "int8": (lambda put: put(np.array([100, -100, 4], np.int8)), np.array([100, -100, 4])),
    "uint8": (lambda put: put(np.array([200, 0, 7], np.uint8)), np.array([200, 0, 7])),
    "uint16": (lambda put: put(np.array(60000, np.uint16)), 60000),
    "uint32": (lambda put: put(np.array([2**32 - 1, 0, 7], np.uint32)), np.array([2**32 - 1, 0, 7])),
    "two axes": (lambda put: put(GRID), GRID),
    "one of two axes": (lambda put: put(GRID[:, :1]), GRID[:, :1]),
    "a guest": (lambda put: GRID[0], GRID[0]),
    "a list": (lambda put: GRID.tolist(), GRID),
    "a guest beyond 32 bits": (lambda put: FAR, FAR),
    "the least and the largest": (lambda put: put(ENDS), ENDS.astype(int)),
}


def dense(offset, left=None, right=0):
    """What a band shows, ``[2, 3, 1, q_length, kv_length]``."""
    middle = ROW + np.broadcast_to(offset, (2, 3)).astype(object)[..., None, None, None]
    return np.asarray((middle + right >= COLUMN) & ((left is None) | (middle - (left or 0) <= COLUMN)), bool)


def formula(mask, arrays=(QUERY, KEY, VALUE)):
    """Flax's attention in float64; the mean of all values where nothing is seen."""
    query, key, value = (np.asarray(x, np.float64) for x in arrays)
    logits = np.einsum("...qhd,...khd->...hqk", query, key) / np.sqrt(query.shape[-1])
    logits = np.where(mask, logits, -1e300)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return np.einsum("...hqk,...khd->...qhd", weights, value)


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_of_every_kind(library, name, monkeypatch):
    """On JAX, which compiles for seconds, tiled has two of them, in one tile."""
    make, offset = OFFSETS[name]
    placed = [library.put(x) for x in (QUERY, KEY, VALUE)]
    implementations = ["exact", "tiled"] if library.name != "jax" or name in ("two axes", "no axis") else ["exact"]
    if library.name != "jax":
        tiles = type(backend_of(placed[0]).tiles)
        monkeypatch.setattr(tiles, "sizes", lambda self, block, ruled: (4, 8))
    for mask, expected in (
        (CausalMask(make(library.put)), dense(offset)),
        (LocalMask(3, 1, make(library.put)), dense(offset, 3, 1)),
        (LocalMask(2**50, -1, make(library.put)) & CausalMask(19), dense(offset, 2**50, -1) & dense(19)),
    ):
        whole = np.asarray(mask.to_array(Q_LENGTH, KV_LENGTH))
        np.testing.assert_array_equal(*np.broadcast_arrays(whole, expected))
        for implementation in implementations:
            actual = aa.dot_product_attention(*placed, mask=mask, implementation=implementation)
            np.testing.assert_allclose(library.get(actual), formula(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_mapped_offsets(implementation):
    """One number inside `vmap`."""
    for xp, vmap in ((jnp, jax.vmap), (torch, torch.func.vmap)):

        def ours(query, key, value, offset):
            return aa.dot_product_attention(query, key, value, mask=CausalMask(offset), implementation=implementation)

        arrays = [xp.asarray(x[0]) for x in (QUERY, KEY, VALUE)]
        actual = vmap(ours)(*arrays, xp.asarray(GRID[0]))
        np.testing.assert_allclose(actual, formula(dense(GRID[0]))[0], rtol=0, atol=2e-6)
        shared = vmap(functools.partial(ours, *(x[0] for x in arrays)))(xp.asarray(GRID[0]))
        expected = formula(dense(GRID[0])[0], [x[0, :1] for x in (QUERY, KEY, VALUE)])
        np.testing.assert_allclose(shared, expected, rtol=0, atol=2e-6)


INTEGERS, BATCH = "offset of .*Mask.* must be integers, got ", "offset of .*Mask.* does not fit the batch axes"
WRONG = {
    "a number with a fraction": (lambda put: put(np.array([0.5])), TypeError, INTEGERS + "float"),
    "truth": (lambda put: put(np.array([True])), TypeError, INTEGERS + "bool"),
    "another batch": (lambda put: put(np.zeros(2, int)), aa.ShapeError, BATCH),
    "a length": (lambda put: put(np.zeros((3, Q_LENGTH), int)), aa.ShapeError, BATCH),
}


@pytest.mark.parametrize(("make", "error", "sentence"), WRONG.values(), ids=WRONG)
def test_offsets_that_do_not_fit(library, make, error, sentence):
    placed = [library.put(x) for x in (QUERY, KEY, VALUE)]
    for mask in (CausalMask(make(library.put)), LocalMask(1, 1, make(library.put))):
        for implementation in ("exact", "tiled"):
            with pytest.raises(error, match=sentence):
                aa.dot_product_attention(*placed, mask=mask, implementation=implementation)


def test_what_is_no_offset():
    for offset in (None, "3", 0.5, True, (1, 2)):
        with pytest.raises(TypeError, match="offset of CausalMask must be an integer or an array of integers"):
            CausalMask(offset)


# --- one program for all steps ---


def steps(length, chunk):
    """Queries of two entries chunk by chunk, each with where it starts, and all keys and values."""
    query, key, value = (RANDOM.standard_normal((2, length, 2, 8), dtype=np.float32) for _ in range(3))
    return [(start, query[:, start : start + chunk], key, value) for start in range(0, length, chunk)]


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("chunk", [1, 4], ids=["decode", "chunked prefill"])
def test_jax_compiles_once(implementation, chunk):
    """The second entry is 5 keys behind: its cache begins with others. Of tiled, what is unwritten is NaN."""

    @jax.jit
    def step(query, keys, values, offset):
        mask = CausalMask(offset) & LocalMask(9, 0, offset)
        return aa.dot_product_attention(query, keys, values, mask=mask, implementation=implementation)

    behind = np.array([0, 5])
    for start, query, key, value in steps(16, chunk):
        ends = start + chunk + behind
        written = (np.arange(24) < ends[:, None])[:, :, None, None]
        key, value = (np.pad(x, ((0, 0), (0, 8), (0, 0), (0, 0)), mode="wrap") for x in (key, value))
        unwritten = np.float32(np.nan if implementation == "tiled" else 0)
        found = step(query, *(np.where(written, x, unwritten) for x in (key, value)), start + behind)
        i, j = np.arange(chunk)[:, None] + (start + behind)[:, None, None, None], np.arange(24)
        expected = formula((j <= i) & (j >= i - 9), (query, key, value))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert step._cache_size() == 1


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_torch_compiles_once(implementation):
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    def call(query, key, value, offset):
        return aa.dot_product_attention(query, key, value, mask=CausalMask(offset), implementation=implementation)

    torch._dynamo.reset()
    compiled, arrays = torch.compile(call, fullgraph=True, backend=backend), [*map(torch.asarray, (QUERY, KEY, VALUE))]
    for offset in (GRID, GRID + 5, -GRID):
        np.testing.assert_allclose(compiled(*arrays, torch.asarray(offset)), formula(dense(offset)), rtol=0, atol=2e-6)
    assert len(programs) == 1


# --- what is hidden is skipped ---


@pytest.fixture
def columns(monkeypatch, library):
    """How many columns tiles have had, row by row."""
    tiles, found = type(backend_of(library.put(QUERY)).tiles), []
    logits = tiles.logits

    def counted(self, query, key, precision, precise):
        found.append(key.shape[-2] * query.shape[-2] * max(query.shape[0], key.shape[0]))
        return logits(self, query, key, precision, precise)

    monkeypatch.setattr(tiles, "logits", counted)
    monkeypatch.setattr(tiles, "sizes", lambda self, block, ruled: (128, 128))
    return found


@pytest.mark.parametrize("library", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("q_length", [1, 256], ids=["decode", "prefill"])
def test_hidden_keys_are_skipped(library, columns, q_length):
    """Of each entry by itself."""
    query, key, value = (RANDOM.standard_normal((2, n, 1, 8), dtype=np.float32) for n in (q_length, 2048, 2048))
    seen = np.array([100, 1000])
    i, j = np.arange(q_length)[:, None], np.arange(2048)
    near = (j <= i + seen[:, None, None, None]) & (j >= i + seen[:, None, None, None] - 50)
    for mask, visible in (
        (CausalMask(library.put(seen)), j <= i + seen[:, None, None, None]),
        (LocalMask(50, 0, library.put(seen)), near),
        (LengthMask(library.put(seen + 1)) & CausalMask(2000), (j <= seen[:, None, None, None]) & (i == i)),
    ):
        columns.clear()
        found = aa.dot_product_attention(*map(library.put, (query, key, value)), mask=mask, implementation="tiled")
        np.testing.assert_allclose(library.get(found), formula(visible, (query, key, value)), rtol=0, atol=2e-6)
        needed = visible.any(axis=-2).sum() * q_length
        assert sum(columns) <= needed
        assert needed < 2048 * q_length


def test_what_explain_tells():
    x = torch.zeros(2, 512, 4, 16)
    plan = aa.explain(x, x, x, mask=CausalMask(torch.tensor([3, 4])))
    assert plan.implementation == "tiled"
    assert any("sdpa: the mask would be an array of 524288 elements" in reason for reason in plan.reasons)
