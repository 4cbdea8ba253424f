"""Flax's own modules with our function as `attention_fn=`: everything that they give.

linen: the bits of the unswapped module. nnx: the bits of nnx with linen's attention; beside the unmodified module,
the same bits where that takes linen's steps, and contract C3 where it takes a path of its own.
"""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import anyattention as aa
from anyattention_conformance.budgets import EPS

COMPILED = {}


def jit(function):
    """jax.jit, except that a program compiled before is not compiled again: ours is Flax's, to the letter."""

    def run(*args):
        lowered = jax.jit(function).lower(*args)
        program = lowered.as_text(), lowered.out_tree
        if program not in COMPILED:
            COMPILED[program] = lowered.compile()
        return COMPILED[program](*args)

    return run


OURS = {"bare": aa.dot_product_attention, "exact": partial(aa.dot_product_attention, implementation="exact")}
MODES = {"eager": lambda function: function, "jit": jit}
every_function = pytest.mark.parametrize("ours", OURS)
every_mode = pytest.mark.parametrize("mode", MODES)


def rounded(x):
    """float32 numbers that every dtype below holds."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


X, COTANGENT = (
    rounded(jnp.asarray(x)) for x in np.random.default_rng(0).standard_normal((2, 2, 5, 16), dtype=np.float32)
)  # [batch, length, features]
CAUSAL = linen.make_causal_mask(X[..., 0])  # float32, as Flax makes it
HIDDEN_ROW = np.tri(5, k=-1, dtype=bool)[None, None]  # the first query sees nothing
PADDING = np.asarray([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=bool)[:, None, None, :]  # nor here, with is_causal

DROP = {"dropout_rate": 0.3}
DROP_EACH = DROP | {"broadcast_dropout": False}
BFLOAT16 = {"dtype": jnp.bfloat16}
GROUPED = {"num_kv_heads": 2}
DECODE = {  # name: options of the module, options of the call
    "plain": ({}, {}),
    "mask": ({}, {"mask": PADDING}),
    "bfloat16": (BFLOAT16, {}),
    "grouped_heads": (GROUPED, {"mask": PADDING}),
}


def assert_same_bits(actual, expected):
    def same(actual, expected):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()

    jax.tree.map(same, actual, expected)


def forward_and_gradient(apply, params, mode):
    """Output, what was sown, and the gradient in the parameters and in the input."""

    def loss(params, x):
        output, sown = apply(params, x)
        return jnp.vdot(output.astype(x.dtype), COTANGENT.astype(x.dtype)), (output, sown)

    both = MODES[mode](jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (output, sown)), (gradient, input_gradient) = both(params, X.astype(jax.tree.leaves(params)[0].dtype))
    return {"output": output, "sown": sown, "gradient": gradient | {"input": input_gradient}}


# --- linen ---


def rounded_einsum():
    """An einsum factory, as quantised models have one: this one rounds to bfloat16."""
    return lambda equation, x, y: rounded(jnp.einsum(equation, rounded(x), rounded(y)))


EINSUMS = {"qk_attn_weights_einsum_cls": rounded_einsum, "attn_weights_value_einsum_cls": rounded_einsum}
FP32 = {"force_fp32_for_softmax": True}
LINEN = {  # name: options of the module, options of the call
    "plain": ({}, {}),
    "mask": ({}, {"mask": CAUSAL}),
    "mask_that_hides_a_row": ({}, {"mask": HIDDEN_ROW}),
    "dropout": (DROP, {"deterministic": False}),
    "dropout_for_each_head": (DROP_EACH, {"deterministic": False}),
    "dropout_switched_off": (DROP, {"deterministic": True}),
    "sow_weights": ({}, {"sow_weights": True}),
    "bfloat16": (BFLOAT16, {}),
    "force_fp32_for_softmax": (BFLOAT16 | FP32, {}),
    "einsum_overrides": (EINSUMS, {}),
    "all_at_once": (
        DROP | BFLOAT16 | FP32 | EINSUMS,
        {"mask": CAUSAL, "sow_weights": True, "deterministic": False, "dropout_rng": jax.random.key(2)},
    ),
}


def linen_layer(**options):
    init = {"bias_init": linen.initializers.normal()}
    return linen.MultiHeadDotProductAttention(num_heads=4, qkv_features=24, **init, **options)


@cache
def linen_params():
    return linen_layer().init(jax.random.key(0), X)["params"]


@cache
def linen_results(case, mode, **swap):
    options, call = LINEN[case]
    layer = linen_layer(**options, **swap)

    def apply(params, x):
        return layer.apply(
            {"params": params}, x, rngs={"dropout": jax.random.key(1)}, mutable=["intermediates"], **call
        )

    return forward_and_gradient(apply, linen_params(), mode)


@every_mode
@every_function
@pytest.mark.parametrize("case", LINEN)
def test_linen_has_the_bits_of_the_unswapped_module(case, ours, mode):
    assert_same_bits(linen_results(case, mode, attention_fn=OURS[ours]), linen_results(case, mode))


@pytest.mark.parametrize("case", [case for case in LINEN if case not in ("plain", "dropout_switched_off")])
def test_linen_option_has_an_effect(case):
    """Else equal bits would not show that it was passed on."""
    without = "bfloat16" if case == "force_fp32_for_softmax" else "plain"
    with pytest.raises((AssertionError, ValueError)):
        assert_same_bits(linen_results(case, "eager"), linen_results(without, "eager"))


@cache
def linen_decode(case, mode, **swap):
    """Outputs and caches, a step for each position."""
    options, call = DECODE[case]
    layer = linen_layer(decode=True, **options, **swap)
    variables = {"params": linen_params(), "cache": layer.init(jax.random.key(0), X)["cache"]}
    step = MODES[mode](lambda variables, x: layer.apply(variables, x, mutable=["cache"], **call))
    results = []
    for position in range(X.shape[1]):
        output, state = step(variables, X[:, position : position + 1])
        variables |= state
        results.append((output, state))
    return results


@every_mode
@every_function
@pytest.mark.parametrize("case", ["plain", "mask", "bfloat16"])
def test_linen_decode_has_the_bits_and_the_cache_of_the_unswapped_module(case, ours, mode):
    assert_same_bits(linen_decode(case, mode, attention_fn=OURS[ours]), linen_decode(case, mode))


# --- nnx ---

NNX = {  # name: options of the module, options of the call
    "plain": ({}, {}),
    "mask": ({}, {"mask": CAUSAL}),
    "is_causal": ({}, {"is_causal": True}),
    "is_causal_and_mask": ({}, {"is_causal": True, "mask": PADDING}),
    "bfloat16": (BFLOAT16, {"is_causal": True}),
    "grouped_heads": (GROUPED, {}),
    "grouped_heads_in_bfloat16": (GROUPED | BFLOAT16, {"is_causal": True, "mask": PADDING}),
    "dropout_by_its_own_rngs": (DROP, {"deterministic": False}),
    "dropout_by_rngs_of_the_call": (DROP_EACH, {"deterministic": False, "rngs": 3}),
    "dropout_switched_off": (DROP, {"deterministic": True}),
    "sow_weights": ({}, {"sow_weights": True}),
    "all_at_once": (DROP, {"deterministic": False, "sow_weights": True, "is_causal": True, "mask": CAUSAL}),
    "grouped_heads_and_all_at_once": (
        DROP_EACH | GROUPED,
        {"deterministic": False, "sow_weights": True, "is_causal": True, "mask": np.repeat(PADDING, 5, axis=-2)},
    ),
}
# With dropout or sowing nnx takes linen's steps; without, another path: jax.nn.dot_product_attention.
LINENS_STEPS = [case for case, (options, call) in NNX.items() if "dropout_rate" in options or "sow_weights" in call]
OTHER_PATH = [case for case in NNX if case not in LINENS_STEPS]


def reference(query, key, value, *, mask=None, is_causal=False, module=None, **options):
    """Linen's attention as nnx calls it; for grouped heads, which linen refuses, the same steps in nnx's words."""
    if is_causal:
        causal = jnp.tri(query.shape[-3], key.shape[-3], dtype=bool)
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    if query.shape[-2] == key.shape[-2]:
        return linen.dot_product_attention(query, key, value, mask=mask, module=module, **options)
    module = module or SimpleNamespace(sow=lambda *_: None)  # any module keeps nnx from its other path
    return nnx.dot_product_attention(query, key, value, mask=mask, module=module, **options)


def nnx_layer(**options):
    """A layer with parameters that every dtype holds; in float64 the very same."""
    init = {"bias_init": nnx.initializers.normal(), "rngs": nnx.Rngs(0)}
    layer = nnx.MultiHeadAttention(4, 16, qkv_features=24, **init, **options)
    wide = jnp.promote_types(options.get("dtype", jnp.float32), jnp.float32)
    nnx.update(layer, jax.tree.map(lambda x: rounded(x).astype(wide), nnx.state(layer, nnx.Param)))
    return layer


@cache
def nnx_results(case, mode, **swap):
    options, call = NNX[case]
    graph, params, state = nnx.split(nnx_layer(decode=False, **options | swap), nnx.Param, ...)

    def apply(params, x):
        layer = nnx.merge(graph, nnx.State(params), state, copy=True)
        rngs = {"rngs": nnx.Rngs(dropout=call["rngs"])} if "rngs" in call else {}
        output, sown = nnx.capture(layer, nnx.Intermediate)(x, **call | rngs)
        return output, nnx.to_pure_dict(sown)

    return forward_and_gradient(apply, nnx.to_pure_dict(params), mode)


@every_mode
@every_function
@pytest.mark.parametrize("case", NNX)
def test_nnx_has_the_bits_of_nnx_with_linens_attention(case, ours, mode):
    expected = nnx_results(case, mode, attention_fn=reference)
    assert_same_bits(nnx_results(case, mode, attention_fn=OURS[ours]), expected)


@every_mode
@every_function
@pytest.mark.parametrize("case", LINENS_STEPS)
def test_nnx_dropout_and_sowing_have_the_bits_of_the_unmodified_module(case, ours, mode):
    assert_same_bits(nnx_results(case, mode, attention_fn=OURS[ours]), nnx_results(case, mode))


@pytest.mark.parametrize("case", [case for case in NNX if case not in ("plain", "dropout_switched_off")])
def test_nnx_option_has_an_effect(case):
    with pytest.raises((AssertionError, ValueError)):
        assert_same_bits(*(nnx_results(each, "eager", attention_fn=reference) for each in (case, "plain")))


def in_float64(results, case):
    """The same module, parameters and input, in float64."""
    with jax.enable_x64(True):
        return jax.device_get(results(case, "eager", attention_fn=reference, dtype=jnp.float64))


def assert_within_c3(ours, flax, truth, dtype):
    """No further from the truth than twice Flax plus 4 eps, the largest error and the root mean square.

    The unit of eps is the largest number of its kind: of the output; of the gradient in a layer, kernel and bias
    together, since that of the key's bias is all rounding.
    """
    kinds = [("output",), *(("gradient", layer) for layer in truth.get("gradient", ()))]
    for kind in kinds:
        true = leaves(truth, kind)
        unit = max(np.max(np.abs(x)) for x in true)
        for a, b, x in zip(leaves(ours, kind), leaves(flax, kind), true, strict=True):
            assert np.max(np.abs(b - x)) < unit / 20, "this is no truth of it"
            for norm in (np.max, lambda error: np.sqrt(np.mean(error**2))):
                budget = 2 * norm(np.abs(b - x)) + 4 * EPS[jnp.dtype(dtype).name] * unit
                assert norm(np.abs(a - x)) <= budget, kind


def leaves(results, kind):
    for name in kind:
        results = results[name]
    return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(results)]


@every_mode
@every_function
@pytest.mark.parametrize("case", OTHER_PATH)
def test_nnx_is_within_c3_of_the_unmodified_module(case, ours, mode):
    actual, unmodified = nnx_results(case, mode, attention_fn=OURS[ours]), nnx_results(case, mode)
    assert_within_c3(actual, unmodified, in_float64(nnx_results, case), NNX[case][0].get("dtype", X.dtype))


@cache
def nnx_decode(case, mode, **swap):
    """Outputs and caches, a step for each position."""
    options, call = DECODE[case]
    options = options | swap
    layer = nnx_layer(decode=True, **options)
    layer.init_cache(X.shape, options.get("dtype", X.dtype))

    def step(layer, x):
        return layer(x, **call)

    step = nnx.jit(step) if mode == "jit" else step
    results = {"output": [], "caches": []}
    for position in range(X.shape[1]):
        results["output"].append(step(layer, X[:, position : position + 1]))
        results["caches"].append(nnx.to_pure_dict(nnx.state(layer, nnx.Cache)))
    return results


@every_mode
@every_function
@pytest.mark.parametrize("case", DECODE)
def test_nnx_decode_has_the_bits_and_the_cache_of_nnx_with_linens_attention(case, ours, mode):
    expected = nnx_decode(case, mode, attention_fn=reference)
    assert_same_bits(nnx_decode(case, mode, attention_fn=OURS[ours]), expected)


@every_mode
@every_function
@pytest.mark.parametrize("case", DECODE)
def test_nnx_decode_is_within_c3_of_the_unmodified_module(case, ours, mode):
    actual, unmodified = nnx_decode(case, mode, attention_fn=OURS[ours]), nnx_decode(case, mode)
    assert_within_c3(actual, unmodified, in_float64(nnx_decode, case), DECODE[case][0].get("dtype", X.dtype))


def test_grouped_heads_have_the_bits_of_nnx():
    q = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    k = jax.random.normal(jax.random.key(1), (2, 6, 2, 8))
    options = {"dropout_rng": jax.random.key(2), "dropout_rate": 0.2}
    expected = nnx.dot_product_attention(q, k, k, **options)
    np.testing.assert_array_equal(aa.dot_product_attention(q, k, k, **options), expected)
    raw = [np.asarray(x) for x in (q, k)]
    np.testing.assert_allclose(aa.dot_product_attention(raw[0], raw[1], raw[1], **options), expected, atol=2e-6)


# --- nnx.RoPE ---

since_rope = pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="nnx.RoPE is of Flax 0.12.12, which wants Python 3.12")


@cache
def rope():
    """Without the tables that it can keep, which give a warning of Flax itself."""
    return nnx.RoPE()


def with_rope(query, key, value, *, attention, input_positions=None, **options):
    """Attention of rotated queries and keys: what `nnx.dot_product_attention_with_rope` does, whatever the attention.

    A cache holds keys that are not rotated, from position 0 on; the positions of a call are its queries'.
    """
    rotate = jax.vmap(rope(), in_axes=(-2, None), out_axes=-2)
    return attention(rotate(query, input_positions), rotate(key, None), value, **options)


ROTATED = {name: partial(with_rope, attention=function) for name, function in (*OURS.items(), ("linen", reference))}


@cache
def flax_with_rope():
    return partial(nnx.dot_product_attention_with_rope, rope=rope())


@since_rope
@every_mode
@every_function
@pytest.mark.parametrize("case", ["all_at_once", "grouped_heads_and_all_at_once", "is_causal"])
def test_rope_has_the_bits_of_nnx(case, ours, mode):
    """Of the unmodified function where it takes linen's steps, else of linen's attention of the same rotated arrays."""
    theirs = flax_with_rope() if case in LINENS_STEPS else ROTATED["linen"]
    assert_same_bits(nnx_results(case, mode, attention_fn=ROTATED[ours]), nnx_results(case, mode, attention_fn=theirs))


@since_rope
@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_rope_is_close_to_the_unmodified_function(implementation):
    """Where that takes its other path; and the rotation shows."""
    ours = partial(with_rope, attention=partial(aa.dot_product_attention, implementation=implementation))
    functions = ours, flax_with_rope(), nnx.dot_product_attention
    results = [nnx_layer(decode=False, attention_fn=f)(X, mask=CAUSAL) for f in functions]
    np.testing.assert_allclose(results[0], results[1], atol=4e-6)
    assert np.abs(results[1] - results[2]).max() > 0.01


def decode_with_rope(attention_fn, mode, **options):
    """The outputs, a step for each position, which the module passes on."""
    layer = nnx_layer(decode=True, attention_fn=attention_fn, **options)
    layer.init_cache(X.shape, X.dtype)

    def step(layer, x, position):
        return layer(x, input_positions=position)

    step = nnx.jit(step) if mode == "jit" else step
    return jnp.concatenate([step(layer, X[:, i : i + 1], jnp.full(1, i)) for i in range(X.shape[1])], axis=1)


@since_rope
@every_mode
@pytest.mark.parametrize("options", [{}, GROUPED], ids=["heads", "grouped_heads"])
def test_decode_with_rope(options, mode):
    """With the bits of linen's attention; each step is a row of the causal call of the unmodified function."""
    whole = nnx_layer(decode=False, attention_fn=flax_with_rope(), **options)(X, is_causal=True)
    linens = decode_with_rope(ROTATED["linen"], mode, **options)
    for ours in OURS:
        assert_same_bits(decode_with_rope(ROTATED[ours], mode, **options), linens)
    tiled = decode_with_rope(
        partial(with_rope, attention=partial(aa.dot_product_attention, implementation="tiled")), mode, **options
    )
    for found in (linens, tiled):
        np.testing.assert_allclose(found, whole, atol=4e-6)


@since_rope
def test_flax_takes_no_positions_itself():
    """In Flax 0.12.12 it maps over them as over heads: why a decoding model needs a function such as ours here."""
    x = jnp.ones((2, 5, 4, 8))
    for positions in (jnp.arange(5), jnp.ones((2, 5)), jnp.arange(4), jnp.ones((2, 4)), jnp.ones((2, 5, 4))):
        with pytest.raises((ValueError, TypeError, IndexError)):
            flax_with_rope()(x, x, x, input_positions=positions)
