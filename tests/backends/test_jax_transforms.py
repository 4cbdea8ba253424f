"""Tiled under JAX's transformations: checkpoints of every policy, derivatives of all kinds, export with symbols."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import anyattention as aa
from anyattention import masks

POLICIES = jax.checkpoint_policies
STOCK = {
    "nothing": POLICIES.nothing_saveable,
    "dots without batch": POLICIES.dots_with_no_batch_dims_saveable,
    "everything": POLICIES.everything_saveable,
    "all but names": POLICIES.save_anything_except_these_names("nobody"),
    "offload": POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@pytest.mark.parametrize("policy", STOCK)
def test_memory_under_checkpoint_policies(policy):
    """It grows with the length, in a scan over layers too: no policy keeps the logits of tiles."""

    def layer(x, w):
        heads = (x @ w).reshape(1, -1, 2, 32)
        return x + aa.dot_product_attention(heads, heads, heads, implementation="tiled").reshape(x.shape), None

    def loss(w, x):
        return jax.lax.scan(jax.checkpoint(layer, policy=STOCK[policy]), x, w)[0].sum()

    def megabytes(length):
        shapes = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32), jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 1e6

    assert megabytes(4096) < 4096 * 4096 * 4 / 1e6  # the logits of a head in one layer


RANDOM = np.random.default_rng(0)
Q, K, V, B, T = (
    jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)
    for shape in ((2, 6, 4, 4), (2, 7, 2, 4), (2, 7, 2, 4), (2, 4, 1, 7), (2, 6, 4, 4))
)
OPTIONS = {
    "mask": masks.LengthMask(jnp.array([7, 4])) & masks.CausalMask(1),
    "dropout_rng": jax.random.key(0),
    "dropout_rate": 0.2,
}


def scaled(f):
    return lambda s: (f(Q * s[0], K * s[1], V * s[2], B * s[3]) * jnp.cos(T)).sum()


ONES = jnp.ones(4)
PROGRAMS = {
    "jvp": lambda f: jax.jvp(f, (Q, K, V, B), (T, 0.3 * K, 0.2 * V, 0.1 * B)),
    "linearize": lambda f: jax.linearize(lambda q: f(q, K, V, B), Q)[1](T),
    "grad under checkpoint": lambda f: jax.grad(jax.checkpoint(scaled(f), policy=POLICIES.dots_saveable))(ONES),
    "hessian": lambda f: jax.hessian(scaled(f))(ONES),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(scaled(f)))(ONES),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda q, k: (f(q, k, V, B) * T).sum(), (0, 1)), (0, None))(
        jnp.stack([Q, T]), K
    ),
    "vmap of jvp": lambda f: jax.vmap(lambda t: jax.jvp(lambda q: f(q, K, V, B), (Q,), (t,))[1])(jnp.stack([Q, T])),
    "vmap over masks and keys": lambda f: jax.vmap(
        lambda n, key: f(Q, K, V, B, mask=masks.LengthMask(n), dropout_rng=key)
    )(jnp.array([[1, 2], [3, 7]]), jax.random.split(jax.random.key(1), 2)),
    "scan": lambda f: jax.grad(lambda q: jax.lax.scan(lambda c, x: (c + f(c * x, K, V, B), None), q, ONES)[0].sum())(Q),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_derivatives(program):
    """Those of exact, of which JAX knows every step."""

    def of(implementation):
        def function(*x, **more):
            return aa.dot_product_attention(*x, implementation=implementation, **{**OPTIONS, **more})

        return jax.jit(lambda: PROGRAMS[program](function))()

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-5, atol=3e-5), of("tiled"), of("exact"))


SYMBOLS = {
    "batch": ("b, 6, 2, 4", "b, 7, 2, 4"),
    "heads": ("2, 6, h, 4", "2, 7, h, 4"),
    "both": ("b, 1, h, 4", "b, 7, h, 4"),
}
SIZES = {"b": 3, "h": 2, "t": 5, "s": 7}
CALLS = {
    "lengths": lambda n: {"mask": masks.LengthMask(n) | masks.LocalMask(2, 0)},
    "causal, dropout": lambda n: {"is_causal": True, "dropout_rng": aa.random.key(0), "dropout_rate": 0.3},
    "dropout of each head": lambda n: {
        "broadcast_dropout": False,
        "dropout_rng": aa.random.key(0),
        "dropout_rate": 0.3,
    },
}


def exported(symbols, options, implementation):
    """What the exported program computes of arrays of some sizes, output and gradients, and what exact does."""
    scope = jax.export.SymbolicScope()
    shapes = [jax.export.symbolic_shape(x, scope=scope) for x in symbols]
    specs = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes] + [jax.ShapeDtypeStruct(shapes[0][:1], jnp.int32)]
    sizes = [tuple(SIZES.get(x) or int(x) for x in text.split(", ")) for text in symbols]
    arrays = [jnp.asarray(RANDOM.standard_normal(x), jnp.float32) for x in sizes]
    lengths = jnp.arange(1, sizes[0][0] + 1, dtype=jnp.int32)

    def program(implementation):
        def loss(q, k, n):
            y = aa.dot_product_attention(q, k, k, **options(n), implementation=implementation)
            return (y**2).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))

    actual = jax.export.export(program(implementation))(*specs).call(*arrays, lengths)
    return actual, program("exact")(*arrays, lengths)


@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("symbols", SYMBOLS)
def test_export_with_symbols(symbols, options):
    if options == "dropout of each head" and symbols != "batch":
        with pytest.raises(NotImplementedError, match="known number of heads"):
            exported(SYMBOLS[symbols], CALLS[options], "tiled")
        return
    actual, expected = exported(SYMBOLS[symbols], CALLS[options], "tiled")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize("symbols", [("b, t, 2, 4", "b, s, 2, 4"), ("2, 1, 2, 4", "2, s, 2, 4")], ids=str)
def test_export_with_symbolic_lengths(symbols):
    """They have no tiles of fixed sizes: tiled says so by name, and None does not choose it."""
    actual, expected = exported(symbols, CALLS["lengths"], None)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), actual, expected)
    with pytest.raises(NotImplementedError, match="lengths are symbols"):
        exported(symbols, CALLS["lengths"], "tiled")


def test_taylor_mode():
    """JAX's has no rule for loops, and says so by a KeyError."""
    from jax.experimental import jet

    with pytest.raises(NotImplementedError, match="pass implementation='exact'"):
        jet.jet(lambda q: aa.dot_product_attention(q, K, V, implementation="tiled"), (Q,), ((T,),))
