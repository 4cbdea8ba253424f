"""Decoding with a cache, by what the example prints, and against Flax's attention without one."""

import re

import numpy as np
import pytest

pytestmark = pytest.mark.needs("jax", "flax")


@pytest.mark.slow
def test_one_program_continues_prompts_of_several_lengths(printed, load, monkeypatch):
    text = printed("decode")
    assert re.search(r"^implementation +tiled$", text, re.MULTILINE)
    assert text.endswith("Compiled 1 time.\n")
    rows = re.findall(r"^\[(.*)\] -> ([\d ]+)  as without a cache$", text, re.MULTILINE)
    prompts, found = ([[int(x) for x in re.findall(r"\d+", row[i])] for row in rows] for i in range(2))
    module = load("decode")
    assert prompts == module.PROMPTS
    assert {len(tokens) for tokens in found} == {module.STEPS}

    from flax import linen
    from jax import numpy as jnp
    from jax import random

    def flax(query, key, value, mask):
        return linen.dot_product_attention(query, key, value, mask=linen.make_causal_mask(query[..., 0, 0]))

    monkeypatch.setattr(module, "dot_product_attention", flax)
    for prompt, tokens in zip(prompts, found, strict=True):
        whole = jnp.asarray([prompt + tokens])
        logits, _ = module.model(module.weights(random.key(0)), whole, jnp.zeros(1, int), None)
        assert np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1).tolist() == tokens
