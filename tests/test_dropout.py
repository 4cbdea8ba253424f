"""Contract C4: the dropout of a key is Flax's, bit for bit, in every library."""

from functools import lru_cache
from itertools import product

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

from anyattention import dot_product_attention, dot_product_attention_weights, explain, random
from anyattention_conformance import flax_attention, within_c2

SEEDS = (0, 1, 12345, 2**31 + 7, -1)
RATES = (0.1, 0.3, 0.5, 0.9, 1e-9)
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = {  # name: lengths of query and key, axes before the lengths, heads, shape of a mask that hides nothing
    "rank_3": (6, 7, (), 3, None),
    "rank_4": (6, 7, (2,), 3, None),
    "rank_5": (4, 5, (2, 3), 2, None),
    "rank_6": (3, 4, (2, 1, 2), 2, None),
    "rank_enlarged_by_mask": (6, 7, (2,), 3, (3, 1, 1, 6, 7)),
    "heads_and_lengths_enlarged_by_mask": (1, 1, (2,), 1, (3, 6, 7)),
    "many": (129, 513, (), 1, None),
}


def arguments(shape):
    q_length, kv_length, batch, heads, mask = SHAPES[shape]
    generator = np.random.default_rng(7)
    result = {
        name: generator.standard_normal((*batch, length, heads, 8), dtype=np.float32)
        for name, length in (("query", q_length), ("key", kv_length), ("value", kv_length))
    }
    return result if mask is None else result | {"mask": np.ones(mask, dtype=bool)}


def weights_of(library, inputs, **dropout):
    placed = library.put_all({name: x for name, x in inputs.items() if name != "value"})
    weights = dot_product_attention_weights(**placed, **dropout)
    assert isinstance(weights, library.array_type)
    return library.get(weights)


def flax_weights(inputs, **dropout):
    placed = {name: jnp.asarray(x) for name, x in inputs.items() if name != "value"}
    return np.asarray(linen.dot_product_attention_weights(**placed, **dropout))


def assert_same_bits(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(actual, expected)
    assert actual.tobytes() == expected.tobytes()


# --- the mask ---


@lru_cache(maxsize=None, typed=True)
def flax_dropped(shape, seed, rate, broadcast):
    """Where Flax drops a weight: none is zero before."""
    options = {"dropout_rng": jax.random.key(seed), "dropout_rate": rate, "broadcast_dropout": broadcast}
    return flax_weights(arguments(shape), **options) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_over_seeds_rates_and_broadcasting(library, shape):
    """Fifty masks for each shape, one for the large one."""
    inputs = arguments(shape)
    assert np.all(flax_weights(inputs) > 0)
    wrong = []
    every = [(1, 0.5, False)] if shape == "many" else product(SEEDS, RATES, (True, False))
    for seed, rate, broadcast in every:
        options = {"dropout_rng": random.key(seed), "dropout_rate": rate, "broadcast_dropout": broadcast}
        dropped, expected = weights_of(library, inputs, **options) == 0, flax_dropped(shape, seed, rate, broadcast)
        if dropped.shape != expected.shape or not np.array_equal(dropped, expected):
            wrong.append((seed, rate, broadcast))
    assert not wrong


@pytest.mark.parametrize("shape", ["rank_3", "rank_5", "rank_enlarged_by_mask", "many"])
def test_masks_of_tiled(library, shape):
    """Each key has a value of its own, so an output shows every weight."""
    inputs = arguments(shape)
    _, kv_length, batch, heads, _ = SHAPES[shape]
    inputs["value"] = np.broadcast_to(
        np.eye(kv_length, dtype=np.float32)[:, None], (*batch, kv_length, heads, kv_length)
    )
    options = {"dropout_rng": random.key(1), "dropout_rate": 0.5, "broadcast_dropout": False}
    output = dot_product_attention(**library.put_all(inputs), **options, implementation="tiled")
    dropped = np.swapaxes(library.get(output) == 0, -3, -2)
    np.testing.assert_array_equal(dropped, flax_dropped(shape, 1, 0.5, False))


@pytest.mark.parametrize("shape", SHAPES)
def test_output(library, shape):
    inputs = arguments(shape) | {"dropout_rng": random.key(3), "dropout_rate": 0.3, "broadcast_dropout": False}
    actual, expected = library.get(dot_product_attention(**library.put_all(inputs))), flax_attention(**inputs)
    if library.name == "jax":
        assert_same_bits(actual, expected)
    else:
        assert not within_c2(actual, expected, inputs, "float32")


# --- the weights that are kept. Equal keys make weights of 1/7, rounded alike in every library ---


def equal_weights(dtype="float32"):
    query, key = (np.zeros((2, length, 3, 4), dtype=jnp.dtype(dtype)) for length in (64, 7))
    return {"query": query, "key": key}


# A rate with a dtype draws in it; these 16-bit ones end between two numbers that can be drawn.
TYPED_RATES = (np.float64(0.3), np.float32(0.3), np.float16(0.4), jnp.bfloat16(0.3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [*RATES, *TYPED_RATES], ids=lambda rate: f"{getattr(rate, 'dtype', 'python')}-{rate}")
def test_weights_over_dtypes_of_array_and_rate(library, rate, dtype):
    for seed in SEEDS:
        options = {"dropout_rng": random.key(seed), "dropout_rate": rate}
        expected = flax_weights(equal_weights(dtype), **options)
        assert_same_bits(weights_of(library, equal_weights(dtype), **options), expected)


def test_an_array_as_rate_where_none_is_tiled():
    """A concrete array of JAX's is no reason to compute anything else, nor to fail."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 512, 1, 8)), jnp.bfloat16)
    options = {"dropout_rng": jax.random.key(0)}
    assert explain(x, x, x, dropout_rate=jnp.float32(0.1), **options).implementation == "tiled"
    expected = dot_product_attention(x, x, x, dropout_rate=np.float32(0.1), **options)
    assert_same_bits(dot_product_attention(x, x, x, dropout_rate=jnp.float32(0.1), **options), expected)


@pytest.mark.needs("jax", "torch", "array_api_strict")
@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_arrays_as_rates(library, implementation):
    """Of every library, and of one element: they count as the NumPy scalar of their dtype."""
    inputs = library.put_all(equal_weights() | {"value": equal_weights()["key"] + np.float32(1)})
    options = {"dropout_rng": random.key(0), "implementation": implementation}
    for make in (
        jnp.asarray,
        np.asarray,
        torch.tensor,
        array_api_strict.asarray,
        lambda x: torch.tensor([x]).to(torch.bfloat16),
    ):
        rate = make(np.float32(0.3))
        scalar = jnp.bfloat16(0.3) if rate.dtype is torch.bfloat16 else np.float32(0.3)
        expected = dot_product_attention(**inputs, dropout_rate=scalar, **options)
        actual = dot_product_attention(**inputs, dropout_rate=rate, **options)
        assert_same_bits(library.get(actual), library.get(expected))


@pytest.mark.needs("jax")
@pytest.mark.parametrize("rate", [None, "0.1", [0.1], {}])
def test_what_is_no_rate(library, rate):
    with pytest.raises(TypeError, match="dropout_rate must be a number"):
        weights_of(library, equal_weights(), dropout_rng=random.key(0), dropout_rate=rate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_where_it_is_dropped(library, dtype):
    inputs = equal_weights(dtype)
    inputs["query"][0, 1] = np.nan
    options = {"dropout_rng": random.key(0), "dropout_rate": 0.5}
    weights, expected = weights_of(library, inputs, **options), flax_weights(inputs, **options)
    weights, expected = weights.astype(np.float32), expected.astype(np.float32)
    assert np.isnan(expected[0, :, 1]).all()
    assert (expected[1, :, 1] == 0).any()  # one mask for all
    np.testing.assert_array_equal(weights, expected)


# --- kinds of key ---

KEYS = {  # name: from two words
    "jax_typed": jax.random.wrap_key_data,
    "jax_raw": jnp.asarray,
    "numpy_uint32": np.asarray,
    "torch_uint32": torch.tensor,
    "torch_int64": lambda words: torch.tensor(words.astype(np.int64)),
}


def words(seed):
    """A key of which both words are in use."""
    return np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)))


@pytest.mark.parametrize("kind", KEYS)
def test_kinds_of_key(library, kind):
    for seed in SEEDS:
        expected = flax_weights(equal_weights(), dropout_rng=words(seed), dropout_rate=0.4)
        actual = weights_of(library, equal_weights(), dropout_rng=KEYS[kind](words(seed)), dropout_rate=0.4)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("make_key", [random.key, jax.random.key, jax.random.PRNGKey], ids=["ours", "typed", "raw"])
def test_keys_from_seeds(library, make_key):
    for seed in SEEDS:
        expected = flax_weights(equal_weights(), dropout_rng=jax.random.key(seed), dropout_rate=0.4)
        assert_same_bits(weights_of(library, equal_weights(), dropout_rng=make_key(seed), dropout_rate=0.4), expected)


@pytest.mark.parametrize("kind", ["jax_typed", "jax_raw"])
def test_traced_key(kind):
    def dropped(function):
        inputs = {name: jnp.asarray(x) for name, x in equal_weights().items()}
        return jax.jit(lambda key: function(**inputs, dropout_rng=key, dropout_rate=0.4))(KEYS[kind](words(5)))

    ours, flax = dropped(dot_product_attention_weights), dropped(linen.dot_product_attention_weights)
    assert_same_bits(np.asarray(ours), np.asarray(flax))


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_keys_of_another_generator_serve_jax_alone(library, kind):
    options = {"dropout_rng": jax.random.key(5, impl=kind), "dropout_rate": 0.4, "broadcast_dropout": False}
    if library.name == "jax":
        expected = flax_weights(equal_weights(), **options)
        assert not np.array_equal(expected, flax_weights(equal_weights(), **options | {"dropout_rng": random.key(5)}))
        assert_same_bits(weights_of(library, equal_weights(), **options), expected)
    else:
        with pytest.raises(TypeError, match=f"keys of kind {kind} can be used with JAX arrays only"):
            weights_of(library, equal_weights(), **options)


@pytest.mark.needs("jax")
@pytest.mark.parametrize(
    ("key", "error"),
    [
        pytest.param(lambda: random.split(random.key(0)), ValueError, id="batch"),
        pytest.param(lambda: random.split(random.key(0))[:1], ValueError, id="batch_of_one"),
        pytest.param(lambda: jax.random.split(jax.random.key(0)), ValueError, id="batch_jax_typed"),
        pytest.param(lambda: jax.random.split(jax.random.PRNGKey(0)), ValueError, id="batch_jax_raw"),
        pytest.param(lambda: torch.zeros((2, 2), dtype=torch.int64), ValueError, id="batch_torch"),
        pytest.param(lambda: np.zeros(2, np.int32), TypeError, id="numpy_int32"),
        pytest.param(lambda: jnp.zeros(2, jnp.int32), TypeError, id="jax_int32"),
        pytest.param(lambda: torch.zeros(2, dtype=torch.int32), TypeError, id="torch_int32"),
        pytest.param(lambda: np.zeros(2, np.float32), TypeError, id="numpy_float32"),
        pytest.param(lambda: np.zeros(4, np.uint32), TypeError, id="numpy_four_words"),
        pytest.param(lambda: jnp.zeros(4, jnp.uint32), TypeError, id="jax_four_words"),
        pytest.param(lambda: torch.zeros(4, dtype=torch.int64), TypeError, id="torch_four_words"),
        pytest.param(lambda: np.uint32(0), TypeError, id="one_word"),
        pytest.param(lambda: [0, 0], TypeError, id="list"),
        pytest.param(lambda: 0, TypeError, id="seed"),
    ],
)
def test_what_is_no_key(library, key, error):
    with pytest.raises(error):
        weights_of(library, equal_weights(), dropout_rng=key(), dropout_rate=0.4)


# --- JAX's flags ---

FLAGS = {"x64": jax.enable_x64, "original_layout_of_bits": lambda on: jax.threefry_partitionable(not on)}


@pytest.mark.parametrize(
    ("flag", "rate", "effect"),
    [("x64", 0.5, True), ("x64", np.float32(0.5), False), ("original_layout_of_bits", 0.5, True)],
)
def test_flags_of_jax_hold_for_jax_alone(library, flag, rate, effect):
    for seed in SEEDS:
        options = {"dropout_rng": random.key(seed), "dropout_rate": rate}
        default = flax_weights(equal_weights(), **options)
        with FLAGS[flag](True):
            flagged = flax_weights(equal_weights(), **options)
            actual = weights_of(library, equal_weights(), **options)
        assert effect != np.array_equal(flagged, default)
        assert_same_bits(actual, flagged if library.name == "jax" else default)
