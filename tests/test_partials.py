"""Attention over some of the keys, merged: what shards, pages of a cache and loops of a kernel stand on."""

import numpy as np
import pytest

import anyattention as aa
from anyattention._src import arguments, plan, registry, threefry
from anyattention._src.blocks import cut_columns
from anyattention._src.call import Dropout, Operands, Options
from anyattention._src.implementations.tiled import TILED, prepare
from anyattention._src.tiles import partials, passes
from anyattention.extend import Call

RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE = (RANDOM.standard_normal((2, n, 4, 8), dtype=np.float32) for n in (33, 47, 47))
BIAS = RANDOM.standard_normal((4, 33, 47), dtype=np.float32)
IDS = RANDOM.integers(0, 3, (2, 47))
MASKS = {
    "none": None,
    "causal": aa.masks.CausalMask(5),
    "window": aa.masks.LocalMask(9, -1),  # the first rows see nothing
    "lengths": aa.masks.LengthMask(np.array([20, 0])),
    "offsets and a rule": aa.masks.LocalMask(20, 1, np.array([14, -3]))
    | aa.masks.Rule(lambda i, j, mine, its: (mine > its) & ((i + j) % 3 == 0), (IDS[:, :33],), (IDS,)),
    "segments": aa.masks.SegmentMask(IDS[:, :33], IDS),
}


def call_of(library, rows, columns, mask, dropout, whole=True):
    """The call of some queries and keys, as a shard that knows where it lies."""
    put = library.put
    operands = [put(x[:, slice(*ends)]) for x, ends in ((QUERY, rows), (KEY, columns), (VALUE, columns))]
    cut = {33: slice(*rows), 47: slice(*columns)}
    mask = None if mask is None else mask.with_arrays(lambda x: put(x[..., cut.get(x.shape[-1], slice(None))]))
    backend = registry.backend_of(operands[0])
    key = arguments.key_of(backend, aa.random.key(3)) if dropout else None
    bias = put(BIAS[:, slice(*rows), slice(*columns)])
    origin = (rows[0], columns[0])
    options = Options(dtype="float32", dropout=dropout, whole=(33, 47))
    return Call(backend=backend, operands=Operands(*operands, bias, mask, key, origin), options=options)


def finished(call, partial):
    output = partials.finish(
        partial, passes.tiling(call.backend, call.options, "float32", None, (), prepare(call)[1]).keep_prob
    )
    return call.backend.xp.permute_dims(output, (0, 2, 1, 3))


@pytest.mark.parametrize("dropout", [None, Dropout(0.7, True), Dropout(0.7, False)], ids=["", "dropout", "each"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_shards_merge_into_the_whole(library, mask, dropout):
    """Masks, biases and dropout bits take positions in the whole; fully masked rows average all shards."""
    options = {"dropout_rng": aa.random.key(3), "dropout_rate": 1 - dropout.keep_prob} if dropout else {}
    options |= {"broadcast_dropout": dropout.broadcast} if dropout else {}
    expected = aa.dot_product_attention(QUERY, KEY, VALUE, bias=BIAS, mask=mask, implementation="exact", **options)
    for rows in ((0, 20), (20, 33)):
        calls = [call_of(library, rows, columns, mask, dropout) for columns in ((0, 11), (11, 40), (40, 47))]
        found = [TILED.partial(call) for call in calls]
        merge = calls[0].backend.tiles, *found[:2]
        whole = partials.merge(calls[0].backend.tiles, partials.merge(*merge), found[2])
        actual = library.get(finished(calls[0], whole))
        np.testing.assert_allclose(actual, expected[:, slice(*rows)], rtol=2e-5, atol=2e-5)


def test_no_other_implementation_takes_a_shard(library):
    call = call_of(library, (0, 20), (0, 11), None, None)
    for name in ("exact", "fused"):
        with pytest.raises(NotImplementedError, match=r"no shard of a whole|no engine"):
            plan.choose(call, name)


def test_partials_merge_where_one_took_no_maximum(library):
    """Logits that are small need none; those of another shard may not be."""
    x = library.put(QUERY[:1, :1, :1])
    tiles, xp = registry.backend_of(x).tiles, registry.backend_of(x).xp
    logits, values = RANDOM.standard_normal((1, 6)).astype("f4") * 3, RANDOM.standard_normal((6, 2)).astype("f4")

    def part(start, stop, base):
        weights = np.exp(logits[:, start:stop] - (0 if base is None else base))
        shift = None if base is None else library.put(np.full((1, 1), base, "f4"))
        total, output = weights.sum(axis=1, keepdims=True), weights @ values[start:stop]
        return partials.Partial(shift, library.put(total), library.put(output))

    expected = np.exp(logits) @ values / np.exp(logits).sum()
    for bases in ((None, None), (None, 7.0), (7.0, None), (-3.0, 5.0)):
        merged = partials.merge(tiles, part(0, 4, bases[0]), part(4, 6, bases[1]))
        np.testing.assert_allclose(library.get(partials.finish(merged, 1.0)), expected, rtol=1e-5)
    empty = partials.nothing(xp, library.put(np.zeros((1, 3), "f4")), 2)
    for base in (None, 7.0):
        merged = partials.merge(tiles, empty, part(0, 6, base))
        np.testing.assert_allclose(library.get(partials.finish(merged, 1.0)), expected, rtol=1e-5)
    twice = partials.merge(tiles, empty, partials.nothing(xp, library.put(np.zeros((1, 3), "f4")), 2))
    assert (library.get(twice.total) == 0).all()


def test_a_loop_may_start_from_nothing(library):
    """As a compiled kernel's has to; also where the dropout counts are the bits themselves, drawn before."""
    call = call_of(library, (0, 33), (0, 47), MASKS["causal"], Dropout(0.7, False))
    how, block = prepare(call)
    bits = threefry.keep_at(call.backend.xp, 0.7, block.pairs.counts)
    scaled = block._replace(rows=(block.rows[0] / how.root,))
    drawn = scaled._replace(pairs=scaled.pairs._replace(counts=bits))
    how = how._replace(skip=False)
    state = partials.nothing(call.backend.xp, block.rows[0], 8)
    for start, stop in ((0, 16), (16, 32), (32, 47)):
        state, _ = passes.absorb(how, state, cut_columns(drawn, start, stop))
    expected = TILED.compute(call)
    np.testing.assert_allclose(library.get(finished(call, state)), library.get(expected), rtol=2e-5, atol=2e-5)
