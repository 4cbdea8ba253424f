"""As `attention_fn=` in Flax's own modules: the bits of the unswapped module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import anyattention as aa

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16), dtype=np.float32))
MASK = linen.make_causal_mask(X[..., 0])


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout_rate": 0.3}, {"dtype": jnp.bfloat16, "force_fp32_for_softmax": True}],
    ids=str,
)
def test_linen(options):
    def run(function):
        layer = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=function, **options)
        variables = layer.init(jax.random.key(0), X, deterministic=True)

        def apply(params):
            rngs = {"dropout": jax.random.key(1)}
            return layer.apply(
                {"params": params}, X, mask=MASK, deterministic=False, sow_weights=True, rngs=rngs,
                mutable=["intermediates"],
            )  # fmt: skip

        gradient = jax.grad(lambda params: apply(params)[0].astype(jnp.float32).sum())(variables["params"])
        return apply(variables["params"]), gradient

    jax.tree.map(np.testing.assert_array_equal, run(aa.dot_product_attention), run(linen.dot_product_attention))


def test_linen_decodes_with_a_cache():
    def run(function):
        layer = linen.MultiHeadDotProductAttention(num_heads=4, decode=True, attention_fn=function)
        variables = layer.init(jax.random.key(0), X)
        outputs = []
        for step in range(3):
            y, state = layer.apply(variables, X[:, step : step + 1], mutable=["cache"])
            variables |= state
            outputs.append(y)
        return outputs

    jax.tree.map(np.testing.assert_array_equal, run(aa.dot_product_attention), run(linen.dot_product_attention))


def test_nnx():
    def reference(query, key, value, *, is_causal=False, **options):
        return linen.dot_product_attention(query, key, value, **options)

    def run(function):
        layer = nnx.MultiHeadAttention(4, 16, decode=False, attention_fn=function, rngs=nnx.Rngs(0))
        return layer(X, mask=MASK)

    np.testing.assert_array_equal(run(aa.dot_product_attention), run(reference))


def test_grouped_heads_have_the_bits_of_nnx():
    q = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    k = jax.random.normal(jax.random.key(1), (2, 6, 2, 8))
    options = {"dropout_rng": jax.random.key(2), "dropout_rate": 0.2}
    expected = nnx.dot_product_attention(q, k, k, **options)
    np.testing.assert_array_equal(aa.dot_product_attention(q, k, k, **options), expected)
    raw = [np.asarray(x) for x in (q, k)]
    np.testing.assert_allclose(aa.dot_product_attention(raw[0], raw[1], raw[1], **options), expected, atol=2e-6)
