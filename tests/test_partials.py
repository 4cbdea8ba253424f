"""Attention over some of the keys, merged: against the formula in float64, written here, over all keys at once."""

import functools
import itertools

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import anyattention as aa
from anyattention import dot_product_attention, dot_product_attention_partial
from anyattention._src import plan, registry, threefry
from anyattention._src.blocks import cut_columns
from anyattention._src.implementations.tiled import TILED, prepare
from anyattention._src.tiles import partials, passes
from anyattention.masks import CausalMask, LengthMask, LocalMask, Rule, SegmentMask
from anyattention.partials import Partial, merge

RANDOM = np.random.default_rng(0)
LOWEST, EPS = float(np.finfo("f4").min), float(np.finfo("f4").eps)
QUERY = RANDOM.standard_normal((2, 32, 4, 8), dtype="f4")
KEY, VALUE = (RANDOM.standard_normal((2, 48, 2, 8), dtype="f4") for _ in range(2))
BIAS = RANDOM.standard_normal((4, 32, 48), dtype="f4")
SINKS = RANDOM.standard_normal(4, dtype="f4")
IDS = RANDOM.integers(0, 3, (2, 48))
DENSE = RANDOM.random((2, 1, 32, 48)) < 0.3
DENSE[0, :, 5] = DENSE[1, :, 7, :20] = False  # a row that is hidden everywhere, and one in some pages
MASKS = {
    "none": None,
    "causal": CausalMask(5),
    "window": LocalMask(9, -1),  # the first rows see nothing
    "lengths": LengthMask(np.array([20, 0])),
    "segments": SegmentMask(IDS[:, :32], IDS),
    "offsets and a rule": LocalMask(20, 1, np.array([14, -3]))
    | Rule(lambda i, j, mine, its: (mine > its) & ((i + j) % 3 == 0), (IDS[:, :32],), (IDS,)),
    "dense": DENSE,
}
WORDS = {
    "bias": {"bias": BIAS},
    "sinks and cap": {"sinks": SINKS, "scale": 0.7, "logits_soft_cap": 2.0},
}
WHOLE = 32, 48
PAGES = (0, 16), (16, 32), (32, 48)  # of one length, so that JAX compiles one program


def put(library, x):
    """Arrays of a library, in masks too."""
    if isinstance(x, aa.masks.Mask):
        return x.with_arrays(lambda x: put(library, x))
    return library.put(x) if isinstance(x, np.ndarray) else x


def cut(x, rows, columns):
    """Those queries and keys of a bias, a dense mask or ids; positions are the origin's."""
    if isinstance(x, aa.masks.Mask):
        ends = {WHOLE[0]: slice(*rows), WHOLE[1]: slice(*columns)}
        return x.with_arrays(lambda x: x[..., ends.get(x.shape[-1], slice(None))])
    return x[..., slice(*rows), slice(*columns)] if hasattr(x, "shape") else x


def pages(arrays, columns, mask=None, bias=None, sinks=None, rows=(0, 32), **options):
    """A partial of each range of keys; sinks with the first."""
    query, key, value = arrays
    for i, (start, stop) in enumerate(columns):
        more = {"mask": cut(mask, rows, (start, stop)), "bias": cut(bias, rows, (start, stop))}
        given = query[:, slice(*rows), ...], key[:, start:stop, ...], value[:, start:stop, ...]
        more |= {"sinks": sinks if i == 0 else None, "origin": (rows[0], start)}
        yield dot_product_attention_partial(*given, **more, **options)


def formula(xp, query, key, value, mask=None, bias=None, sinks=None, scale=None, logits_soft_cap=None):
    """The output, the logarithm of the sum of exponentials and the largest logit, by their definition."""
    group = query.shape[-2] // key.shape[-2]
    key, value = (xp.repeat(x, group, axis=-2) for x in (key, value))
    logits = xp.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if logits_soft_cap is None else logits_soft_cap * xp.tanh(logits / logits_soft_cap)
    logits = logits if bias is None else logits + bias
    if mask is not None:
        mask = mask.to_array(*logits.shape[-2:]) if isinstance(mask, aa.masks.Mask) else mask
        logits = xp.where(mask, logits, LOWEST)
    if sinks is not None:
        logits = xp.concatenate([logits, xp.broadcast_to(sinks[:, None, None], (*logits.shape[:-1], 1))], axis=-1)
    largest = xp.max(logits, axis=-1, keepdims=True)
    weights = xp.exp(logits - xp.where(largest == -np.inf, 0.0, largest))
    total = xp.sum(weights, axis=-1, keepdims=True)
    output = xp.einsum("bhqk,bkhd->bqhd", (weights / total)[..., : key.shape[1]], value)
    return output, largest[..., 0] + xp.log(total[..., 0]), largest[..., 0]


@functools.cache
def truth(name, words):
    """That in float64, and twice Flax's largest error, of the words that Flax has, with 4 eps: what C3 allows."""
    arrays = (QUERY, KEY, VALUE)
    right = formula(np, *(x.astype("f8") for x in arrays), MASKS[name], **WORDS[words])
    if words != "bias":
        return right, 2e-6
    mask = MASKS[name].to_array(*WHOLE) if isinstance(MASKS[name], aa.masks.Mask) else MASKS[name]
    flax = linen.dot_product_attention(QUERY, *(np.repeat(x, 2, axis=2) for x in arrays[1:]), BIAS, mask)
    return right, 2 * np.abs(np.asarray(flax) - right[0]).max() + 4 * EPS * np.abs(right[0]).max()


def splits(library):
    """Ranges of keys in any order; JAX compiles each length anew."""
    if library.name == "jax":
        yield (*PAGES[::-1], (48, 48))
        return
    for count in (1, 2, 5):
        ends = [0, *sorted(RANDOM.integers(0, 49, count - 1).tolist()), 48]
        yield tuple(RANDOM.permutation(list(itertools.pairwise(ends))).tolist())


@pytest.mark.parametrize(
    ("name", "words"), [*((name, "bias") for name in MASKS), ("lengths", "sinks and cap"), ("dense", "sinks and cap")]
)
def test_pages_merge_into_the_whole(library, name, words):
    """In any order and grouping; fully masked rows, in some pages or in all, and pages without keys too."""
    (output, lse, largest), allowed = truth(name, words)
    arrays, options = (
        [library.put(x) for x in (QUERY, KEY, VALUE)],
        {k: put(library, x) for k, x in WORDS[words].items()},
    )
    for columns in splits(library):
        found = list(pages(arrays, columns, put(library, MASKS[name]), **options))
        while len(found) > 1:  # two or three neighbours at a time
            start, many = RANDOM.integers(0, len(found) - 1), RANDOM.integers(2, 4)
            found[start : start + many] = [merge(*found[start : start + many])]
        assert [library.get(x).dtype for x in found[0]] == ["f4"] * 3
        assert isinstance(found[0].output, library.array_type)
        np.testing.assert_allclose(library.get(found[0].output), output, atol=allowed, rtol=0)
        np.testing.assert_allclose(library.get(found[0].max_logit), largest, atol=4e-6, rtol=EPS)
        np.testing.assert_allclose(library.get(found[0].lse), lse, atol=4e-6, rtol=EPS)


def test_the_largest_logit_is_exact_where_tiled_takes_none(library):
    """Small logits need no maximum otherwise. No sum is rounded. Fewer keys NumPy would compute without shortcuts."""
    query, key = np.zeros((1, 600, 1, 4), "f4"), np.zeros((1, 1000, 1, 4), "f4")
    query[..., 0], key[..., 1:3], key[..., 0] = 2.0, 1.0, RANDOM.integers(-64, 64, (1, 1000, 1)) / 64
    mask = RANDOM.random((600, 1000)) < 0.5
    found = dot_product_attention_partial(*map(library.put, (query, key, key)), mask=library.put(mask), scale=1.0)
    logits = np.where(mask, np.einsum("bqhd,bkhd->bhqk", query, key), -np.inf)
    np.testing.assert_array_equal(library.get(found.max_logit), logits.max(-1))
    np.testing.assert_allclose(
        library.get(found.total), np.exp(logits - logits.max(-1, keepdims=True)).sum(-1), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(library, dtype):
    """The statistics and the output in float32, at the rounded inputs."""
    arrays = [x.astype(jnp.dtype(dtype)) for x in (QUERY, KEY, VALUE)]
    output, lse, largest = formula(np, *(x.astype("f8") for x in arrays), LocalMask(9, -1).to_array(*WHOLE))
    found = merge(*pages([library.put(x) for x in arrays], PAGES, LocalMask(9, -1)))
    hidden = largest == LOWEST  # these have the fill of 16 bits
    assert {str(library.get(x).dtype) for x in found} == {"float32"}
    for x, right in zip((found.output, found.max_logit, found.lse), (output, largest, lse), strict=True):
        x, seen = library.get(x), True if x is found.output else ~hidden
        np.testing.assert_allclose(np.where(seen, x, 0), np.where(seen, right, 0), atol=4e-6)
    assert (library.get(found.max_logit)[hidden] == float(jnp.finfo(dtype).min)).all()
    assert (library.get(found.total)[hidden] == 48).all()


def test_rows_of_minus_infinity(library):
    """In one page they have no part; in all of them the row is NaN, as in Flax, and the others are not."""
    bias = np.where(np.arange(48) < 20, -np.inf, BIAS).astype("f4")
    bias[:, 3] = -np.inf
    with np.errstate(all="ignore"):
        output, lse, _ = formula(np, *(x.astype("f8") for x in (QUERY, KEY, VALUE)), bias=bias)
    first, *others = pages([library.put(x) for x in (QUERY, KEY, VALUE)], PAGES, bias=library.put(bias))
    assert np.isnan(library.get(first.output)).all()
    assert (library.get(first.lse) == -np.inf).all()
    for merged in (merge(first, *others), merge(*others, first)):
        np.testing.assert_allclose(library.get(merged.output), output, atol=2e-6)
        np.testing.assert_allclose(library.get(merged.lse), np.where(np.isnan(lse), -np.inf, lse), atol=4e-6)


def test_no_keys_change_nothing(library):
    arrays = [library.put(x) for x in (QUERY, KEY, VALUE)]
    some, none = pages(arrays, ((0, 16), (16, 16)))
    assert not library.get(none.output).any()
    assert not library.get(none.total).any()
    assert (library.get(none.lse) == -np.inf).all()
    for x in (merge(none, some), merge(some, none, none)):
        for found, right in zip(x, some, strict=True):
            np.testing.assert_allclose(library.get(found), library.get(right), rtol=2 * EPS)
    twice = merge(none, none)
    assert (library.get(twice.max_logit) == -np.inf).all()
    assert not library.get(twice.output).any()
    (sinks,) = pages(arrays, ((16, 16),), sinks=library.put(SINKS))
    both = merge(sinks, some)
    (right,) = pages(arrays, ((0, 16),), sinks=library.put(SINKS))
    for found, wanted in zip(both, right, strict=True):
        np.testing.assert_allclose(library.get(found), library.get(wanted), rtol=4 * EPS, atol=1e-7)


def test_what_no_query_may_see_does_not_show(library):
    """Unwritten pages of a cache hold anything."""
    key, value = KEY.copy(), VALUE.copy()
    key[0, 20:], value[0, 20:], key[1, 30:], value[1, 30:] = np.nan, np.inf, 3e38, np.nan
    mask, clean = LengthMask(np.array([20, 30])), dot_product_attention(QUERY, KEY, VALUE, mask=LengthMask([20, 30]))
    arrays = [library.put(x) for x in (QUERY, key, value)]
    found = merge(*pages(arrays, PAGES, put(library, mask)))
    np.testing.assert_allclose(library.get(found.output), clean, atol=1e-6)
    clean = dot_product_attention(QUERY, KEY, VALUE, is_causal=True)[:, :16]
    found = merge(*pages(arrays, PAGES, CausalMask(), rows=(0, 16)))
    np.testing.assert_allclose(library.get(found.output), clean, atol=1e-6)
    found = merge(*pages(arrays, PAGES, CausalMask(9), rows=(0, 16)))
    assert np.isnan(library.get(found.output)[0, 15]).all()  # which sees keys 20 to 24


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_has_the_bits_of_the_whole(library, broadcast):
    """In shards of the queries too."""
    options = {"dropout_rng": aa.random.key(3), "dropout_rate": 0.3, "broadcast_dropout": broadcast}
    expected = dot_product_attention(QUERY, KEY, VALUE, mask=CausalMask(5), implementation="exact", **options)
    arrays = [library.put(x) for x in (QUERY, KEY, VALUE)]
    for rows in ((0, 16), (16, 32)):
        found = merge(*pages(arrays, PAGES, CausalMask(5), rows=rows, whole=WHOLE, **options))
        np.testing.assert_allclose(library.get(found.output), expected[:, slice(*rows)], rtol=2e-5, atol=2e-5)


# --- derivatives ---


def loss(xp, output, lse):
    """Of both, with weights of no symmetry; the sum of squares of lse is the z-loss."""
    weights = xp.asarray(np.random.default_rng(5).standard_normal(tuple(output.shape)))
    return (output * weights).sum() + (lse * lse).sum()


def given(name):
    """Arrays in float64 that are differentiated, and the mask."""
    bias = BIAS.astype("f8")
    if name == "minus infinity":  # all of the first page, which that query may see
        bias[:, 20, :16] = -np.inf
    return [x.astype("f8") for x in (QUERY, KEY, VALUE, SINKS)] + [bias], MASKS.get(name, MASKS["causal"])


@functools.cache
def right_gradients(name):
    arrays, mask = given(name)
    with jax.enable_x64(True):

        def of(q, k, v, sinks, bias):
            return loss(jnp, *formula(jnp, q, k, v, mask, bias, sinks, logits_soft_cap=5.0)[:2])

        return [np.asarray(x) for x in jax.jit(jax.grad(of, tuple(range(5))))(*arrays)]


def merged_loss(xp, mask, q, k, v, sinks, bias):
    found = merge(*pages((q, k, v), PAGES, mask, bias, sinks, logits_soft_cap=5.0))
    return loss(xp, found.output, found.lse) + found.max_logit.sum()  # a constant


@pytest.mark.parametrize("name", ["dense", "minus infinity"])
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_gradients_of_output_and_lse(framework, name):
    (arrays, mask), right = given(name), right_gradients(name)
    if framework == "jax":
        with jax.enable_x64(True):
            found = jax.jit(jax.grad(functools.partial(merged_loss, jnp, mask), tuple(range(5))))(*arrays)
    else:
        leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
        mask = torch.asarray(mask) if name == "dense" else mask
        found = torch.autograd.grad(merged_loss(torch, mask, *leaves), leaves)
    for x, y in zip(found, right, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-10 * np.abs(y).max())


@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")  # PyTorch's own
def test_second_derivatives():
    """By the key, beside others; on JAX along one direction."""
    q, k, v = arrays = [x[:1, :5, :2, :3].astype("f8") for x in (QUERY, KEY, VALUE)]

    def right(k):
        return loss(jnp, *formula(jnp, q, k, v, CausalMask())[:2])

    def jaxs(k):
        found = dot_product_attention_partial(q, k, v, is_causal=True)
        return loss(jnp, found.output, found.lse)

    with jax.enable_x64(True):
        hessian = np.asarray(jax.jit(jax.hessian(right))(k))
        found = jax.jit(lambda k: jax.jvp(jax.grad(jaxs), (k,), (jnp.ones_like(k),))[1])(k)
    np.testing.assert_allclose(found, hessian.sum((-4, -3, -2, -1)), atol=1e-10)
    q, k, v = map(torch.asarray, arrays)

    def torchs(k):
        found = merge(*pages((q, k, v), ((0, 3), (3, 5)), CausalMask(), rows=(0, 5)))
        return loss(torch, found.output, found.lse)

    np.testing.assert_allclose(torch.func.hessian(torchs)(k), hessian, atol=1e-10)
    np.testing.assert_allclose(torch.autograd.functional.hessian(torchs, k), hessian, atol=1e-10)


def test_what_other_kernels_return_is_a_partial():
    """The logarithm beside the output, through which gradients flow; of one row it is minus infinity."""
    leaves = [torch.tensor(x, requires_grad=True) for x in (QUERY, KEY, VALUE)]
    bias = np.where((np.arange(32)[:, None] == 20) & (np.arange(48) < 16), -np.inf, BIAS)
    first, *others = pages(leaves, PAGES, bias=torch.asarray(bias))
    other = Partial(first.output, first.lse, torch.ones_like(first.total))
    found = [merge(x, *others) for x in (first, other)]
    losses = [(x.output**3).sum() + (x.lse**2).sum() for x in found]
    gradients = [torch.autograd.grad(x, leaves, retain_graph=True) for x in losses]
    torch.testing.assert_close(found[1].output, found[0].output)
    torch.testing.assert_close(gradients[1], gradients[0])


# --- programs ---


def test_a_loop_over_pages_compiles_once():
    """Positions and the mask's lengths are known at run time only; its gradient is that of one call."""
    traced = []
    q = jnp.asarray(QUERY)
    paged = [jnp.asarray(x).reshape(2, 3, 16, 2, 8).swapaxes(0, 1) for x in (KEY, VALUE)]

    def attend(q, paged, lengths):
        def step(found, page):
            traced.append(page)
            number, key, value = page
            mask = LengthMask(lengths) & CausalMask(7)
            return merge(found, dot_product_attention_partial(q, key, value, mask=mask, origin=(0, number * 16))), None

        start = dot_product_attention_partial(q, *(x[0, :, :0] for x in paged))
        return jax.lax.scan(step, start, (jnp.arange(3), *paged))[0]

    def of(q, lengths):
        found = attend(q, paged, lengths)
        return loss(jnp, found.output, found.lse), found

    @jax.jit
    def right(q, mask):
        return jax.grad(lambda q: loss(jnp, *formula(jnp, q, KEY, VALUE, mask)[:2]))(q)

    program = jax.jit(jax.grad(of, has_aux=True))
    for lengths in ([48, 0], [9, 33]):
        gradient, found = program(q, jnp.asarray(lengths))
        assert isinstance(found, Partial)
        mask = LengthMask(np.array(lengths)) & CausalMask(7)
        output, lse, _ = formula(np, QUERY, KEY, VALUE, mask)
        np.testing.assert_allclose(found.output, output, atol=2e-6)
        np.testing.assert_allclose(found.lse, lse, atol=4e-6, rtol=EPS)
        np.testing.assert_allclose(gradient, right(q, mask.to_array(*WHOLE)), atol=2e-5, rtol=2e-5)
    assert len(traced) <= 2  # once by the scan, once by its derivative


def test_memory_of_the_gradient_grows_with_the_length():
    x = jax.ShapeDtypeStruct((1, 4096, 1, 8), "f4")

    def of(q, k, v):
        found = dot_product_attention_partial(q, k, v)
        return (found.output**2).sum() + (found.lse**2).sum()

    compiled = jax.jit(jax.grad(of, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4 / 2


def of_pages(q, k, v):
    return merge(*pages((q, k, v), PAGES, CausalMask(5)))


def test_mapped():
    """Over batch and over a stack of queries for one prefix."""
    right = of_pages(QUERY, KEY, VALUE)
    for library, vmap, asarray in ((jax, jax.vmap, jnp.asarray), (torch, torch.vmap, torch.asarray)):
        stack = asarray(np.stack([QUERY, QUERY[::-1], QUERY]))
        found = vmap(of_pages, (0, None, None))(stack, asarray(KEY), asarray(VALUE))
        assert isinstance(found, Partial), library
        for x, y in zip(found, right, strict=True):
            np.testing.assert_allclose(x[0], y, atol=4e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")  # PyTorch's own
def test_programs_of_pytorch():
    """One graph, and the gradients of both results."""
    torch._dynamo.reset()

    def of(q, k, v):
        found = of_pages(q, k, v)
        return loss_of(found.output, found.lse), found.max_logit

    def loss_of(output, lse):
        return (output**3).sum() + (lse**2).sum()

    leaves = [torch.tensor(x, requires_grad=True) for x in (QUERY, KEY, VALUE)]
    compiled, eager = torch.compile(of, fullgraph=True, backend="aot_eager")(*leaves), of(*leaves)
    torch.testing.assert_close(compiled, eager)
    found, right = (torch.autograd.grad(x[0], leaves) for x in (compiled, eager))
    torch.testing.assert_close(found, right)
    tangents = torch.func.jvp(lambda q: of(q, *leaves[1:])[0], (leaves[0].detach(),), (torch.ones_like(leaves[0]),))[1]
    torch.testing.assert_close(tangents, right[0].sum(), rtol=1e-4, atol=1e-4)


def test_another_library():
    arrays = [array_api_strict.asarray(x) for x in (QUERY, np.repeat(KEY, 2, axis=2), np.repeat(VALUE, 2, axis=2))]
    found = of_pages(*arrays)
    assert isinstance(found.output, type(arrays[0]))
    right = of_pages(QUERY, KEY, VALUE)
    for x, y in zip((*found, found.lse), (*right, right.lse), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=2e-6)


# --- what is refused ---

X = np.ones((1, 3, 2, 4), "f4")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"dropout_rate": 0.1, "dropout_rng": aa.random.key(0)},
            ValueError,
            r"whole origin=\(0, 0\) and whole=\(3, 3\)",
        ),
        (
            {"dropout_rate": 0.1, "dropout_rng": aa.random.key(0), "origin": (0, 0)},
            ValueError,
            "dropout bits are those",
        ),
        ({"whole": (3, 3)}, ValueError, r"whole needs origin=\(first_query, first_key\)"),
        ({"origin": 3}, TypeError, r"origin must be a pair of integers, \(first_query, first_key\), got 3"),
        (
            {"origin": (0.0, 1)},
            TypeError,
            "origin must be a pair of integers or of integer arrays without axes, got 0.0",
        ),
        ({"origin": (0, np.arange(2))}, TypeError, "origin must be a pair of integers"),
        ({"origin": (0, torch.tensor(1.0))}, TypeError, "origin must be a pair of integers"),
        ({"origin": (-1, 0)}, ValueError, "origin must not be negative, got -1 for the first of the queries"),
        ({"origin": (0, 2), "whole": (3, 4)}, aa.ShapeError, "whole has 4 keys, but these are 3 from 2 on"),
        (
            {"origin": (0, 0), "whole": 4},
            TypeError,
            r"whole must be a pair of integers, \(q_length, kv_length\), got 4",
        ),
        ({"sinks": np.zeros(3, "f4")}, aa.ShapeError, r"sinks have shape \(3,\)"),
        ({"dtype": "complex64"}, NotImplementedError, "dot_product_attention_partial cannot serve this call: tiles of"),
        ({"implementation": "exact"}, TypeError, "implementation"),
        ({"module": 1}, TypeError, "module"),
    ],
)
def test_what_is_no_partial(options, kind, message):
    with pytest.raises(kind, match=message):
        dot_product_attention_partial(X, X, X, **options)


def test_what_does_not_merge():
    found = dot_product_attention_partial(X, X, X)
    with pytest.raises(ValueError, match="merge needs one partial or more, got none"):
        merge()
    with pytest.raises(TypeError, match=r"got a list: of a list of them, write merge\(\*pages\)"):
        merge([found, found])
    with pytest.raises(aa.ShapeError, match=r"same queries, .* got \(1, 3, 2, 4\), .* and \(1, 2, 2, 4\)"):
        merge(found, dot_product_attention_partial(X[:, :2], X, X))
    with pytest.raises(TypeError, match="arrays of different libraries in one call"):
        merge(dot_product_attention_partial(*[jnp.asarray(X)] * 3), Partial(*map(torch.asarray, found)))
    assert merge(found) is found


# --- what it stands on ---


def shard(library, dropout=False):
    """The call that a partial makes."""
    calls = []
    options = {"dropout_rate": 0.3, "dropout_rng": aa.random.key(3), "broadcast_dropout": False} if dropout else {}
    arrays = [library.put(x) for x in (QUERY, KEY, VALUE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TILED, "partial", lambda call: calls.append(call) or [QUERY] * 3)
        list(pages(arrays, ((0, 48),), CausalMask(5), library.put(BIAS), whole=WHOLE, **options))
    return calls[0]


def test_no_other_implementation_takes_one(library):
    for name in ("exact", "fused"):
        with pytest.raises(NotImplementedError, match=r"it gives no row statistics|no engine"):
            plan.choose(shard(library), name)


def test_partials_merge_where_one_took_no_maximum(library):
    """Logits that are small need none; those of another tile may not be."""
    x = library.put(QUERY[:1, :1, :1])
    tiles, xp = registry.backend_of(x).tiles, registry.backend_of(x).xp
    logits, values = RANDOM.standard_normal((1, 6)).astype("f4") * 3, RANDOM.standard_normal((6, 2)).astype("f4")

    def part(start, stop, base):
        weights = np.exp(logits[:, start:stop] - (0 if base is None else base))
        shift = None if base is None else library.put(np.full((1, 1), base, "f4"))
        total, output = weights.sum(axis=1, keepdims=True), weights @ values[start:stop]
        return partials.Partial(shift, library.put(total), library.put(output))

    expected = np.exp(logits) @ values / np.exp(logits).sum()
    for bases in ((None, None), (None, 7.0), (7.0, None), (-3.0, 5.0)):
        merged = partials.merge(tiles, part(0, 4, bases[0]), part(4, 6, bases[1]))
        np.testing.assert_allclose(library.get(partials.finish(merged, 1.0)), expected, rtol=1e-5)
    empty = partials.nothing(xp, library.put(np.zeros((1, 3), "f4")), 2)
    for base in (None, 7.0):
        merged = partials.merge(tiles, empty, part(0, 6, base))
        np.testing.assert_allclose(library.get(partials.finish(merged, 1.0)), expected, rtol=1e-5)
    twice = partials.merge(tiles, empty, partials.nothing(xp, library.put(np.zeros((1, 3), "f4")), 2))
    assert (library.get(twice.total) == 0).all()


def test_a_loop_may_start_from_nothing(library):
    """As a compiled kernel's has to; also where the dropout counts are the bits themselves, drawn before."""
    call = shard(library, dropout=True)
    how, block = prepare(call)
    bits = threefry.keep_at(call.backend.xp, how.keep_prob, block.pairs.counts)
    scaled = block._replace(rows=(block.rows[0] / how.root,))
    drawn = scaled._replace(pairs=scaled.pairs._replace(counts=bits))
    how = how._replace(skip=False)
    state = partials.nothing(call.backend.xp, block.rows[0], 8)
    for start, stop in ((0, 16), (16, 32), (32, 48)):
        state, _ = passes.absorb(how, state, cut_columns(drawn, start, stop))
    expected = TILED.partial(call)
    output = library.get(partials.finish(state, how.keep_prob)).reshape(2, 4, 32, 8).swapaxes(1, 2)
    np.testing.assert_allclose(output, library.get(expected[0]), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(library.get(state.total).reshape(2, 4, 32), library.get(expected[2]), rtol=2e-5)
