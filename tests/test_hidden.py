"""What a mask hides from every query of a batch entry never shows; what it hides from some is Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention._src.registry import backend_of
from anyattention.masks import CausalMask, LengthMask, LocalMask, Rule, SegmentMask
from anyattention_conformance import flax_answer, flax_attention

ROWS, COLUMNS = 9, 14
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE = (RANDOM.standard_normal((2, n, 2, 8), dtype=np.float32) for n in (ROWS, COLUMNS, COLUMNS))
COTANGENT = RANDOM.standard_normal(QUERY.shape, dtype=np.float32)
IDS = np.array([[0] * 5 + [1] * 5 + [-1] * 4] * 2)
DENSE = RANDOM.random((2, 2, ROWS, COLUMNS)) < 0.7
DENSE[..., 0], DENSE[..., 11:] = True, False
KINDS = {  # a mask, and the keys that it hides from every query
    "causal": (CausalMask(), slice(ROWS, None)),  # the unwritten part of a cache
    "window": (LocalMask(3, 2), slice(ROWS + 2, None)),
    "lengths": (LengthMask(np.array([10, 12])), slice(12, None)),
    "both lengths": (LengthMask(np.array([10, 12]), np.array([9, 9])), slice(12, None)),
    "offsets and a rule": (
        LocalMask(3, 1, np.array([0, 1])) & Rule(lambda i, j, kept: kept > 0.5, (), (np.arange(COLUMNS) < 10.5,)),
        slice(11, None),
    ),
    "segments": (SegmentMask(IDS[:, :ROWS], IDS), slice(10, None)),
    "causal segments": (CausalMask(3) & SegmentMask(IDS[:, :ROWS], IDS), slice(10, None)),
    "either": (CausalMask() | LengthMask(np.array([11, 3])), slice(11, None)),
    "not": (~LengthMask(np.array([2, 3])), slice(0, 2)),
    "padding": (np.arange(COLUMNS) < np.array([10, 12])[:, None, None, None], slice(12, None)),
    "dense": (DENSE, slice(11, None)),
}
BAD = {"nan": np.nan, "inf": np.inf, "huge": 3e38}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, library):
    tiles = type(backend_of(library.put(QUERY)).tiles)
    monkeypatch.setattr(tiles, "sizes", lambda self, block, ruled: (4, 5))


def answer(library, key, value, mask, implementation):
    """Output and gradients of query, key and value, by the library's own differentiation, NumPy's by the public vjp."""
    placed = [library.put(x) for x in (QUERY, key, value)]
    if isinstance(mask, np.ndarray):
        mask = library.put(mask)
    if library.name == "numpy":
        output, pullback = aa.dot_product_attention_vjp(*placed, mask=mask)
        return [aa.dot_product_attention(*placed, mask=mask, implementation=implementation), *pullback(COTANGENT)[:3]]
    if library.name == "jax":
        call = jax.jit(lambda *x: aa.dot_product_attention(*x, mask=mask, implementation=implementation))
        output, pullback = jax.vjp(call, *placed)
        return [np.asarray(x) for x in (output, *pullback(jnp.asarray(COTANGENT)))]
    leaves = [x.requires_grad_() for x in placed]
    output = aa.dot_product_attention(*leaves, mask=mask, implementation=implementation)
    return [output.detach().numpy(), *(x.numpy() for x in torch.autograd.grad(output, leaves, torch.tensor(COTANGENT)))]


def spoilt(keys, with_what):
    key, value = KEY.copy(), VALUE.copy()
    key[:, keys] = value[:, keys] = with_what
    return key, value


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_query_sees_never_shows(library, kind):
    mask, keys = KINDS[kind]
    dense = mask if isinstance(mask, np.ndarray) else np.asarray(mask.to_array(ROWS, COLUMNS))
    clean = dict(zip(("query", "key", "value"), (QUERY, *spoilt(keys, 0.0)), strict=True))
    flax = flax_answer(clean | {"mask": np.broadcast_to(dense, (2, 2, ROWS, COLUMNS))}, COTANGENT)
    expected = [flax.output, *(flax.gradients[name] for name in ("query", "key", "value"))]
    served = (
        ["tiled", "fused"]
        if library.name == "torch" and kind in ("causal", "lengths", "padding", "dense")
        else ["tiled"]
    )
    for bad in ["nan"] if library.name == "jax" and kind not in ("lengths", "causal") else BAD:
        for implementation in served:
            found = answer(library, *spoilt(keys, BAD[bad]), mask, implementation)
            for name, x, y in zip(("output", "dquery", "dkey", "dvalue"), found, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6, err_msg=f"{implementation} {bad} {name}")


@pytest.mark.parametrize("bad", BAD)
def test_fully_masked_rows_average_what_is_hidden_too(library, bad):
    """As in Flax: entry 1 shows no key to any query, entry 0 some."""
    mask = LengthMask(np.array([10, 0]))
    key, value = spoilt(slice(10, None), BAD[bad])
    flax = flax_attention(
        query=QUERY, key=key, value=value, mask=np.arange(COLUMNS) < np.array([10, 0])[:, None, None, None]
    )
    for implementation in ["tiled", "fused"] if library.name == "torch" else ["tiled"]:
        found = aa.dot_product_attention(
            *map(library.put, (QUERY, key, value)), mask=mask, implementation=implementation
        )
        found = library.get(found)
        assert np.isfinite(found[0]).all()
        np.testing.assert_allclose(found[1], np.asarray(flax)[1], rtol=1e-5)


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("kind", ["causal", "window", "segments", "dense"])
def test_what_some_queries_may_not_see_is_flax(library, kind, bad):
    """A weight of zero times NaN is NaN."""
    mask, _ = KINDS[kind]
    dense = mask if isinstance(mask, np.ndarray) else np.asarray(mask.to_array(ROWS, COLUMNS))
    value = VALUE.copy()
    value[0, 4, 1, 3] = BAD[bad]
    flax = np.asarray(
        flax_attention(query=QUERY, key=KEY, value=value, mask=np.broadcast_to(dense, (2, 2, ROWS, COLUMNS)))
    )
    found = aa.dot_product_attention(*map(library.put, (QUERY, KEY, value)), mask=mask, implementation="tiled")
    assert np.isnan(flax).any()
    np.testing.assert_allclose(library.get(found), flax, rtol=1e-5, atol=1e-6)
