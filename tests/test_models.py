"""What today's models ask for beyond Flax: a scale, a soft cap, sinks. Against the formula in float64, written here."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, LocalMask

LIBRARIES = {"numpy": np.asarray, "jax": jnp.asarray, "torch": torch.asarray}
WORDS = {
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.2},
    "zero scale": {"scale": 0.0},
    "soft cap": {"logits_soft_cap": 1.5},
    "cap below the logits": {"scale": 4.0, "logits_soft_cap": 3.0},
    "both": {"scale": 0.7, "logits_soft_cap": 2.0},
    "sinks": {"sinks": lambda put: put(draw(9, (4,)))},
    "sinks of each query": {"sinks": lambda put: put(3 * draw(9, (2, 4, 130)))},
    "large sinks": {"sinks": lambda put: put(np.array([[30.0], [-40.0], [90.0], [1.0]], np.float32)), "scale": 0.3},
    "all": {"scale": 0.7, "logits_soft_cap": 2.0, "sinks": lambda put: put(draw(9, (4,)))},
}
BESIDE = {
    "alone": {},
    "causal": {"is_causal": True},
    "window and lengths": {"mask": lambda put: LocalMask(40, 3) & LengthMask(put(np.array([90, 0])))},
    "mask": {"mask": lambda put: put(np.random.default_rng(5).random((2, 1, 130, 150)) > 0.4)},
    "bias": {"bias": lambda put: put(draw(3, (2, 4, 130, 150)))},
    "bias and mask": {
        "bias": lambda put: put(draw(3, (1, 4, 1, 150))),
        "mask": lambda put: put(np.arange(150) < 77),
    },
    "dropout": {"dropout_rate": 0.3, "dropout_rng": lambda put: aa.random.key(7)},
    "dropout of each head": {
        "dropout_rate": 0.3,
        "dropout_rng": lambda put: aa.random.key(7),
        "broadcast_dropout": False,
    },
}


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@functools.cache
def arrays(grouped=False):
    heads = 2 if grouped else 4
    return draw(0, (2, 130, 4, 16)), draw(1, (2, 150, heads, 16)), draw(2, (2, 150, heads, 24))


def made(options, put):
    return {key: x(put) if callable(x) else x for key, x in options.items()}


@functools.cache
def truth(word, name, grouped=False):
    """The output and the gradients of its sum of squares, by JAX's derivative of the formula in float64."""
    with jax.enable_x64(True):
        words, options = made(WORDS[word], np.asarray), made(BESIDE[name], np.asarray)
        q, k, v = (jnp.asarray(x, "float64") for x in arrays(grouped))
        more = {"bias": options.get("bias"), "sinks": words.get("sinks")}
        names = [name for name, x in more.items() if x is not None]
        given = [q, k, v, *(jnp.asarray(more[name], "float64") for name in names)]

        def formula(q, k, v, *rest):
            bias, sinks = (dict(zip(names, rest, strict=True)).get(name) for name in ("bias", "sinks"))
            group = q.shape[-2] // k.shape[-2]
            k, v = (jnp.repeat(x, group, axis=-2) for x in (k, v))
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * words.get("scale", q.shape[-1] ** -0.5)
            if (cap := words.get("logits_soft_cap")) is not None:
                logits = cap * jnp.tanh(logits / cap)
            logits = logits if bias is None else logits + bias
            mask = CausalMask() if options.get("is_causal") else options.get("mask")
            if mask is not None:
                mask = mask if isinstance(mask, np.ndarray) else mask.to_array(*logits.shape[-2:])
                logits = jnp.where(mask, logits, np.finfo(np.float32).min)
            if sinks is not None:
                sinks = sinks[:, None] if sinks.ndim == 1 else sinks
                logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[..., None], (*logits.shape[:-1], 1))], -1)
            weights = jax.nn.softmax(logits)[..., : k.shape[1]]
            if "dropout_rng" in options:
                shape = (1, 1, *weights.shape[-2:]) if options.get("broadcast_dropout", True) else weights.shape
                keep = aa.random.bernoulli(options["dropout_rng"], np.float32(0.7), shape)
                weights = weights * np.asarray(keep) / 0.7
            return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

        output = formula(*given)
        gradients = jax.grad(lambda *x: (formula(*x) ** 2).sum(), tuple(range(len(given))))(*given)
        return [np.asarray(x) for x in (output, *gradients)]


def ours(library, implementation, word, name, grouped=False):
    """The output of a library, and the gradients of its sum of squares where it has them; of NumPy by the pullback."""
    put = LIBRARIES[library]
    options = {**made(WORDS[word], put), **made(BESIDE[name], put)}
    more = {name: options.pop(name) for name in ("bias", "sinks") if name in options}
    given = [*map(put, arrays(grouped)), *more.values()]

    def call(q, k, v, *rest):
        beside = dict(zip(more, rest, strict=True))
        return aa.dot_product_attention(q, k, v, implementation=implementation, **beside, **options)

    if library == "numpy":
        output = call(*given)
        if implementation != "tiled":
            return [output]
        _, pullback = aa.dot_product_attention_vjp(*given[:3], **more, **options)
        return [output, *(x for x in pullback(2 * output) if x is not None)]
    if library == "jax":
        output, gradients = jax.jit(lambda *x: (call(*x), jax.vjp(call, *x)[1](2 * call(*x))))(*given)
        return [output, *gradients]
    leaves = [x.clone().requires_grad_() for x in given]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad((output**2).sum(), leaves)]


def pairs():
    """JAX compiles each for seconds: beside something else it has all words at once, and each kind of sinks."""
    for word, name in itertools.product(WORDS, BESIDE):
        wanted = word in ("sinks", "all") or name in ("alone", "window and lengths")
        of_jax = word == "all" or name == "alone" or (name == "window and lengths" and "sinks" in word)
        yield from ((library, word, name) for library in LIBRARIES if wanted and (library != "jax" or of_jax))


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize(("library", "word", "name"), list(pairs()))
def test_the_formula(library, implementation, word, name):
    found, right = ours(library, implementation, word, name), truth(word, name)
    for x, y in zip(found, right[: len(found)], strict=True):
        assert tuple(x.shape) == y.shape
        np.testing.assert_allclose(np.asarray(x), y, atol=3e-6 * max(1.0, np.abs(y).max()), rtol=0)


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_grouped_heads(library, implementation):
    for x, y in zip(ours(library, implementation, "all", "causal", True), truth("all", "causal", True), strict=False):
        np.testing.assert_allclose(np.asarray(x), y, atol=3e-6 * max(1.0, np.abs(y).max()), rtol=0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_caps_of_any_size(library):
    """Far beyond the logits a cap changes nothing, and costs no digits; far below them all keys count alike."""
    put = LIBRARIES[library]
    q, k, v = map(put, (draw(0, (1, 40, 2, 16)), draw(1, (1, 3, 2, 16)), draw(2, (1, 3, 2, 16))))
    call = partial(aa.dot_product_attention, q, k, v, implementation="tiled")
    for cap in (1e4, 1e12, 1e30 if library == "jax" else 1e38):  # of which XLA makes zeros
        np.testing.assert_allclose(np.asarray(call(logits_soft_cap=cap)), np.asarray(call()), rtol=0, atol=6e-7)
    for cap in (1e-12, 1e-38):
        mean = np.broadcast_to(np.asarray(v).mean(1, keepdims=True), (1, 40, 2, 16))
        np.testing.assert_allclose(np.asarray(call(logits_soft_cap=cap)), mean, rtol=0, atol=6e-7)


# --- 16 bits, programs, more derivatives, engines ---


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_16_bits(library, dtype, implementation):
    """Within a few roundings of the formula at the rounded inputs, each word; on JAX tiled has all at once."""
    put = {"numpy": lambda x: x.astype(dtype), "jax": lambda x: jnp.asarray(x, dtype)}.get(library)
    put = put or (lambda x: torch.asarray(x).to(getattr(torch, dtype)))
    chosen = ("large sinks", "all") if (library, implementation) == ("jax", "tiled") else WORDS
    for words in (made(WORDS[word], put) for word in chosen):
        q, k, v = given = [put(x) for x in arrays()]
        output = aa.dot_product_attention(*given, implementation=implementation, **words)
        assert dtype in str(output.dtype)
        q, k, v = (np.asarray(x.float() if library == "torch" else x, np.float64) for x in given)
        logits = np.einsum("bqhd,bkhd->bhqk", q, k) * words.get("scale", 16**-0.5)
        if (cap := words.get("logits_soft_cap")) is not None:
            logits = cap * np.tanh(logits / cap)
        if (sinks := words.get("sinks")) is not None:
            sinks = np.asarray(sinks.float() if library == "torch" else sinks, np.float64)
            sinks = (sinks[:, None] if sinks.ndim == 1 else sinks)[..., None]
            logits = np.concatenate([logits, np.broadcast_to(sinks, (*logits.shape[:-1], 1))], -1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True))[..., :150]
        right, size = (np.einsum("bhqk,bkhd->bqhd", weights, x) for x in (v, np.abs(v)))
        eps = float(jnp.finfo(dtype).eps)
        error = np.abs(np.asarray(output.float() if library == "torch" else output, np.float64) - right)
        kappa = np.abs(logits).max()
        assert (error <= eps * (2 + 2 * kappa) * size.max()).all()


def with_sinks(call, q, k, v, sinks):
    return call(q, k, v, sinks=sinks)


@pytest.mark.parametrize("implementation", ["exact", "tiled", None])
def test_programs_of_pytorch(implementation):
    """One graph each; of scales that are numbers the second does not change what the first computes."""
    torch._dynamo.reset()  # else the programs of other tests count too
    q, k, v = (torch.asarray(x) for x in arrays())
    for words in (WORDS["both"], WORDS["scale"], {"scale": 0.4}, {"scale": 0.5}):
        call = partial(aa.dot_product_attention, implementation=implementation, **words)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, torch.asarray(draw(9, (4,))))]
        call = partial(with_sinks, call) if implementation else (lambda *x, call=call: call(*x[:3]))
        leaves = leaves if implementation else leaves[:3]
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        output, right = compiled(*leaves), call(*leaves)
        torch.testing.assert_close(output, right, rtol=1e-5, atol=1e-6)
        found, wanted = (torch.autograd.grad(x.square().sum(), leaves) for x in (output, right))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")  # PyTorch's own
def test_second_derivatives():
    small = [x[:1, :5, :2, :4].astype("float64") for x in arrays()]
    words = WORDS["both"]

    def by(implementation):
        def loss(q):
            return (
                aa.dot_product_attention(q, *map(like(q), small[1:]), implementation=implementation, **words) ** 2
            ).sum()

        return loss

    def like(x):
        return jnp.asarray if isinstance(x, jax.Array) else torch.asarray

    with jax.enable_x64(True):
        exact, tiled = (np.asarray(jax.hessian(by(name))(jnp.asarray(small[0]))) for name in ("exact", "tiled"))
    np.testing.assert_allclose(tiled, exact, atol=1e-10)
    found = torch.func.hessian(by("tiled"))(torch.asarray(small[0]))
    np.testing.assert_allclose(found, exact, atol=1e-10)
    assert np.abs(exact).max() > 0.01


def test_second_derivatives_beside_sinks():
    """Of query and sinks, PyTorch's against JAX's of exact: the base of a row's statistics is the sinks' too."""
    given = [x[:1, :5, :2, :4].astype("float64") for x in arrays()] + [draw(9, (2,)).astype("float64")]

    def first(grad, put, implementation):
        def loss(query, sinks):
            more = {"sinks": sinks, "implementation": implementation}
            return (aa.dot_product_attention(query, *map(put, given[1:3]), **more) ** 2).sum()

        return lambda query, sinks: sum((x**2).sum() for x in grad(loss)(query, sinks))

    with jax.enable_x64(True):
        twice = jax.grad(first(partial(jax.grad, argnums=(0, 1)), jnp.asarray, "exact"), (0, 1))
        right = [np.asarray(x) for x in twice(*map(jnp.asarray, (given[0], given[3])))]
    leaves = [torch.asarray(x).requires_grad_() for x in (given[0], given[3])]

    def grad(loss):
        return lambda *x: torch.autograd.grad(loss(*x), x, create_graph=True)

    found = torch.autograd.grad(first(grad, torch.asarray, "tiled")(*leaves), leaves)
    for x, y in zip(found, right, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")  # PyTorch's own
def test_forward_mode():
    """In each way that PyTorch has, which must see every step of a soft cap."""
    q, k, v, dq = (torch.asarray(draw(seed, (1, 20, 2, 8))).double() for seed in range(4))

    def call(q, implementation="tiled"):
        return aa.dot_product_attention(q, k, v, logits_soft_cap=0.5, implementation=implementation)

    right = torch.func.jvp(partial(call, implementation="exact"), (q,), (dq,))[1]
    torch.testing.assert_close(torch.func.jvp(call, (q,), (dq,))[1], right)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(forward_ad.make_dual(q, dq))).tangent
    torch.testing.assert_close(found, right)


def test_a_cap_with_many_threads_of_pytorch(monkeypatch):
    """Then by PyTorch's tanh, which takes them all."""
    monkeypatch.setattr("anyattention_backends.torch.tiles._FEW_THREADS", 0)
    for x, y in zip(ours("torch", "tiled", "soft cap", "alone"), truth("soft cap", "alone"), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=3e-6 * max(1.0, np.abs(y).max()), rtol=0)


def test_mapped():
    given, words = (*arrays(), draw(9, (2, 4))), WORDS["both"]
    call = partial(with_sinks, partial(aa.dot_product_attention, implementation="tiled", **words))
    right = aa.dot_product_attention(*given[:3], sinks=given[3][..., None], **words)
    np.testing.assert_allclose(jax.vmap(call)(*given), right, atol=1e-5)
    np.testing.assert_allclose(torch.vmap(call)(*map(torch.asarray, given)), right, atol=1e-5)


@pytest.mark.parametrize("name", ["alone", "causal", "bias", "window and lengths"])
def test_sdpa_has_the_scale(name):
    put = torch.asarray
    options = {**WORDS["scale"], **made(BESIDE[name], put)}
    bias = options.pop("bias", None)
    if name == "window and lengths":  # of which SDPA has the lengths
        options["mask"] = LengthMask(torch.tensor([90, 0]))
    leaves = [put(x).requires_grad_() for x in arrays()]
    output = aa.dot_product_attention(*leaves, bias, implementation="fused", **options)
    exact = aa.dot_product_attention(*leaves, bias, implementation="exact", **options)
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5)
    found, right = (torch.autograd.grad(x.square().sum(), leaves) for x in (output, exact))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_engines_without_a_soft_cap_refuse_it():
    q, k, v = map(torch.asarray, arrays())
    plan = aa.explain(q, k, v, logits_soft_cap=2.0)
    assert plan.implementation in ("tiled", "exact")
    assert "sdpa: it has no soft cap" in str(plan)
    assert "sdpa: it has no sinks" in str(aa.explain(q, k, v, sinks=torch.zeros(4)))
    with pytest.raises(NotImplementedError, match="it has no soft cap"):
        aa.dot_product_attention(q, k, v, logits_soft_cap=2.0, implementation="fused")


def test_sinks_of_numpy_beside_other_arrays():
    sinks = draw(9, (4,))
    for put in (jnp.asarray, torch.asarray):
        found, right = (aa.dot_product_attention(*map(put, arrays()), sinks=x) for x in (sinks, put(sinks)))
        np.testing.assert_array_equal(found, right)


def test_fully_masked_rows_get_zero_beside_sinks():
    """In place of the mean of all values; hidden NaN does not show."""
    q, k, v = arrays()
    k = np.where(np.arange(150)[:, None, None] < 90, k, np.nan).astype(np.float32)
    for put in LIBRARIES.values():
        mask = LengthMask(put(np.array([90, 0])))
        output = aa.dot_product_attention(
            *map(put, (q, k, v)), mask=mask, sinks=put(draw(9, (4,))), implementation="tiled"
        )
        assert np.isfinite(np.asarray(output)).all()
        assert (np.asarray(output)[1] == 0).all()


def test_sinks_that_are_none_or_nothing():
    """A sink of minus infinity has no part; one of zero is a softmax whose sum has one more."""
    q, k, v = arrays()
    for implementation in ("exact", "tiled"):
        call = partial(aa.dot_product_attention, q, k, v, implementation=implementation)
        np.testing.assert_allclose(call(sinks=np.full(4, -np.inf, np.float32)), call(), atol=1e-6)
        logits = np.einsum("bqhd,bkhd->bhqk", q, k).astype("float64") / 4
        weights = np.exp(logits) / (1 + np.exp(logits).sum(-1, keepdims=True))
        right = np.einsum("bhqk,bkhd->bqhd", weights, v)
        np.testing.assert_allclose(call(sinks=np.zeros(4, np.float32)), right, atol=2e-6)


@pytest.mark.parametrize(
    ("sinks", "kind", "message"),
    [
        (np.zeros(3, np.float32), aa.ShapeError, r"sinks have shape \(3,\), but need \[num_heads\], \(4,\)"),
        (np.zeros((3, 1), np.float32), aa.ShapeError, r"sinks have shape \(3, 1\)"),
        (np.zeros((4, 129), np.float32), aa.ShapeError, r"sinks have shape \(4, 129\)"),
        (np.zeros((1, 2, 4, 1), np.float32), aa.ShapeError, r"sinks have shape \(1, 2, 4, 1\)"),
        (np.float32(0.0), aa.ShapeError, r"sinks have shape \(\)"),
        (np.zeros(4, np.complex64), TypeError, "sinks must be real numbers, got complex64"),
        (np.zeros(4, bool), TypeError, "sinks must be real numbers, got bool"),
        (0.0, TypeError, "sinks must be an array, one logit for each head, got a float"),
        ([0.0] * 4, TypeError, "sinks must be an array, one logit for each head, got a list"),
        (torch.zeros(4), TypeError, "arrays of different libraries in one call"),
    ],
)
def test_what_are_no_sinks(sinks, kind, message):
    q, k, v = arrays()
    with pytest.raises(kind, match=message):
        aa.dot_product_attention(q, k, v, sinks=sinks)


def test_weights_and_grouped_heads():
    q, k, _ = arrays(True)
    weights = aa.dot_product_attention_weights(q, k, **WORDS["both"])
    logits = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, 2, axis=2)).astype("float64") * 0.7
    logits = 2.0 * np.tanh(logits / 2.0)
    right = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, right, atol=1e-6)


@pytest.mark.parametrize("number", [np.float32(0.3), np.array(0.3), 1, np.int64(1), torch.tensor(0.3)])
def test_numbers_of_any_kind(number):
    q, k, v = arrays()
    options = {"scale": number, "logits_soft_cap": number}
    wanted = {name: float(x) for name, x in options.items()}
    np.testing.assert_array_equal(
        aa.dot_product_attention(q, k, v, **options), aa.dot_product_attention(q, k, v, **wanted)
    )


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"scale": "0.5"}, TypeError, "scale must be a number, known when the call is made, got '0.5'"),
        ({"scale": True}, TypeError, "scale must be a number"),
        ({"scale": np.ones(2)}, TypeError, "scale must be a number"),
        ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be positive and finite, got 0.0"),
        ({"logits_soft_cap": -1}, ValueError, "logits_soft_cap must be positive and finite, got -1"),
        ({"logits_soft_cap": None, "scale": [0.5]}, TypeError, "scale must be a number"),
    ],
)
def test_what_is_no_such_number(options, kind, message):
    q, k, v = arrays()
    with pytest.raises(kind, match=message):
        aa.dot_product_attention(q, k, v, **options)


def test_a_traced_scale_is_refused():
    q, k, v = arrays()
    with pytest.raises(TypeError, match="scale must be a number, known when the call is made"):
        jax.jit(lambda s: aa.dot_product_attention(jnp.asarray(q), k, v, scale=s))(0.5)


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_cap_beyond_float16(library, implementation):
    """Which is infinite there, and made every output NaN; so large a cap changes nothing."""
    given = [LIBRARIES[library](x[:, :40].astype(np.float16)) for x in arrays()]
    found, expected = (
        np.asarray(aa.dot_product_attention(*given, logits_soft_cap=cap, implementation=implementation))
        for cap in (1e6, None)
    )
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=0, atol=2e-3)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_gradient_of_sinks_of_integers(library):
    """It is in the compute dtype, as that of a query of integers; once it was rounded to integers."""
    put = LIBRARIES[library]
    given = [put(x) for x in arrays()]
    (output, pullback), (_, expected) = (
        aa.dot_product_attention_vjp(*given, sinks=put(np.arange(4).astype(dtype))) for dtype in (np.int64, np.float32)
    )
    assert pullback(output)[4].dtype == output.dtype
    np.testing.assert_array_equal(pullback(output)[4], expected(output)[4])


@pytest.mark.parametrize("kind", [np.int8, bool])
@pytest.mark.parametrize("library", LIBRARIES)
def test_tiled_with_a_bias_of_integers(library, kind):
    """PyTorch has no absolute of bool, and that of -128 is no int8."""
    given = [LIBRARIES[library](x) for x in arrays()]
    bias = np.where(np.arange(150) % 3 == 0, -128, 1).astype(kind)
    found = aa.dot_product_attention(*given, bias=LIBRARIES[library](bias), implementation="tiled")
    expected = aa.dot_product_attention(*arrays(), bias=bias.astype(np.float32), implementation="exact")
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=2e-6)
