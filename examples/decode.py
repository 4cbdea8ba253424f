"""Text is continued with a cache of keys and values: prompts of several lengths, and one program for all steps.

    pip install -e ".[jax]"
    python examples/decode.py

A transformer of two layers, here with random weights, chooses the likeliest next token again and again. Each step
computes one token for each prompt, whose keys and values join those in the cache. Where prompts differ in length, so do
the places of their newest tokens: `CausalMask(offset)` takes one number for each prompt, and JAX traces it, so that a
`lax.scan` does all steps. The same tokens come out of whole sequences without a cache.
"""

import jax
import jax.numpy as jnp
import numpy as np

from anyattention import dot_product_attention, explain
from anyattention.masks import CausalMask

TOKENS, WIDTH, HEADS, LAYERS, CACHE, STEPS = 100, 64, 4, 2, 4096, 24
PROMPTS = [[5, 17, 3], [88, 1, 42, 42, 7, 19, 60, 2, 9], [31, 64, 99, 12, 50, 8]]


def weights(key):
    """Embeddings in and out, and for each layer what makes query, key and value, what joins heads, and an MLP."""
    keys = iter(jax.random.split(key, 1 + 4 * LAYERS))
    shapes = (WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)
    embeddings = jax.random.normal(next(keys), (2, TOKENS, WIDTH))
    return *embeddings, [[jax.random.normal(next(keys), x) / x[0] ** 0.5 for x in shapes] for _ in range(LAYERS)]


def normed(x):
    """Each token's numbers with a mean square of 1."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def model(params, tokens, offset, cache):
    """Logits of the next token after each of `tokens`, [batch, length], and the cache with their keys and values.

    `offset` says where each prompt's tokens begin, [batch]. The cache has the keys and values of every layer,
    [batch, CACHE, heads, depth]; None stands for none.
    """
    embedding, out, layers = params
    places = offset[:, None] + jnp.arange(tokens.shape[1])
    entries = jnp.arange(len(tokens))[:, None]
    angles = places[..., None] / 10.0 ** jnp.linspace(0, 3, WIDTH // 2)
    x = embedding[tokens] + jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    kept = []
    for number, (to_heads, from_heads, up, down) in enumerate(layers):
        query, *new = jnp.split(jnp.reshape(normed(x) @ to_heads, (*tokens.shape, 3 * HEADS, -1)), 3, axis=2)
        if cache is not None:
            new = [old.at[entries, places].set(part) for old, part in zip(cache[number], new, strict=True)]
        kept.append(new)
        attended = dot_product_attention(query, *new, mask=CausalMask(offset))
        x = x + jnp.reshape(attended, x.shape) @ from_heads
        x = x + jax.nn.gelu(normed(x) @ up) @ down
    return normed(x) @ out.T, kept


@jax.jit
def generate(params, prompts, lengths):
    """The tokens that follow each prompt, [batch, STEPS]; prompts are padded on the right, [batch, longest]."""
    cache = [[jnp.zeros((len(prompts), CACHE, HEADS, WIDTH // HEADS))] * 2] * LAYERS
    logits, cache = model(params, prompts, jnp.zeros_like(lengths), cache)
    first = jnp.argmax(logits[jnp.arange(len(prompts)), lengths - 1], axis=-1)

    def step(state, _):
        token, offset, cache = state  # what padding has left in the cache is replaced before a query may see it
        logits, cache = model(params, token[:, None], offset, cache)
        return (jnp.argmax(logits[:, -1], axis=-1), offset + 1, cache), token

    return jax.lax.scan(step, (first, lengths, cache), length=STEPS)[1].T


def main():
    """Continue the prompts, and compare with whole sequences."""
    params, lengths = weights(jax.random.key(0)), np.array([len(x) for x in PROMPTS])
    padded = np.array([x + [0] * (max(lengths) - len(x)) for x in PROMPTS])
    query, keys = (jax.ShapeDtypeStruct((3, n, HEADS, WIDTH // HEADS), jnp.float32) for n in (1, CACHE))
    print("What serves a step, as anyattention.explain says for these shapes:\n")
    print(explain(query, keys, keys, mask=CausalMask(lengths)))

    print(f"\n{STEPS} tokens after each prompt:\n")
    for prompt, found in zip(PROMPTS, np.asarray(generate(params, padded, lengths)), strict=True):
        whole = jnp.asarray([[*prompt, *found]])
        logits, _ = model(params, whole, jnp.zeros(1, int), None)
        expected = np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1)
        print(
            f"{prompt} ->", *found, "  as without a cache" if (found == expected).all() else "  NOT as without a cache"
        )
    print(f"\nCompiled {generate._cache_size()} time.")


if __name__ == "__main__":
    main()
