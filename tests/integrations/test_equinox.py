"""Equinox' attention layer with our attention: the same numbers, and the same weights dropped."""

import doctest
import sys
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anyattention as aa
from anyattention.integrations.equinox import MultiheadAttention

HEADS = 4
SIZES = {"query_size": 16, "key_size": 12, "value_size": 20, "qk_size": 8, "vo_size": 5, "output_size": 9}
LENGTHS = {"query": (6, 16), "key_": (7, 12), "value": (7, 20)}
KEY = jax.random.key(3)
EACH_HEAD = np.random.default_rng(1).random((HEADS, 6, 7)) > 0.4
CALLS = {
    "mask of each head": {"mask": EACH_HEAD},
    "fully masked row": {"mask": np.tri(6, 7, k=-1, dtype=bool)},
    "dropout and mask of each head": {"key": KEY, "inference": False, "mask": EACH_HEAD},
    "inference": {"key": KEY, "inference": True},
}


@cache
def layer():
    biases = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)
    return eqx.nn.MultiheadAttention(HEADS, **SIZES, **biases, dropout_p=0.3, inference=True, key=jax.random.key(0))


@cache
def ours():
    return MultiheadAttention(layer())


@cache
def inputs():
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in LENGTHS.values()]


@cache
def answers(whose, call):
    """The output and the gradients of its sum of squares, in all that the module and its inputs are."""
    module = layer() if whose == "equinox" else ours()

    def loss(both):
        module, arrays = both
        output = module(*arrays, **CALLS[call])
        return (output**2).sum(), output

    both = eqx.filter_value_and_grad(loss, has_aux=True)
    ((_, output), gradients) = eqx.filter_jit(both)((module, inputs()))
    return [output, *jax.tree.leaves(eqx.filter(gradients, eqx.is_array))]


@pytest.mark.parametrize("call", CALLS)
def test_the_numbers_of_equinox(call):
    found, wanted = (answers(whose, call) for whose in ("ours", "equinox"))
    assert len(found) == len(wanted) == 1 + 8 + 3
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1.0, np.abs(y).max()))


@pytest.mark.parametrize("call", [call for call in CALLS if call != "inference"])
def test_each_has_an_effect(call):
    assert np.abs(answers("equinox", call)[0] - answers("equinox", "inference")[0]).max() > 1e-3


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_masks_by_rule(implementation):
    """Under jit and over a batch, as layers of Equinox are mapped."""
    arrays = [jnp.stack([x, x[::-1]]) for x in inputs()]
    dropout = {"key": KEY, "inference": False}
    rule, array = aa.masks.LocalMask(2, 1), aa.masks.LocalMask(2, 1).to_array(6, 7)
    module = MultiheadAttention(layer(), implementation)
    found = jax.jit(jax.vmap(lambda *x: module(*x, mask=rule, **dropout)))(*arrays)
    wanted = jax.jit(jax.vmap(lambda *x: layer()(*x, mask=array, **dropout)))(*arrays)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_heads_that_are_changed_first():
    """As by rotary positions, in Equinox' own way."""
    rotate = jax.vmap(eqx.nn.RotaryPositionalEmbedding(8), in_axes=1, out_axes=1)

    def process(query, key, value):
        return rotate(query), rotate(key), value

    found, wanted = (f(*inputs(), process_heads=process) for f in (ours(), layer()))
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert np.abs(found - answers("equinox", "inference")[0]).max() > 1e-3


def test_surgery(tmp_path):
    """Two layers of a model are replaced: its numbers and parameters stay, so does what walks through a model."""
    model = [eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(i), dropout_p=0.5) for i in range(2)]
    changed = eqx.tree_at(lambda model: tuple(model), model, replace_fn=MultiheadAttention)
    assert [type(x) for x in changed] == [MultiheadAttention] * 2
    x = jax.random.normal(KEY, (5, 8))
    for a, b in zip(*map(eqx.nn.inference_mode, (changed, model)), strict=True):
        np.testing.assert_allclose(a(x, x, x), b(x, x, x), atol=2e-6)
    eqx.tree_serialise_leaves(tmp_path / "model", model)
    again = eqx.tree_deserialise_leaves(tmp_path / "model", jax.tree.map(jnp.zeros_like, changed, is_leaf=eqx.is_array))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(model))


def test_half_precision():
    """Equinox' softmax is in float32, ours in the arrays' dtype, as in Flax: a few roundings."""
    half = jax.tree.map(lambda x: x.astype("bfloat16") if eqx.is_array(x) else x, (layer(), inputs()))
    wide = jax.tree.map(lambda x: x.astype("float32") if eqx.is_array(x) else x, half)
    found, truth = MultiheadAttention(half[0])(*half[1]), wide[0](*wide[1])
    assert found.dtype == "bfloat16"
    np.testing.assert_allclose(found.astype("float32"), truth, atol=8 * 2**-8 * np.abs(truth).max())


def test_the_examples():
    tested = doctest.testmod(sys.modules[MultiheadAttention.__module__])
    assert (tested.failed, tested.attempted > 0) == (0, True)


def test_what_is_refused():
    with pytest.raises(ValueError, match="dropout needs a key: pass key="):
        MultiheadAttention(layer())(*inputs(), inference=False)
    with pytest.raises(aa.ShapeError, match="mask"):
        MultiheadAttention(layer())(*inputs(), mask=np.ones((6, 5), bool))
    with pytest.raises(NotImplementedError, match="fused"):
        MultiheadAttention(layer(), "fused")(*inputs())
