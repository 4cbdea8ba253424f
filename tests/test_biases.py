"""Biases by rule, against dense ones of the formula in float64, written here."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention.biases import Alibi, Bias, Relative, Rule
from anyattention.masks import CausalMask

LIBRARIES = {"numpy": np.asarray, "jax": jnp.asarray, "torch": torch.asarray}
Q_LENGTH, KV_LENGTH = 70, 150
OFFSETS = np.array([3, 90])


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


ARRAYS = {
    "slopes": np.float32([0.5, 0.25, 0.01, -0.1]),
    "table": draw(4, (8, 4)),
    "dense": draw(5, (2, 1, Q_LENGTH, KV_LENGTH)),
    "column": draw(6, (4, 1, KV_LENGTH)),
    "times": draw(7, (2, Q_LENGTH)),
    "ages": draw(8, (2, KV_LENGTH)),
}
OF_HEADS = draw(9, (4, 1, 1))


def distances(offset=0):
    """[batch or 1, 1, q_length, kv_length]: how far each key is ahead of each query."""
    rows = np.arange(Q_LENGTH)[:, None] + np.reshape(offset, (-1, 1, 1, 1))
    return np.arange(KV_LENGTH) - rows


def buckets(offset, bidirectional, max_distance, count=8):
    """T5's, by logarithms of float64 that are kept away from the ends of buckets."""
    ahead, count = distances(offset), count // 2 if bidirectional else count
    size, half = abs(ahead) if bidirectional else np.maximum(-ahead, 0), count // 2
    ratio = np.log(np.maximum(size, 1) / half) / np.log(max_distance / half)
    far = half + np.floor(ratio * (count - half) + 1e-9).astype(int)
    found = np.where(size < half, size, np.minimum(far, count - 1))
    return found + count * (ahead > 0) if bidirectional else found


def in_table(table, which):
    return jnp.moveaxis(table[which[:, 0]], -1, 1)


# The bias from arrays of a library, the arrays that it is made of, and the dense one.
CASES = {
    "alibi": (Alibi, ["slopes"], lambda slopes: slopes[:, None, None] * distances()),
    "alibi of entries": (
        lambda slopes: Alibi(slopes, offset=OFFSETS),
        ["slopes"],
        lambda slopes: slopes[:, None, None] * distances(OFFSETS),
    ),
    "backward, of entries": (
        lambda table: Relative(table, bidirectional=False, max_distance=64, offset=OFFSETS),
        ["table"],
        lambda table: in_table(table, buckets(OFFSETS, False, 64)),
    ),
    "sum": (
        lambda slopes, dense, table, column: (
            dense + Alibi(slopes, symmetric=True, offset=5) + Relative(table, max_distance=32) + column
        ),
        ["slopes", "dense", "table", "column"],
        lambda slopes, dense, table, column: (
            dense - slopes[:, None, None] * abs(distances(5)) + in_table(table, buckets(0, True, 32)) + column
        ),
    ),
    "function of arrays": (
        lambda times, ages: Rule(lambda i, j, t, a: t * a - 0.01 * abs(i - j), (times,), (ages,)),
        ["times", "ages"],
        lambda times, ages: times[:, None, :, None] * ages[:, None, None, :] - 0.01 * abs(distances()),
    ),
    "function of heads": (
        lambda ages: Rule(lambda i, j, a: 0.01 * like(OF_HEADS, a) * (j - i) + a, (), (ages,)),
        ["ages"],
        lambda ages: 0.01 * OF_HEADS * distances() + ages[:, None, None, :],
    ),
}


def like(x, other):
    """An array of NumPy's beside the other, which may be PyTorch's."""
    return other.new_tensor(x) if hasattr(other, "new_tensor") else x


@functools.cache
def qkv(grouped=True):
    heads = 2 if grouped else 4
    return draw(0, (2, Q_LENGTH, 4, 16)), draw(1, (2, KV_LENGTH, heads, 16)), draw(2, (2, KV_LENGTH, heads, 24))


@functools.cache
def truth(name, causal):
    """The output, and the gradients of its sum of squares by query, key, value and the arrays of the bias."""
    _, names, dense = CASES[name]

    def formula(q, k, v, *arrays):
        k, v = (jnp.repeat(x, 2, axis=-2) for x in (k, v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4.0 + dense(*arrays)
        if causal:
            logits = jnp.where(distances() <= 80, logits, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)

    with jax.enable_x64(True):
        given = [jnp.asarray(x, "float64") for x in (*qkv(), *(ARRAYS[name] for name in names))]
        gradients = jax.grad(lambda *x: (formula(*x) ** 2).sum(), tuple(range(len(given))))(*given)
        return [np.asarray(x) for x in (formula(*given), *gradients)]


def call(q, k, v, bias, causal, **options):
    return aa.dot_product_attention(q, k, v, bias=bias, mask=CausalMask(80) if causal else None, **options)


def check(found, expected):
    """Outputs as close as float32 logits, of 100 and more, allow; gradients relative to their largest."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(abs(theirs).max(), 1.0))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("implementation", "causal"), [("exact", False), ("tiled", True)])
@pytest.mark.parametrize("library", LIBRARIES)
def test_output_and_gradients(library, implementation, causal, name):
    put, (make, names, _) = LIBRARIES[library], CASES[name]
    given = [*map(put, qkv()), *(put(ARRAYS[name]) for name in names)]

    def attend(q, k, v, *arrays):
        return call(q, k, v, make(*arrays), causal, implementation=implementation)

    if library == "numpy":
        found = [attend(*given)]
        if implementation == "tiled":
            bias, mask = make(*given[3:]), CausalMask(80)
            *gradients, of_bias = aa.dot_product_attention_vjp(*given[:3], bias=bias, mask=mask)[1](2 * found[0])
            of = dict(zip(map(id, bias.arrays()), of_bias, strict=True))
            found += [*gradients, *(of[id(x)] for x in given[3:])]
    elif library == "jax":
        found = jax.jit(lambda *x: (attend(*x), *jax.grad(lambda *x: (attend(*x) ** 2).sum(), range(len(x)))(*x)))(
            *given
        )
    else:
        leaves = [x.clone().requires_grad_() for x in given]
        output = attend(*leaves)
        found = [output.detach(), *torch.autograd.grad((output**2).sum(), leaves)]
    expected = truth(name, causal)
    if library == "numpy" and "function" in name:  # NumPy does not differentiate functions
        assert all(x is None for x in found[4:])
        found = found[:4]
    check([np.asarray(x) for x in found], expected[: len(found)])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_to_array(library, name):
    """float32 or wider, in the library of the arrays."""
    put, (make, names, dense) = LIBRARIES[library], CASES[name]
    bias = make(*(put(ARRAYS[name]) for name in names))
    found = bias.to_array(Q_LENGTH, KV_LENGTH)
    assert isinstance(found, type(put(OF_HEADS)))
    expected = np.asarray(dense(*(ARRAYS[name] for name in names)))
    np.testing.assert_allclose(*np.broadcast_arrays(np.asarray(found), expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_alibi_of_distant_keys(library):
    """At 65536 keys each number is the product of a slope and a distance, rounded once."""
    slopes = np.float32([0.5, 1 / 3])
    found = np.asarray(Alibi(LIBRARIES[library](slopes), offset=65535).to_array(1, 65536))
    exact = slopes.astype(float)[:, None, None] * (np.arange(65536.0) - 65535)
    np.testing.assert_array_equal(found, exact.astype(np.float32))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_16_bits(library, implementation):
    """Distances are exact beyond the 256 that bfloat16 counts to; slopes in 16 bits keep the call in 16 bits."""
    put = {"numpy": lambda x: x.astype("bfloat16"), "jax": lambda x: jnp.asarray(x, "bfloat16"), "torch": bfloat16}[
        library
    ]
    q, k, v = (draw(i, (1, n, 2, 8)) / 4 for i, n in enumerate((3, 600, 600)))
    slopes = np.float32([0.5, 0.25])
    found = aa.dot_product_attention(
        *map(put, (q, k, v)), bias=Alibi(put(slopes), offset=597), implementation=implementation
    )
    assert "bfloat16" in str(found.dtype)
    bias = slopes[:, None, None] * (np.arange(600) - 597 - np.arange(3)[:, None])
    q, k, v = (np.asarray(put(x).float() if library == "torch" else put(x).astype("float32"), float) for x in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5 + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    found = np.asarray(found.float() if library == "torch" else found.astype("float32"))
    np.testing.assert_allclose(found, expected, atol=0.03)


def bfloat16(x):
    return torch.asarray(x).bfloat16()


@pytest.mark.parametrize("library", LIBRARIES)
def test_decoding(library):
    """A query that follows a cache, with its offset, has the row of the whole."""
    put = LIBRARIES[library]
    q, k, v = map(put, qkv())
    bias = lambda offset=0: Alibi(put(ARRAYS["slopes"]), offset=offset) + Relative(put(ARRAYS["table"]), offset=offset)  # noqa: E731
    whole = aa.dot_product_attention(q, k[:, :Q_LENGTH], v[:, :Q_LENGTH], bias=bias(), is_causal=True)
    last = aa.dot_product_attention(q[:, 50:51], k[:, :Q_LENGTH], v[:, :Q_LENGTH], bias=bias(50), mask=CausalMask(50))
    np.testing.assert_allclose(np.asarray(last), np.asarray(whole)[:, 50:51], atol=1e-5)


def test_memory():
    """At 16384 keys no array of one head's logits, which would be 1 GiB, is made; nor of what a tile has, for long."""
    q, k, v = (draw(i, (16384, 2, 8)) for i in range(3))
    bias = Alibi(ARRAYS["slopes"][:2]) + Relative(ARRAYS["table"][:, :2])
    tracemalloc.start()
    aa.dot_product_attention(q, k, v, bias=bias, is_causal=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20


def test_a_bias_is_a_tree_of_jax():
    """Slopes are traced, so that one program serves all; offsets that are arrays too."""
    q, k, v = map(jnp.asarray, qkv())
    traces = []

    @jax.jit
    def attend(bias):
        traces.append(bias)
        return aa.dot_product_attention(q, k, v, bias=bias)

    for n in range(3):
        found = attend(Alibi(jnp.asarray(ARRAYS["slopes"]) * n, offset=jnp.asarray(n)))
    expected = aa.dot_product_attention(q, k, v, bias=Alibi(ARRAYS["slopes"] * 2, offset=2))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(traces) == 1


def test_vmap():
    q, k, v = map(jnp.asarray, qkv())
    slopes = jnp.stack([jnp.asarray(ARRAYS["slopes"]) * n for n in range(3)])
    found = jax.vmap(lambda s: aa.dot_product_attention(q, k, v, bias=Alibi(s), implementation="tiled"))(slopes)
    for n in range(3):
        expected = aa.dot_product_attention(q, k, v, bias=Alibi(slopes[n]), implementation="tiled")
        np.testing.assert_allclose(found[n], expected, atol=1e-6)


def test_torch_compile():
    """Alibi and Relative stand in PyTorch's one operator, with their gradients; a function is refused by name."""
    q, k, v, slopes, table = (torch.asarray(x).requires_grad_() for x in (*qkv(), ARRAYS["slopes"], ARRAYS["table"]))

    def loss(q, k, v, slopes, table):
        bias = Alibi(slopes, offset=3) + Relative(table, max_distance=32)
        return aa.dot_product_attention(q, k, v, bias=bias, is_causal=True, implementation="tiled").square().sum()

    expected = torch.autograd.grad(loss(q, k, v, slopes, table), (q, k, v, slopes, table))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(compiled(q, k, v, slopes, table), (q, k, v, slopes, table)), expected, strict=True
    ):
        torch.testing.assert_close(x, y, atol=1e-4 * float(y.abs().max()), rtol=0)


def test_a_function_is_no_part_of_a_compiled_operator():
    q, k, v = map(torch.asarray, qkv())
    bias = Alibi(torch.asarray(SLOPES)) + Rule(lambda i, j: 0.1 * j)

    def attend(q, k, v, implementation):
        return aa.dot_product_attention(q, k, v, bias=bias, implementation=implementation)

    with pytest.raises(Exception, match=r"no function of biases\.Rule: join other biases, .*to_array"):
        torch.compile(attend, fullgraph=True, backend="eager")(q, k, v, "tiled")
    compiled = torch.compile(attend, fullgraph=True, backend="eager")(q, k, v, None)
    torch.testing.assert_close(compiled, attend(q, k, v, "exact"))


def test_second_derivatives_on_pytorch():
    """Through the backward pass as it is written, as PyTorch's own of all logits has them."""
    q, k, v = (torch.asarray(x, dtype=torch.float64) for x in qkv())

    def second(implementation):
        leaves = [torch.asarray(ARRAYS[x], dtype=torch.float64).requires_grad_() for x in ("slopes", "table")]
        bias = Alibi(leaves[0]) + Relative(leaves[1], max_distance=32)
        output = call(q, k, v, bias, True, implementation=implementation)
        first = torch.autograd.grad((output**2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((x**2).sum() for x in first), leaves)

    for tiled, exact in zip(second("tiled"), second("exact"), strict=True):
        torch.testing.assert_close(tiled, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))


def test_integers_that_jax_has_not():
    """An offset beyond 32 bits is as far as these reach, in every library; of other integers JAX would lose digits."""
    far, ages = np.array([2**40]), np.full(KV_LENGTH, 2**40)
    bias = Relative(TABLE, offset=far) + Relative(TABLE, offset=-far)
    np.testing.assert_allclose(call(*map(jnp.asarray, qkv()), bias, False), call(*qkv(), bias, False), atol=2e-6)
    for bias in (Rule(lambda i, j, a: a * 1.0, (), (ages,)), Alibi(SLOPES) + Alibi(np.full(4, 2**40))):
        with pytest.raises(TypeError, match=r"of (Rule|Alibi).* beyond 32 bits"):
            call(*map(jnp.asarray, qkv()), bias, False)


def test_a_function_that_holds_a_traced_array():
    """Exact has it, tiled would not compile; None takes exact."""
    q, k, v = map(jnp.asarray, qkv())

    @functools.partial(jax.jit, static_argnames="implementation")
    def attend(slope, implementation=None):
        return call(q, k, v, Rule(lambda i, j: slope * (j - i)), False, implementation=implementation)

    np.testing.assert_allclose(attend(0.1), call(*qkv(), Alibi(np.full(4, 0.1, "f4")), False), atol=2e-6)
    with pytest.raises(NotImplementedError, match=r"a function of biases\.Rule holds an array that JAX traces"):
        attend(0.1, implementation="tiled")


def test_integers_have_no_gradient():
    """Alone or beside others; a gradient of their dtype would be rounded to nothing."""
    dense = np.arange(KV_LENGTH)
    for bias, expected in ((dense, None), (Alibi(SLOPES) + dense, [(4,), None])):
        output, pullback = aa.dot_product_attention_vjp(*qkv(), bias=bias)
        found = pullback(output)[3]
        assert (found if expected is None else [None if x is None else x.shape for x in found]) == expected


@pytest.mark.parametrize("library", LIBRARIES)
def test_kernels_refuse(library):
    q, k, v = map(LIBRARIES[library], qkv())
    bias = Alibi(LIBRARIES[library](ARRAYS["slopes"]))
    plan = aa.explain(q, k, v, bias=bias)
    assert plan.implementation == "exact" or plan.implementation == "tiled"
    with pytest.raises(NotImplementedError, match=r"it has no bias by rule|there is no engine"):
        aa.dot_product_attention(q, k, v, bias=bias, implementation="fused")


SLOPES, TABLE = ARRAYS["slopes"], ARRAYS["table"]


@pytest.mark.parametrize(
    ("bias", "error", "sentence"),
    [
        (lambda: Alibi(SLOPES[:3]), ValueError, r"slopes of Alibi\(array\(3,\)\) has shape \(3,\), .* num_heads 4"),
        (lambda: Alibi(SLOPES[None]), ValueError, r"slopes .* has shape \(1, 4\), but needs \[num_heads\]"),
        (lambda: Alibi(SLOPES > 0), TypeError, "slopes of .* must be real numbers, got bool"),
        (lambda: Alibi(None), TypeError, "slopes of Alibi must be an array of numbers, got None"),
        (lambda: Alibi(SLOPES, offset=0.5), TypeError, "offset of Alibi must be an integer or an array of integers"),
        (lambda: Alibi(SLOPES, offset=np.zeros(3, int)), ValueError, r"offset of .* \(3,\).* batch axes \(2,\)"),
        (
            lambda: Relative(TABLE.T),
            ValueError,
            r"table of .* has shape \(4, 8\), but needs \[num_buckets, num_heads\]",
        ),
        (lambda: Relative(TABLE[:7]), ValueError, r"table of .* \(7, 4\), but needs an even number of at least 4"),
        (lambda: Relative(TABLE, max_distance=2), ValueError, "max_distance of .* must be more than 2"),
        (
            lambda: Relative(TABLE, max_distance=9.5),
            TypeError,
            "max_distance of Relative must be an integer, got float",
        ),
        (lambda: Alibi(SLOPES) + 1.0, TypeError, "a bias by rule joins other biases and arrays, got a float"),
        (lambda: Alibi(SLOPES) + CausalMask(), TypeError, "mask by rule CausalMask.*: pass it as mask="),
        (lambda: Alibi(SLOPES) + Alibi, TypeError, "got the class Alibi"),
        (lambda: Alibi(SLOPES) + np.zeros((3, 1, 1)), ValueError, r"Incompatible shapes .* bias \(3, 1, 1\)"),
        (lambda: Rule(lambda i, j: "no"), TypeError, "must return an array, got 'no'"),
        (lambda: Rule(lambda i, j: i < j), TypeError, "must return real numbers, got bool"),
        (lambda: Rule(lambda i, j: np.zeros((3, 1, 1))), ValueError, r"returned shape \(3, 1, 1\)"),
        (lambda: Rule(lambda i, j: np.zeros((70, 150))), ValueError, r"returned shape \(70, 150\)"),
        (lambda: Rule(lambda i, j, a: a, (np.zeros(5),)), ValueError, r"query_arrays\[0\] of .* but q_length is 70"),
        (lambda: Rule(3), TypeError, "function of Rule must be a function"),
        (lambda: CausalMask(), TypeError, "mask by rule CausalMask.*: pass it as mask"),
    ],
)
def test_what_is_no_bias(bias, error, sentence):
    with pytest.raises(error, match=sentence):
        aa.dot_product_attention(*qkv(), bias=bias())


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0), (0, 1)])
@pytest.mark.parametrize("library", LIBRARIES)
def test_no_queries_or_no_keys(library, lengths):
    """Which once raised in exact: there are no diagonals, and no positions to ask a function for its heads."""
    put, sizes = LIBRARIES[library], (2, lengths[0], 4, 16)
    q, k = (put(np.zeros((2, length, 4, 16), np.float32)) for length in lengths)
    for offset in (2, OFFSETS):
        bias = Alibi(put(SLOPES), offset=offset) + Relative(put(TABLE), offset=offset)
        bias = bias + Rule(lambda i, j: like(OF_HEADS, i) * (j - i))
        for implementation in ("exact", "tiled", None):
            output = aa.dot_product_attention(q, k, k, bias=bias, implementation=implementation)
            assert tuple(output.shape) == sizes
            assert not np.asarray(output).any()
        assert tuple(aa.dot_product_attention_weights(q, k, bias=bias).shape) == (2, 4, *lengths)
        assert tuple(bias.parts[0].to_array(*lengths).shape)[-2:] == lengths


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_a_function_of_one_head(implementation):
    """What it returns has an axis for the heads, of size one, as it says for more of them."""
    q, k, v = (x[:, :, :1] for x in qkv())
    bias = 0.01 * distances()[0]
    found = aa.dot_product_attention(
        q, k, v, bias=Rule(lambda i, j: 0.01 * np.ones((1, 1, 1)) * (j - i)), implementation=implementation
    )
    np.testing.assert_allclose(found, aa.dot_product_attention(q, k, v, bias=np.float32(bias)), rtol=0, atol=2e-6)


def test_a_function_that_returns_a_number():
    """A Python float has no dtype where all else are positions."""
    for library, put in LIBRARIES.items():
        given = list(map(put, qkv()))
        for implementation in ("exact", "tiled"):
            found, expected = (
                np.asarray(aa.dot_product_attention(*given, bias=bias, implementation=implementation))
                for bias in (Rule(lambda i, j: 0.5), None)
            )
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=library)


def test_distances_without_bound():
    """Where buckets end is found in no more steps than `max_distance` has bits; once it was one a distance."""
    table, half = draw(4, (8, 1)), 4
    found = Relative(table, bidirectional=False, max_distance=2**60, offset=2**20).to_array(1, 2**20)[0, 0]
    distance = np.arange(2**20, 0, -1)
    far = half + np.floor(np.log(distance / half) / np.log(2**60 / half) * (8 - half) + 1e-9).astype(int)
    np.testing.assert_array_equal(found, table[np.where(distance < half, distance, np.minimum(far, 7)), 0])


def test_a_bias_is_no_mask():
    with pytest.raises(TypeError, match=r"bias by rule Alibi.*: pass it as bias"):
        aa.dot_product_attention(*qkv(), mask=Alibi(SLOPES))


def test_equal_and_shown():
    """By the value of numbers, and the identity of arrays."""
    assert Alibi(SLOPES) == Alibi(SLOPES) != Alibi(SLOPES, symmetric=True)
    assert hash(Alibi(SLOPES) + TABLE) == hash(Alibi(SLOPES) + TABLE)
    assert repr(Alibi(SLOPES) + Relative(TABLE, False)) == "Alibi(array(4,)) + Relative(array(8, 4), False)"
    assert sum([Alibi(SLOPES), Relative(TABLE)]) == Alibi(SLOPES) + Relative(TABLE)
    assert (Alibi(SLOPES) + None) == Alibi(SLOPES)
    assert isinstance(SLOPES[:, None, None] + Alibi(SLOPES), Bias)
    for use in (np.asarray, bool, len, lambda bias: bias.ndim):
        with pytest.raises(TypeError, match="to_array"):
            use(Alibi(SLOPES))
