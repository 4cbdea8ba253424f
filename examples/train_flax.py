"""A language model in training: one argument of a Flax module swaps its attention, and memory falls.

    pip install -e ".[jax]" flax optax
    python examples/train_flax.py

A transformer of two layers learns to continue a text letter by letter: the documentation that comes with Python. It is
trained three times from the same start, with the same batches and the same dropout: with Flax's own attention, with
ours, which here computes it in tiles, and with ours step by step as Flax computes it, which gives Flax's very bits.
"""

from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from anyattention import dot_product_attention, explain

BATCH, LENGTH, HEADS, WIDTH, STEPS = 2, 1024, 4, 64, 16
TEXT = np.frombuffer("".join(topics.values()).encode("ascii", "replace"), np.uint8)
ATTENTIONS = {
    "Flax": nn.dot_product_attention,
    "ours": dot_product_attention,
    "ours, exact": partial(dot_product_attention, implementation="exact"),
}


class Model(nn.Module):
    """Logits of the next letter after each letter, [batch, length, 128]."""

    attention_fn: object

    @nn.compact
    def __call__(self, letters):
        x = nn.Embed(128, WIDTH)(letters) + nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))
        mask = nn.make_causal_mask(letters[:1])
        for _ in range(2):
            options = {"dropout_rate": 0.1, "deterministic": False, "attention_fn": self.attention_fn}
            x = x + nn.MultiHeadDotProductAttention(HEADS, **options)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(128)(nn.LayerNorm()(x))


def batch(step):
    """Passages of the text, [batch, length + 1], the same for every attention."""
    starts = np.random.default_rng(step).integers(0, TEXT.size - LENGTH - 1, BATCH)
    return jnp.asarray(TEXT[starts[:, None] + np.arange(LENGTH + 1)], jnp.int32)


def train(attention_fn):
    """The losses, and how many MiB the compiled step needs beside its arguments and results."""
    model, optimizer = Model(attention_fn), optax.adam(3e-3)

    @jax.jit
    def step(params, state, letters, key):
        def loss(params):
            logits = model.apply(params, letters[:, :-1], rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, letters[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, change), state, value

    keys = jax.random.split(jax.random.key(0), STEPS + 1)
    params = model.init({"params": keys[-1], "dropout": keys[-1]}, batch(0)[:, :-1])
    state, losses = optimizer.init(params), []
    compiled = step.lower(params, state, batch(0), keys[0]).compile()
    for number in range(STEPS):
        params, state, loss = compiled(params, state, batch(number), keys[number])
        losses.append(float(loss))
    return np.array(losses), compiled.memory_analysis().temp_size_in_bytes / 2**20


def main():
    """Train with each attention, and compare."""
    shape = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH // HEADS), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, LENGTH, LENGTH), jnp.float32)
    print("What a call of our attention is planned to do, as anyattention.explain says:\n")
    print(explain(shape, shape, shape, mask=mask, dropout_rng=jax.random.key(0), dropout_rate=0.1))

    print(f"\nTraining on {TEXT.size} letters, {BATCH} passages of {LENGTH} at a time, {STEPS} steps:\n")
    steps = np.arange(0, STEPS, 5)
    print(f"{'attention':<13}{'memory of a step':>17}    loss at step", *(f"{i:>7}" for i in steps), "    from Flax's")
    found = {}
    for name, attention_fn in ATTENTIONS.items():
        found[name], mebibytes = train(attention_fn)
        losses = " ".join(f"{loss:>7.4f}" for loss in found[name][steps])
        print(f"{name:<13}{mebibytes:>13.1f} MiB{'':>16} {losses}{np.max(np.abs(found[name] - found['Flax'])):>16.0e}")


if __name__ == "__main__":
    main()
