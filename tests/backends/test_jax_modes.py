"""JAX's modes around our calls: strict promotion, and our own settings as part of what JAX keeps its programs by."""

import subprocess
import sys
from functools import partial
from threading import Thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import anyattention as aa
from anyattention import masks

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 2, 4)), jnp.float32)
IDS = jnp.arange(5) // 2
MASKS = {
    "causal and [batch, 1, 1, kv_length]": {"is_causal": True, "mask": jnp.arange(10).reshape(2, 1, 1, 5) % 3},
    "causal and [kv_length]": {"is_causal": True, "mask": jnp.array([1, 0, 1, 1, 1], jnp.int8)},
    "lengths": {"mask": masks.LengthMask(jnp.array([3, 4], jnp.int16), jnp.array([4, 5], jnp.uint8))},
    "ids of two dtypes": {"mask": masks.SegmentMask(IDS.astype(jnp.int8), jnp.stack([IDS, IDS]))},
    "or, not": {"mask": masks.CausalMask(1) | ~masks.LengthMask(np.array([3, 4]))},
    "dropout": {"mask": masks.LocalMask(2, 1), "dropout_rng": aa.random.key(0), "dropout_rate": 0.5},
    "bias": {"bias": np.linspace(0, 1, 5), "mask": masks.LengthMask(jnp.array([3, 0]))},
}


@pytest.mark.parametrize("case", MASKS)
def test_strict_modes(case):
    """The numbers without them, to the bit; forward and backward."""
    options = MASKS[case]

    def exact(x):
        return jax.vjp(lambda x: aa.dot_product_attention(x, X, X, **options, implementation="exact"), x)[1](X)

    def tiled(x):
        output, pullback = aa.dot_product_attention_vjp(x, X, X, **options)
        return output, pullback(output)[:3]

    expected = exact(X), tiled(X)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.tree.map(np.testing.assert_array_equal, (exact(X), tiled(X)), expected)
        if hasattr(options.get("mask"), "to_array"):
            options["mask"].to_array(5, 5)


def ours(x):
    return aa.dot_product_attention(x, x, x)


def serves(program):
    """Which implementation is in the program, whatever compiled it."""
    return "tiled" if "_compiled" in str(jax.make_jaxpr(program)(X)) else "exact"


WAYS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=2)[0],
    "gradient": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
}


@pytest.mark.parametrize("way", WAYS)
def test_warm_programs_follow_the_settings(way):
    """Within, in a block within, and afterwards; what was first traced within leaves nothing behind."""
    warm, cold = WAYS[way](ours), WAYS[way](lambda x: ours(x))
    assert serves(warm) == "exact"
    with aa.config(implementation="tiled"):
        assert serves(warm) == serves(cold) == "tiled"
        with aa.config(implementation="exact"):
            assert serves(warm) == "exact"
        assert serves(warm) == "tiled"
    assert serves(warm) == serves(cold) == "exact"
    with aa.config(implementation="fused"), pytest.raises(NotImplementedError, match="fused"):
        warm(X)
    with aa.config(implementation="tiled", engines=()), pytest.raises(ZeroDivisionError):
        1 / 0  # noqa: B018
    assert serves(warm) == "exact"


def test_a_program_is_traced_once_for_each_setting():
    """Also by other threads, which have settings of their own."""
    traced = []

    @jax.jit
    def program(x):
        traced.append(threads[-1:])
        return ours(x)

    threads = []
    with aa.config(engines=()):  # JAX knows of settings from here on
        pass
    for implementation in (None, "tiled", None, "tiled"):
        with aa.config(implementation=implementation):
            program(X)
            threads.append(Thread(target=partial(program, X)))
            threads[-1].start()
            threads[-1].join()
    assert len(traced) == 2


def test_jax_imported_within():
    """What is traced while JAX first hears of settings leaves nothing behind either."""
    script = """
import sys
import anyattention
with anyattention.config(implementation="tiled"):
    assert "jax" not in sys.modules
    import jax, jax.numpy as jnp
    program = jax.jit(lambda x: anyattention.dot_product_attention(x, x, x))
    x = jnp.ones((1, 8, 1, 4))
    assert "_compiled" in str(jax.make_jaxpr(program)(x))
assert "_compiled" not in str(jax.make_jaxpr(program)(x))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# --- exported programs ---

SINKS = jnp.asarray([0.5, -1.0])
WORDS = {
    "scale": {"scale": 0.3},
    "soft cap": {"logits_soft_cap": 1.5},
    "sinks": {"sinks": SINKS},
    "all": {"scale": -0.3, "logits_soft_cap": 1.5, "sinks": SINKS, "mask": masks.LocalMask(2, 1), "is_causal": True},
}


@pytest.mark.needs("flatbuffers")
@pytest.mark.parametrize(("implementation", "axes"), [(None, "batch, length, 2, 4"), ("tiled", "batch, 5, 2, 4")])
def test_exported_programs_have_every_word(implementation, axes):
    """At other batches and, but for tiled, lengths; with the gradient of the query."""

    def every(x):
        def loss(x):
            found = [
                aa.dot_product_attention(x, x, x, **call, implementation=implementation) for call in WORDS.values()
            ]
            return sum((y**2).sum() for y in found), found

        gradient, found = jax.grad(loss, has_aux=True)(x)
        return [gradient, *found]

    shape = export.symbolic_shape(axes)
    program = export.export(jax.jit(every))(jax.ShapeDtypeStruct(shape, jnp.float32))
    program = export.deserialize(program.serialize(vjp_order=0))
    for sizes in ((2, 5), (3, 5 if implementation == "tiled" else 9)):
        x = np.random.default_rng(1).standard_normal((*sizes, 2, 4), dtype=np.float32)
        for found, wanted in zip(program.call(x), formulas(x), strict=True):
            np.testing.assert_allclose(found, wanted, atol=3e-6 * max(1.0, np.abs(wanted).max()))


def formulas(x):
    """The same in float64."""

    def one(x, call):
        length, call = x.shape[1], {"scale": 0.5, **call}
        logits = jnp.einsum("bqhd,bkhd->bhqk", x, x) * call["scale"]
        if (cap := call.get("logits_soft_cap")) is not None:
            logits = cap * jnp.tanh(logits / cap)
        i, j = np.arange(length)[:, None], np.arange(length)
        logits = jnp.where((i - 2 <= j) & (j <= i) | ("mask" not in call), logits, -1e30)
        weights = jnp.exp(logits)
        total = weights.sum(-1, keepdims=True)
        if "sinks" in call:
            total = total + jnp.exp(jnp.asarray(SINKS, "float64"))[:, None, None]
        return jnp.einsum("bhqk,bkhd->bqhd", weights / total, x)

    with jax.enable_x64(True):
        x = jnp.asarray(x, "float64")
        found = [one(x, call) for call in WORDS.values()]
        gradient = jax.grad(lambda x: sum((one(x, call) ** 2).sum() for call in WORDS.values()))(x)
        return [np.asarray(y) for y in (gradient, *found)]
