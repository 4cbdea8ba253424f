"""A layer ported from Flax to PyTorch, checked step by step; then a port with a mistake, which is found and named.

    pip install -e ".[jax,torch]" flax
    python examples/port_to_torch.py

The weights of Flax's MultiHeadDotProductAttention go into a PyTorch module, and one key of JAX gives both the same
dropout. Then the module gets an attention as people write it by hand, with a mistake in it. The conformance kit finds
the mistake, without weights and without Flax.
"""

import functools

import jax
import numpy as np
import torch
from flax import linen as nn

from anyattention import dot_product_attention
from anyattention_conformance import assert_matches_flax

STEPS = ("query", "key", "value", "attention", "out")


class Ported(torch.nn.Module):
    """Flax's layer, with its parameters by their names and any attention."""

    def __init__(self, params, attention):
        super().__init__()
        for layer, pair in params.items():
            self.add_module(layer, torch.nn.ParameterDict({name: torch.tensor(x) for name, x in pair.items()}))
        self.attention = attention

    def forward(self, x, **options):
        def dense(layer, rule, x):
            return torch.einsum(rule, x, layer["kernel"]) + layer["bias"]

        heads = [dense(layer, "btw,whd->bthd", x) for layer in (self.query, self.key, self.value)]
        attended = self.attention(*heads, **options)
        return *heads, attended, dense(self.out, "bthd,hdw->btw", attended)


def by_hand(query, key, value, mask=None):
    """Attention for arrays [batch, length, heads, depth]; the mask is True where a key is visible, as in Flax."""
    logits = torch.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(mask.bool(), torch.finfo(logits.dtype).min)  # the mistake: masked_fill hides
    return torch.einsum("...hqk,...khd->...qhd", logits.softmax(-1), value)


def mended(query, key, value, mask=None):
    """The same with the mask as masked_fill wants it, True where a key is hidden."""
    return by_hand(query, key, value, mask=None if mask is None else ~mask.bool())


def compare(flax, params, x, mask, attention, **dropout):
    """Print how far PyTorch's steps and gradients are from Flax's, relative to the largest numbers of Flax's."""
    seen = []

    @functools.wraps(nn.dot_product_attention)  # Flax passes on what the signature names
    def watched(query, key, value, **options):
        seen[:] = query, key, value, nn.dot_product_attention(query, key, value, **options)
        return seen[-1]

    def loss(params):
        options = {"mask": mask, "deterministic": not dropout} | dropout
        out = flax.clone(attention_fn=watched).apply({"params": params}, x, **options)
        return (out**2).sum() / 2, (*seen, out)

    gradient, steps = jax.grad(loss, has_aux=True)(params)
    module = Ported(params, attention)
    actual = module(torch.tensor(x), mask=torch.tensor(mask), **dropout)
    (actual[-1] ** 2).sum().div(2).backward()

    rows = [(*row, np.max(np.abs(row[1]))) for row in zip(STEPS, steps, actual, strict=True)]
    scale = max(np.max(np.abs(x)) for x in jax.tree.leaves(gradient))  # one: a key's bias has none but by rounding
    for layer in params:
        for part, expected in gradient[layer].items():
            rows.append((f"gradient of {layer} {part}", expected, module.get_submodule(layer)[part].grad, scale))
    for name, expected, found, scale in rows:
        apart = np.max(np.abs(expected - found.detach().numpy())) / scale
        print(f"  {name:<26}{apart:>7.0e}{'' if apart < 1e-5 else '   differs'}")


def certify(attention):
    """What the conformance kit says of an attention: the mistakes that it knows by name, and its verdict."""
    try:
        assert_matches_flax(attention, "torch", unsupported=["bias", "dropout"])
    except AssertionError as report:
        return "\n\n".join(x for x in str(report).split("\n\n") if x.startswith("✗"))
    return f"✓ {attention.__name__} has Flax's numbers in ordinary calls"


def main():
    """Compare the layers, then certify the attention written by hand."""
    x = np.random.default_rng(0).standard_normal((2, 12, 32), np.float32)
    mask = (np.arange(12) < np.array([[12], [7]]))[:, None, None, :]  # the second sequence ends with padding
    layer = nn.MultiHeadDotProductAttention(num_heads=4, dropout_rate=0.1, bias_init=nn.initializers.normal())
    params = jax.device_get(layer.init(jax.random.key(0), x, deterministic=True)["params"])

    print("1. The port with anyattention, dropout of 0.1: how far PyTorch is from Flax\n")
    ours = functools.partial(dot_product_attention, dropout_rate=0.1)
    compare(layer, params, x, mask, ours, dropout_rng=jax.random.key(1))
    print("\n2. The port with an attention written by hand, without dropout\n")
    compare(layer, params, x, mask, by_hand)
    print("\n3. What the conformance kit says of the attention written by hand\n")
    print(certify(by_hand))
    print("\n4. What it says once the mistake is mended\n")
    print(certify(mended))


if __name__ == "__main__":
    main()
