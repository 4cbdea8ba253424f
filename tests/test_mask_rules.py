"""Masks by a function of positions, against Flax with the dense mask that each denotes."""

import functools
import io

import array_api_strict
import jax
import jax.numpy as jnp
import ndonnx
import numpy as np
import onnxruntime
import pytest
import torch
from flax import linen
from torch.fx.experimental.proxy_tensor import make_fx

import anyattention as aa
from anyattention._src.registry import backend_of
from anyattention.masks import CausalMask, Rule

Q_LENGTH, KV_LENGTH = 16, 26
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE = (RANDOM.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (Q_LENGTH, KV_LENGTH, KV_LENGTH))
ROW, COLUMN = np.arange(Q_LENGTH)[:, None], np.arange(KV_LENGTH)
QUERY_TIMES, KEY_TIMES = (RANDOM.random((2, n), dtype=np.float32) for n in (Q_LENGTH, KV_LENGTH))
IDS = RANDOM.integers(0, 3, KV_LENGTH).astype(np.uint8)
OPEN = RANDOM.random((2, KV_LENGTH)) < 0.6
NEAR = np.abs(QUERY_TIMES[:, None, :, None] - KEY_TIMES[:, None, None]) < 0.4
EVEN = (ROW + COLUMN) % 2 == 0


def near(i, j, ti, tj):
    return abs(ti - tj) < 0.4


def even(i, j):
    return (i + j + 1) % 2  # an integer


RULES = {  # the mask, given how to make arrays; what it denotes
    "positions": (lambda put: Rule(even), EVEN),
    "query and key arrays": (lambda put: Rule(near, (put(QUERY_TIMES),), (put(KEY_TIMES),)), NEAR),
    "guests": (lambda put: Rule(near, [QUERY_TIMES[1].tolist()], [KEY_TIMES[1]]), NEAR[1, 0]),
    "one of each batch": (
        lambda put: Rule(lambda i, j, ids, is_open: is_open & (ids != 1), (), (put(IDS), put(OPEN))),
        (OPEN & (IDS != 1))[:, None, None],
    ),
    "queries alone": (lambda put: Rule(lambda i, j: i % 3), (ROW % 3 != 0) & (COLUMN >= 0)),
    "a number": (lambda put: Rule(lambda i, j: False) | Rule(even), EVEN),
    "joined": (
        lambda put: (Rule(near, (put(QUERY_TIMES),), (put(KEY_TIMES),)) | ~Rule(even)) & CausalMask(9),
        (NEAR | ~EVEN) & (COLUMN <= ROW + 9),
    ),
    "beside arrays": (lambda put: put(EVEN.astype(np.float32)) & Rule(lambda i, j: i != j), EVEN & (ROW != COLUMN)),
}


@pytest.mark.parametrize("name", RULES)
def test_equals_flax_with_the_dense_mask(library, name, monkeypatch):
    """On JAX, which compiles for seconds, tiled has two of them, one in several tiles."""
    make, dense = RULES[name]
    implementations = (
        ["exact", "tiled"] if library.name != "jax" or name in ("joined", "one of each batch") else ["exact"]
    )
    if library.name != "jax" or name == "joined":
        tiles = type(backend_of(library.put(QUERY)).tiles)
        monkeypatch.setattr(tiles, "sizes", lambda self, block, ruled: (8, 8))
    mask, placed = make(library.put), [library.put(x) for x in (QUERY, KEY, VALUE)]
    expected = linen.dot_product_attention(QUERY, KEY, VALUE, mask=dense)
    for implementation in implementations:
        actual = aa.dot_product_attention(*placed, mask=mask, implementation=implementation)
        np.testing.assert_allclose(library.get(actual), expected, rtol=0, atol=2e-6)
    whole = mask.to_array(Q_LENGTH, KV_LENGTH)
    np.testing.assert_array_equal(*np.broadcast_arrays(np.asarray(whole), dense))


def test_values():
    times = QUERY_TIMES
    assert Rule(even) == Rule(even) != Rule(near)
    assert Rule(even, (times,)) == Rule(even, [times]) != Rule(even, (times.copy(),))
    assert hash(Rule(even) & CausalMask()) == hash(Rule(even) & CausalMask())
    assert repr(Rule(near, (times,), (IDS,)) & Rule(even)) == "Rule(near, (array(2, 16),), (array(26,),)) & Rule(even)"


WRONG = {
    "no function": (lambda: Rule(EVEN), TypeError, r"function of Rule must be a function\(i, j, \*arrays\)"),
    "an array": (lambda: Rule(near, QUERY_TIMES), TypeError, r"query_arrays of Rule must be a tuple.* \(2, 16\)"),
    "numbers": (lambda: Rule(near, (), (1, 2)), TypeError, r"key_arrays of Rule must be a tuple of arrays, got \(1, 2"),
    "a query's length": (
        lambda: Rule(near, (KEY_TIMES,), (KEY_TIMES,)),
        aa.ShapeError,
        r"query_arrays\[0\] of Rule\(near.*q_length is 16",
    ),
    "a key's length": (
        lambda: Rule(near, (QUERY_TIMES,), (IDS[:4],)),
        aa.ShapeError,
        r"key_arrays\[0\] of Rule\(near.*\(4,\), but kv_length is 26",
    ),
    "a batch": (
        lambda: Rule(near, (QUERY_TIMES,), (KEY_TIMES[[0, 0, 0]],)),
        aa.ShapeError,
        r"key_arrays\[0\].*batch axes \(2,\)",
    ),
    "heads": (
        lambda: Rule(lambda i, j: j >= HEADS),
        aa.ShapeError,
        r"function <lambda> of a rule returned shape \(.*3, .*query_arrays or key_arrays",
    ),
    "more columns": (lambda: Rule(whole), aa.ShapeError, r"function whole of a rule returned shape \(16, 27\)"),
    "nothing": (
        lambda: Rule(lambda i, j: None),
        TypeError,
        "function <lambda> of a rule must return an array, got None",
    ),
}
HEADS = np.zeros((3, 1, 1), np.int32)


def whole(i, j):
    return np.ones((Q_LENGTH, KV_LENGTH + 1), bool)


@pytest.mark.parametrize(("make", "error", "sentence"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_wrong(make, error, sentence, implementation):
    with pytest.raises(error, match=sentence):
        aa.dot_product_attention(QUERY, KEY, VALUE, mask=make(), implementation=implementation)


# --- JAX ---


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_traced_arrays_and_their_gradients(implementation):
    """Those of times are zero: they only decide."""
    traces = []

    def loss(query, key, value, ti, tj):
        traces.append(ti)
        mask = Rule(near, (ti,), (tj,)) & CausalMask(9)
        return (aa.dot_product_attention(query, key, value, mask=mask, implementation=implementation) ** 2).sum()

    def flax(*arrays):
        return (linen.dot_product_attention(*arrays, mask=NEAR & (COLUMN <= ROW + 9)) ** 2).sum()

    arrays = list(map(jnp.asarray, (QUERY, KEY, VALUE)))
    gradient = jax.jit(jax.grad(loss, argnums=range(5)))
    *found, dti, dtj = gradient(*arrays, QUERY_TIMES, KEY_TIMES)
    for a, b in zip(found, jax.grad(flax, argnums=range(3))(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert (dti == 0).all()
    assert (dtj == 0).all()
    gradient(*arrays, QUERY_TIMES + 1, KEY_TIMES)
    assert len(traces) == 1


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_mapped_arrays(implementation):
    expected = linen.dot_product_attention(*(np.stack([x[0], x[0]]) for x in (QUERY, KEY, VALUE)), mask=NEAR)
    for xp, vmap in ((jnp, jax.vmap), (torch, torch.func.vmap)):
        query, key, value = (xp.asarray(x[0]) for x in (QUERY, KEY, VALUE))

        def ours(ti, tj, arrays=(query, key, value)):
            return aa.dot_product_attention(*arrays, mask=Rule(near, (ti,), (tj,)), implementation=implementation)

        found = vmap(ours)(xp.asarray(QUERY_TIMES), xp.asarray(KEY_TIMES))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_integers_that_jax_has_not():
    mask = Rule(lambda i, j, ids: ids > 0, (), (np.full(KV_LENGTH, 2**40),))
    with pytest.raises(TypeError, match=r"key_arrays\[0\] of Rule.* beyond 32 bits"):
        aa.dot_product_attention(jnp.asarray(QUERY), KEY, VALUE, mask=mask)
    aa.dot_product_attention(QUERY, KEY, VALUE, mask=mask)


@pytest.mark.parametrize("how", ["a closure", "partial"])
def test_a_function_that_holds_a_traced_array(how):
    """Exact has it, tiled would not compile; None takes exact."""

    @functools.partial(jax.jit, static_argnames="implementation")
    def call(times, implementation=None):
        def late(i, j, times=None):
            return (held if times is None else times)[..., j] > 0.3

        held = times if how == "a closure" else None
        function = late if how == "a closure" else functools.partial(late, times=times)
        arrays = map(jnp.asarray, (QUERY, KEY, VALUE))
        return aa.dot_product_attention(*arrays, mask=Rule(function), implementation=implementation)

    expected = linen.dot_product_attention(QUERY, KEY, VALUE, mask=KEY_TIMES[0] > 0.3)
    np.testing.assert_allclose(call(KEY_TIMES[0]), expected, rtol=0, atol=2e-6)
    with pytest.raises(NotImplementedError, match="holds an array that JAX traces: pass it as query_arrays"):
        call(KEY_TIMES[0], implementation="tiled")


# --- programs of PyTorch, other libraries, threads ---


class Attend(torch.nn.Module):
    def __init__(self, implementation):
        super().__init__()
        self.implementation = implementation

    def forward(self, query, key, value, ti, tj):
        mask = Rule(near, (ti,), (tj,)) & CausalMask(9)
        return aa.dot_product_attention(query, key, value, mask=mask, implementation=self.implementation)


PROGRAMS = {
    "compile": lambda attend, arrays: torch.compile(attend, backend="eager"),
    "export": lambda attend, arrays: torch.export.export(attend, arrays).module(),
    "make_fx": lambda attend, arrays: make_fx(attend)(*arrays),
}


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_of_pytorch_have_it_in_exact_alone(make):
    arrays = tuple(torch.asarray(x) for x in (QUERY, KEY, VALUE, QUERY_TIMES, KEY_TIMES))
    expected = linen.dot_product_attention(QUERY, KEY, VALUE, mask=NEAR & (ROW + 9 >= COLUMN))
    for implementation in ("exact", None):
        torch._dynamo.reset()
        found = make(Attend(implementation), arrays)(*arrays)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    with pytest.raises(NotImplementedError, match=r"takes tensors but no function of masks.Rule: .* to_array, or impl"):
        make(Attend("tiled"), arrays)(*arrays)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*legacy TorchScript:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*feature will be removed:DeprecationWarning")
def test_onnx():
    arrays = tuple(torch.asarray(x) for x in (QUERY, KEY, VALUE, QUERY_TIMES, KEY_TIMES))
    file = io.BytesIO()
    torch.onnx.export(Attend(None), arrays, file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [x.name for x in session.get_inputs()]
    (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, arrays, strict=True)})
    expected = linen.dot_product_attention(QUERY, KEY, VALUE, mask=NEAR & (ROW + 9 >= COLUMN))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("xp", [array_api_strict, ndonnx], ids=["array_api_strict", "ndonnx"])
def test_other_libraries(xp):
    expected = linen.dot_product_attention(QUERY, KEY, VALUE, mask=NEAR & (ROW + 9 >= COLUMN))
    query, key, value, ti, tj = map(xp.asarray, (QUERY, KEY, VALUE, QUERY_TIMES, KEY_TIMES))
    for implementation in ("exact", "tiled") if xp is array_api_strict else ("exact",):
        mask = Rule(near, (ti,), (tj,)) & CausalMask(xp.asarray(np.array([9, 9])))
        found = aa.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
        found = found.unwrap_numpy() if xp is ndonnx else np.asarray(found)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_threads_of_numpy_call_it(monkeypatch):
    """An error in one of them is the caller's."""
    monkeypatch.setattr(type(backend_of(QUERY).tiles), "sizes", lambda self, block, ruled: (8, 8))
    x = RANDOM.standard_normal((2, 256, 2, 8), dtype=np.float32)
    mask = Rule(lambda i, j: i % 7 != j % 5)
    found = aa.dot_product_attention(x, x, x, mask=mask, implementation="tiled")
    dense = np.arange(256)[:, None] % 7 != np.arange(256) % 5
    np.testing.assert_allclose(found, linen.dot_product_attention(x, x, x, mask=dense), rtol=0, atol=2e-6)
    with pytest.raises(ZeroDivisionError):
        aa.dot_product_attention(x, x, x, mask=Rule(lambda i, j: 1 // 0), implementation="tiled")
