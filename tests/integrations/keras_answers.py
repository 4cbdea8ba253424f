"""Answers of Keras and of our layers on one of its backends: ``python keras_answers.py BACKEND FILE``, a pickle.

Keras has one backend in a process. The answers are pairs, Keras' own first, by the names of cases.
"""

import doctest
import os
import pickle
import sys
import tempfile
import warnings

BACKEND, FILE = sys.argv[1:]
os.environ["KERAS_BACKEND"] = BACKEND
import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras import ops  # noqa: E402

import anyattention  # noqa: E402
from anyattention.integrations import keras as ours  # noqa: E402

warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="keras")  # Keras' own, about NumPy 2
RANDOM = np.random.default_rng(0)
keras.utils.set_random_seed(0)
SELF = (draw := lambda *shape: RANDOM.standard_normal(shape).astype("float32"))(2, 6, 16)
QUERY, KEY, VALUE = draw(2, 6, 16), draw(2, 7, 16), draw(2, 7, 16)
GRID, CUBE = draw(2, 3, 4, 16), draw(2, 3, 4, 5, 16)
MASK = RANDOM.random((2, 6, 7)) > 0.3
MASK[:, :, 0] = True
AXES = RANDOM.random((2, 3, 4, 3, 4)) > 0.2
SQUARE = np.tri(6, dtype=bool)[None] | (RANDOM.random((2, 6, 6)) > 0.5)
TOKENS = np.array([[3, 1, 2, 4, 2, 1], [1, 2, 3, 3, 4, 4]])
FOUND = {}

# name: arguments of the layer, arrays, arguments of the call
MULTI = {
    "plain": ({}, (SELF, SELF), {}),
    "causal": ({}, (SELF, SELF), {"use_causal_mask": True}),
    "causal and mask": ({}, (SELF, SELF), {"use_causal_mask": True, "attention_mask": SQUARE}),
    "cross": ({"output_shape": 9}, (QUERY, VALUE, KEY), {"attention_mask": MASK, "use_causal_mask": True}),
    "window": ({"sliding_window": 3, "use_gate": True}, (SELF, SELF), {"use_causal_mask": True}),
    # On JAX Keras takes values of another depth only where it returns weights.
    "weights": ({"value_dim": 5}, (QUERY, VALUE, KEY), {"return_attention_scores": True, "attention_mask": MASK}),
    "both axes": ({"attention_axes": (1, 2)}, (GRID, GRID), {"return_attention_scores": True, "attention_mask": AXES}),
    "second axis": ({"attention_axes": (2,)}, (GRID, GRID), {"attention_mask": AXES[:, 0, :, 0]}),
    "first axis of three": ({"attention_axes": (1,)}, (CUBE, CUBE), {"attention_mask": np.tri(3, dtype=bool)[None]}),
    "dropout switched off": ({"dropout": 0.4}, (SELF, SELF), {"training": False}),
}
GROUPED = {
    "grouped, causal": ({}, (SELF, SELF), {"use_causal_mask": True}),
    "grouped, window": ({"sliding_window": 2}, (SELF, SELF), {"use_causal_mask": True}),
    "grouped, weights": ({}, (QUERY, VALUE, KEY), {"return_attention_scores": True, "attention_mask": MASK}),
}
DROPOUT = ({"dropout": 0.4, "seed": 12345}, (SELF, SELF), {"training": True})


def numpy(x):
    return [ops.convert_to_numpy(each) for each in (x if isinstance(x, tuple | list) else (x,))]


def of_multi(package, **options):
    return package.MultiHeadAttention(num_heads=4, key_dim=8, **options)


def of_groups(package, **options):
    kind = package.GroupQueryAttention if package is keras.layers else package.GroupedQueryAttention
    return kind(head_dim=8, num_query_heads=4, num_key_value_heads=2, **options)


def pair(make, options, arrays):
    """A layer of Keras' and one of ours with its weights; both are built."""
    theirs, mine = make(keras.layers, **options), make(ours, **options)
    for layer in (theirs, mine):
        layer.build(*(x.shape for x in arrays))
    theirs.set_weights([draw(*x.shape) / 4 for x in theirs.get_weights()])
    mine.set_weights(theirs.get_weights())
    return theirs, mine


for cases, make in ((MULTI, of_multi), (GROUPED, of_groups)):
    for name, (options, arrays, call) in cases.items():
        FOUND[name] = [numpy(layer(*arrays, **call)) for layer in pair(make, options, arrays)]

# Dropout, in two calls. Keras' bits on JAX; elsewhere those of Flax from the same seed.
for make in (of_multi, of_groups):
    options, arrays, call = DROPOUT
    theirs, mine = pair(make, options, arrays)
    plain = pair(make, {}, arrays)[0]
    plain.set_weights(theirs.get_weights())
    expected = []
    for step in range(2):
        q, k, v = (getattr(plain, f"_{name}_dense")(ops.convert_to_tensor(SELF)) for name in ("query", "key", "value"))
        k, v = (ops.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        q, k, v = (np.asarray(ops.convert_to_numpy(x), "float64") for x in (q, k, v))
        logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        keep = anyattention.random.bernoulli(np.array([12345, step], "uint32"), np.float32(0.6), weights.shape)
        heads = np.einsum("bhqk,bkhd->bqhd", weights * keep / 0.6, v).astype("float32")
        expected += numpy(plain._output_dense(ops.convert_to_tensor(heads)))
    kind = type(mine).__name__
    FOUND[f"dropout, {kind}"] = [expected, [numpy(mine(*arrays, **call))[0] for _ in range(2)]]
    if BACKEND == "jax":
        FOUND[f"Keras' dropout, {kind}"] = [[numpy(theirs(*arrays, **call))[0] for _ in range(2)], expected]


# A model with padding from an embedding, which is trained, saved and loaded.
def model(package, name):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(5, 16, mask_zero=True, embeddings_initializer="ones")(tokens)
    x = x + keras.layers.Embedding(5, 16, name="other")(tokens)
    x = of_multi(package, name="multi")(x, x, use_causal_mask=True)
    x = of_groups(package, name="grouped")(x, x)
    return keras.Model(tokens, keras.layers.Dense(3, name="dense")(x), name=name)


PADDED = TOKENS * (np.arange(6) < np.array([[4], [6]]))
theirs, mine = model(keras.layers, "theirs"), model(ours, "mine")
mine.set_weights(theirs.get_weights())
FOUND["padding"] = [numpy(x(ops.convert_to_tensor(PADDED)))[0][PADDED > 0] for x in (theirs, mine)]
with tempfile.TemporaryDirectory() as folder:
    theirs.save_weights(f"{folder}/theirs.weights.h5")
    fresh = model(ours, "theirs")
    fresh.load_weights(f"{folder}/theirs.weights.h5")
    mine.get_layer("multi").implementation = "tiled"
    mine.save(f"{folder}/mine.keras")
    again = keras.models.load_model(f"{folder}/mine.keras")
FOUND["Keras' file of weights"] = [numpy(theirs(TOKENS)), numpy(fresh(TOKENS))]
FOUND["our file"] = [numpy(mine(TOKENS)), numpy(again(TOKENS))]
kept = [again.get_layer(name) for name in ("multi", "grouped")]
assert [(type(x), x.implementation) for x in kept] == [
    (ours.MultiHeadAttention, "tiled"),
    (ours.GroupedQueryAttention, None),
]
same = ours.MultiHeadAttention.from_config(theirs.get_layer("multi").get_config())
assert (same.num_heads, same.key_dim, same.implementation) == (4, 8, None)
if BACKEND != "numpy":  # where Keras has no training
    for each in (theirs, mine):
        each.compile(keras.optimizers.SGD(0.1), "mse")
        each.fit(PADDED, np.ones((2, 6, 3), "float32"), epochs=1, verbose=0)
    FOUND["trained weights"] = [numpy(x.get_weights()) for x in (theirs, mine)]

# The function, eager and in a model that is saved.
q, k, v = (ops.convert_to_tensor(draw(2, n, 4, 8)) for n in (6, 7, 7))
few = [ops.convert_to_tensor(draw(2, 7, 2, 8)) for _ in range(2)]
BIAS = ops.convert_to_tensor(draw(2, 4, 6, 7))
CALLS = {
    "alone": {},
    "scale and causal": {"scale": 0.2, "is_causal": True},
    "bias": {"bias": BIAS},
    "mask": {"mask": ops.convert_to_tensor(MASK[:, None])},
}
for name, call in CALLS.items():
    FOUND[f"function, {name}"] = [
        numpy(f(q, k, v, **call)) for f in (keras.ops.dot_product_attention, ours.dot_product_attention)
    ]
everything = {"mask": CALLS["mask"]["mask"], "scale": 0.2, "is_causal": True, "attn_logits_soft_cap": 1.5}
inputs = [keras.Input(x.shape[1:]) for x in (q, *few, BIAS)]
symbolic = ours.dot_product_attention(*inputs, scale=0.2, is_causal=True, attn_logits_soft_cap=1.5)
assert symbolic.shape == (None, 6, 4, 8)
built = keras.Model(inputs, symbolic)
with tempfile.TemporaryDirectory() as folder:
    built.save(f"{folder}/function.keras")
    built = keras.models.load_model(f"{folder}/function.keras")
logits = np.einsum("bqhd,bkhd->bhqk", *(np.asarray(numpy(x)[0], "float64") for x in (q, ops.repeat(few[0], 2, axis=2))))
logits = 1.5 * np.tanh(0.2 * logits / 1.5) + numpy(BIAS)[0]
logits = np.where(np.tri(6, 7, dtype=bool), logits, -np.inf)
weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
expected = np.einsum("bhqk,bkhd->bqhd", weights, numpy(ops.repeat(few[1], 2, axis=2))[0])
FOUND["function in a model"] = [[expected], numpy(built([q, *few, BIAS]))]

# In 16 bits; what comes out has the dtype of the policy.
half = of_multi(ours, dtype="mixed_float16")
wide = of_multi(keras.layers)
wide.build(SELF.shape, SELF.shape)
half.build(SELF.shape, SELF.shape)
half.set_weights(wide.get_weights())
output = half(SELF, SELF, use_causal_mask=True)
assert keras.backend.standardize_dtype(output.dtype) == "float16"
FOUND["float16"] = [numpy(wide(SELF, SELF, use_causal_mask=True)), numpy(output)]

# No array of the lengths is made of causality.
if BACKEND == "jax":
    import jax

    layer = of_multi(ours, implementation="tiled")
    long = np.zeros((1, 3001, 16), "float32")
    layer.build(long.shape, long.shape)
    program = str(jax.make_jaxpr(lambda x: layer(x, x, use_causal_mask=True))(long))
    assert "3001,3001" not in program
    layer = of_multi(keras.layers)
    layer.build(long.shape, long.shape)
    assert "3001,3001" in str(jax.make_jaxpr(lambda x: layer(x, x, use_causal_mask=True))(long))

# Errors.
for make in (of_multi, of_groups):
    with pytest.raises(ValueError, match="flash_attention chooses a kernel of Keras"):
        make(ours, flash_attention=True)
    with pytest.raises(ValueError, match="implementation='quick' is unknown"):
        make(ours, implementation="quick")(SELF, SELF)
with pytest.raises(ValueError, match="flash_attention chooses a kernel of Keras"):
    ours.dot_product_attention(q, k, v, flash_attention=False)
tested = doctest.testmod(ours)
assert (tested.failed, tested.attempted > 0) == (0, True)

with open(FILE, "wb") as file:
    pickle.dump(FOUND, file)
