"""What the kernels on JAX share, by kernels written out here that leave rows without a key to chance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import anyattention as aa
from anyattention._src.rules import as_mask
from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask
from anyattention_backends.jax import backend
from anyattention_backends.jax.fused import JAXKernel as Kernel
from anyattention_conformance import Golden, suite, targets


@jax.custom_vjp
def attend(logits, value, empty):
    """What a kernel makes of logits ``[batch, heads, q_length, kv_length]``, with the gradient as it has it."""
    weights = jax.nn.softmax(logits, axis=-1)
    weights = jnp.where(jnp.max(logits, axis=-1, keepdims=True) == -jnp.inf, empty, weights)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def attend_forward(logits, value, empty):
    output = attend(logits, value, empty)
    return output, (logits, value, output, jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def attend_backward(kept, doutput):
    logits, value, output, total = kept
    weights = jnp.exp(logits - total)
    dweights = jnp.einsum("btnh,bsnh->bnts", doutput, value)
    delta = jnp.einsum("btnh,btnh->bnt", doutput, output)[..., None]
    return weights * (dweights - delta), jnp.einsum("bnts,btnh->bsnh", weights, doutput), None


attend.defvjp(attend_forward, attend_backward)


@jax.custom_vjp
def refuse_odd(query, key):
    """The same, of which odd lengths have no derivative."""
    return query, key


def refuse_odd_forward(query, key):
    if query.shape[1] % 2 or key.shape[1] % 2:
        raise NotImplementedError(f"Unsupported sequence length Q {query.shape[1]}, KV {key.shape[1]}.")
    return (query, key), None


refuse_odd.defvjp(refuse_odd_forward, lambda kept, cotangents: cotangents)


class StandIn(Kernel):
    """Attention as kernels compute it: hidden logits are minus infinity; `empty` where there are no others."""

    name = "cudnn"
    platform = "cpu"
    dtypes = ("float32", "bfloat16", "float16")

    def __init__(self, empty, **attributes):
        super().__init__()
        self.empty = empty
        vars(self).update(attributes)

    def lacks(self, call, mask):
        return {}

    def kernel(self, query, key, value, bias, mask, scale):
        assert query.ndim == key.ndim == value.ndim == 4
        assert not self.one_depth or query.shape[-1] == value.shape[-1]
        assert all(x.shape[-1] % self.multiple == 0 for x in (query, key, value))
        if self.even:
            query, key = refuse_odd(query, key)
        group = query.shape[2] // key.shape[2]
        q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
        logits = logits if bias is None else logits + bias.astype(jnp.float32)
        i, j = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
        visible = jnp.ones((1, 1, q.shape[1], k.shape[1]), bool)
        if mask.left is not None:
            visible &= i - mask.left <= j
        if mask.right is not None:
            visible &= j <= i + mask.right
        if mask.kv_lengths is not None:
            assert mask.kv_lengths.shape == (q.shape[0],)
            visible &= j < mask.kv_lengths[:, None, None, None]
        if mask.kv_ids is not None:
            visible &= mask.query_ids[:, None, :, None] == mask.kv_ids[:, None, None, :]
        if mask.rest:
            assert mask.joined.ndim == 4
            visible &= mask.joined
        beyond = jnp.zeros((1, 1, q.shape[1], 1), bool)  # rows left to chance too, that have no gradient
        if mask.query_lengths is not None:
            beyond = i >= mask.query_lengths[:, None, None, None]
        output = attend(jnp.where(visible | beyond, logits, -jnp.inf), v, self.empty).astype(query.dtype)
        return jnp.where(jnp.swapaxes(beyond, 1, 2), self.empty, output)


@pytest.fixture(params=[0.0, jnp.nan], ids=["zero", "nan"])
def kernel(request, monkeypatch):
    kernel = StandIn(request.param, multiple=8, one_depth=True)
    monkeypatch.setattr(backend, "engines", (kernel,))
    return kernel


fused = partial(aa.dot_product_attention, implementation="fused")


def test_the_cases(kernel):
    """Contract C3 of every case that the kernel takes, gradients too; what it does not take it refuses."""
    target = targets.make(fused, "jax")
    outcomes = {run: target.run(*run) for run in suite.runs("smoke") if not run.case.error}
    served = {run: x for run, x in outcomes.items() if "cannot serve this call" not in x.message}
    report = suite.certify("fused", "jax", served.items(), list(served), oracle=Golden())
    assert [(x.case, x.dtype, x.quantity, x.message) for x in report.failures] == []
    refused = {run.case.group for run in outcomes.keys() - served.keys()}
    assert len(served) > 60
    assert refused == {"fill", "rounding", "dtypes", "depth", "dropout", "lengths", "growth"}


def arrays(batch=(3,), q_length=9, kv_length=7, heads=4, kv_heads=4, depth=12, v_depth=5):
    random = np.random.default_rng(7)
    shapes = (q_length, heads, depth), (kv_length, kv_heads, depth), (kv_length, kv_heads, v_depth)
    return [jnp.asarray(random.standard_normal((*batch, *shape)), jnp.float32) for shape in shapes]


def value_and_gradients(function, *args, **kwargs):
    output, pullback = jax.vjp(lambda *x: function(*x, **kwargs), *args)
    cotangent = np.random.default_rng(8).standard_normal(output.shape).astype(np.float32)
    return output, *pullback(cotangent)


def same_as_flax(args, mask=None, bias=None, rtol=2e-5):
    """The output and gradients of Flax with the dense mask, keys and values repeated for each query head."""
    query, key, _ = args
    group = query.shape[-2] // key.shape[-2]
    dense = mask.to_array(query.shape[-3], key.shape[-3]) if mask is not None else None

    def flax(query, key, value):
        return linen.dot_product_attention(
            query, jnp.repeat(key, group, -2), jnp.repeat(value, group, -2), mask=dense, bias=bias
        )

    expected = value_and_gradients(flax, *args)
    for actual, right in zip(value_and_gradients(fused, *args, mask=mask, bias=bias), expected, strict=True):
        np.testing.assert_allclose(actual, right, rtol=rtol, atol=rtol)


LENGTHS = np.array([7, 0, 3])
IDS = np.array([[0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5, 6]])
MASKS = {
    "causal": CausalMask(),
    "later": CausalMask(3),
    "window": LocalMask(3, 2),
    "windows": CausalMask(1) & LocalMask(4, 2),
    "lengths": LengthMask(LENGTHS),
    "both lengths": LengthMask(LENGTHS, np.array([2, 9, 0])),
    "causal lengths": LengthMask(LENGTHS, np.array([2, 9, 0])) & CausalMask(),
    "segments": SegmentMask(np.pad(IDS, ((0, 0), (0, 2)), constant_values=9), IDS),
    "causal segments": SegmentMask(np.pad(IDS, ((0, 0), (2, 0)), constant_values=9), IDS) & CausalMask(),
    "before": CausalMask(-2),
    "narrow window": LocalMask(1, 1),
    "window and lengths": LocalMask(4, 1) & LengthMask(LENGTHS),
    "two segments": SegmentMask(np.zeros(9, int), IDS[0]) & SegmentMask(np.zeros((3, 9), int), IDS),
    "but": ~CausalMask() & LocalMask(5, 5),
    "array": CausalMask() & (np.random.default_rng(3).random((3, 4, 9, 7)) < 0.2),
    "array of keys": CausalMask() & (np.random.default_rng(3).random((3, 1, 1, 7)) < 0.3),
    "array and lengths": LengthMask(LENGTHS, np.array([2, 9, 0])) & (np.random.default_rng(3).random((4, 9, 7)) < 0.2),
}


@pytest.mark.parametrize("name", MASKS)
def test_structure(kernel, name):
    """Rows without a key too: there are some in all but the bands."""
    mask = MASKS[name]
    same_as_flax(arrays(q_length=7 if name == "window" else 9), mask)


@pytest.mark.parametrize("visible", [True, False])
def test_a_mask_without_axes(kernel, visible):
    args = arrays()
    for function in (fused, jax.jit(fused)):
        output, *gradients = value_and_gradients(function, *args, mask=jnp.array(visible))
        expected = value_and_gradients(linen.dot_product_attention, *args, mask=jnp.full((1, 1, 9, 7), visible))
        for found, wanted in zip((output, *gradients), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


ODD = {
    "none": (None, 9, 7),
    "causal": (CausalMask(), 9, 7),
    "causal of even keys": (CausalMask(), 9, 8),
    "causal of more keys": (CausalMask(), 7, 9),
    "window": (LocalMask(4, 0), 8, 7),
    "narrow window": (LocalMask(2, 0), 9, 7),  # a tenth query would see no key
    "lengths": (LengthMask(LENGTHS), 8, 7),
    "both lengths": (LengthMask(LENGTHS, np.array([2, 9, 0])), 9, 7),
    "causal lengths": (LengthMask(LENGTHS, np.array([2, 9, 0])) & CausalMask(), 9, 8),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_lengths_of_a_derivative(kernel, monkeypatch, name):
    """They have a row of padding, which changes nothing, whatever the kernel puts there; an output alone has none."""
    monkeypatch.setattr(kernel, "even", True, raising=False)
    calls = []
    monkeypatch.setattr(kernel, "kernel", lambda *x: (calls.append(x), StandIn.kernel(kernel, *x))[1])
    mask, *lengths = ODD[name]
    args = arrays(q_length=lengths[0], kv_length=lengths[1], kv_heads=2)
    fused(*args, mask=mask)
    same_as_flax(args, mask)
    assert [[x.shape[1] for x in call[:2]] for call in calls] == [lengths, [x + x % 2 for x in lengths]]


def test_odd_lengths_mapped(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "even", True, raising=False)
    args = arrays()

    def gradients(function, *x):
        return jax.grad(lambda x: jnp.sum(function(*x) ** 2))(x)

    batched = jnp.stack([args[0], 2 * args[0]])
    actual, expected = (
        jax.vmap(partial(gradients, f), in_axes=(0, None, None))(batched, *args[1:])
        for f in (fused, linen.dot_product_attention)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4), actual, expected)


def test_grouped_heads_and_other_batches(kernel):
    same_as_flax(arrays(kv_heads=2), MASKS["array"])
    same_as_flax(arrays(batch=()), CausalMask())
    ids = [np.stack([IDS, IDS[::-1]])] * 2
    same_as_flax(arrays(batch=(2, 3), q_length=7), SegmentMask(*ids) & LengthMask(LENGTHS[:, None, None][0]))


def test_scale(kernel):
    """In the kernel, and where low biases send the call to tiled."""
    exact, low = partial(aa.dot_product_attention, implementation="exact"), jnp.full((9, 1), -1e4)
    for options in ({"mask": MASKS["both lengths"]}, {"bias": low}):
        pairs = (value_and_gradients(function, *arrays(), scale=0.7, **options) for function in (fused, exact))
        for actual, right in zip(*pairs, strict=True):
            np.testing.assert_allclose(actual, right, rtol=2e-5, atol=2e-5)


def test_bias(kernel):
    """Also minus infinity, for a whole row or where everything else is hidden."""
    args = arrays()
    bias = np.random.default_rng(4).standard_normal((3, 1, 9, 7)).astype(np.float32)
    same_as_flax(args, bias=bias)
    same_as_flax(args, MASKS["array"], bias=bias)
    same_as_flax(args, bias=2.5)
    bias[0, 0, 3] = -np.inf
    same_as_flax(args, bias=bias)
    mask = as_mask(np.arange(7)[None] < 3)
    bias[0, 0, 3, 3:] = 0.0  # what is visible is minus infinity, so that Flax's weights are those of the hidden keys
    same_as_flax(args, mask, bias=bias)
    jitted = jax.jit(partial(fused, bias=bias, mask=mask))(*args)
    np.testing.assert_allclose(jitted, linen.dot_product_attention(*args, bias, mask.array), rtol=2e-5, atol=2e-5)
    gradient, expected = (
        jax.grad(lambda bias, f=f: f(*args, bias, CausalMask().to_array(9, 7)).sum())(np.nan_to_num(bias, neginf=0.0))
        for f in (fused, linen.dot_product_attention)
    )
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-5)


def low_rows(kv_length=7, low=-3.4e38):
    """A bias that stands for a mask: two rows are low throughout, as of padding."""
    bias = np.where(np.random.default_rng(6).random((3, 1, 9, kv_length)) < 0.5, low, 0.0).astype(np.float32)
    bias[..., 0] = 0.0
    bias[0, 0, 3] = bias[2, 0, 5] = low
    return bias


@pytest.mark.parametrize("name", [None, "lengths", "causal", "array", "segments"])
def test_low_biases(kernel, name):
    """Their gradients are lost to kernels, which keep the logarithm of a sum: tiled takes such calls, jitted too."""
    args = arrays(q_length=9, kv_length=7)
    mask = MASKS.get(name)
    for low in (-1e4, -1e9, -3.4e38):
        same_as_flax(args, mask, bias=low_rows(low=low), rtol=2e-3 if low == -1e4 else 2e-5)
    sound = np.where(low_rows() < 0, -1e30, 0.0)
    sound[0, 0, 3] = sound[2, 0, 5] = 1.0
    same_as_flax(args, mask, bias=sound.astype(np.float32))


def test_low_biases_in_programs(kernel):
    """In one program, and mapped, some calls are the kernel's and some are not; what decides stays a branch."""
    args = arrays()
    biases = jnp.stack([low_rows(), np.zeros_like(low_rows()), low_rows(low=-1e30)])

    def gradients(function, bias):
        return jax.grad(lambda x: jnp.sum(function(*x[:3], bias=x[3]) ** 2))((*args, bias))

    for transform in (lambda f: lambda x: jnp.stack([*map(f, x)]), lambda f: jax.vmap(f)):
        actual, expected = (
            transform(jax.jit(lambda bias, f=f: gradients(f, bias)[1]))(biases)
            for f in (fused, linen.dot_product_attention)
        )
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-4)
    text = str(jax.make_jaxpr(jax.vmap(partial(gradients, fused)))(biases))
    assert text.count(" cond[") == 2


@pytest.mark.parametrize("keys", [7, 200])
def test_a_few_keys_mostly_tell(kernel, monkeypatch, keys):
    """Whether a bias is low: a call goes to the kernel too if only keys beside those few are shown."""
    calls = []
    monkeypatch.setattr(kernel, "kernel", lambda *x, **y: (calls.append(1), StandIn.kernel(kernel, *x, **y))[1])
    args = arrays(kv_length=keys)
    for count, shown in enumerate(([0], [1], [keys - 1]), 1):
        bias = np.full(keys, -1e30, np.float32)
        bias[shown] = 0.0
        expected = linen.dot_product_attention(*args, bias)
        for function in (fused, jax.jit(fused)):
            jax.clear_caches()
            np.testing.assert_allclose(function(*args, bias=bias), expected, rtol=2e-5, atol=2e-5)
        assert len(calls) == 2 * count
    jax.clear_caches()
    fused(*args, bias=np.full(keys, -1e30, np.float32))
    assert len(calls) == 2 * count


def test_transforms(kernel):
    args = arrays()
    query = args[0]

    def loss(function, query):
        return jnp.sum(function(query, *args[1:], mask=MASKS["array"].to_array(9, 7)) ** 2)

    for transform in (jax.grad, lambda f: jax.jit(jax.value_and_grad(f))):
        actual, expected = (transform(partial(loss, f))(query) for f in (fused, linen.dot_product_attention))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4), actual, expected)
    batched = jnp.stack([query, 2 * query])
    actual, expected = (jax.vmap(jax.grad(partial(loss, f)))(batched) for f in (fused, linen.dot_product_attention))
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-4)


def test_one_derivative_in_reverse(kernel):
    args = arrays()
    query = args[0]

    def loss(query):
        return fused(query, *args[1:]).sum()

    for transform in (jax.jacfwd, jax.hessian, lambda f: jax.jacrev(jax.grad(f))):
        with pytest.raises(NotImplementedError, match="'tiled'"):
            transform(loss)(query)
    with pytest.raises(NotImplementedError, match="'tiled'"):
        jax.jvp(jax.jit(loss), (query,), (query,))
    with pytest.raises(NotImplementedError, match="'tiled'"):
        jax.jit(jax.vmap(lambda x: jax.jvp(loss, (x,), (x,))))(query[None])


def test_what_it_refuses(kernel, monkeypatch):
    args = arrays()

    def reason(**kwargs):
        with pytest.raises(NotImplementedError) as error:
            fused(*args, **kwargs)
        return str(error.value)

    assert "dropout" in reason(dropout_rng=jax.random.key(0), dropout_rate=0.5)
    assert "precision" in reason(precision="highest")
    assert "module" in reason(module=linen.Dense(1))
    assert "logits float32" in reason(bias=np.float32([1.0]), dtype="bfloat16")
    assert "float32" in reason(force_fp32_for_softmax=True, dtype="bfloat16")
    assert "axes" in reason(mask=np.ones((2, 3, 1, 9, 7), bool))
    assert "switched off" in reason_of(aa.config(engines=["-cudnn"]), reason)
    monkeypatch.setattr(kernel, "platform", "gpu")
    assert "cudnn: it runs on gpu, not on cpu" in reason()


def test_masks_that_it_lacks_are_arrays_until_they_are_large(kernel, monkeypatch):
    args = arrays()
    plan = str(aa.explain(*args, mask=~CausalMask(), bias=1.0, implementation="fused"))
    assert "the mask is an array of 189 elements: it is no band" in plan
    assert "all biases of some row are far below zero" in plan
    assert "array" not in str(aa.explain(*args, mask=CausalMask(1), implementation="fused"))
    monkeypatch.setattr(StandIn, "most_elements", 188)
    for mask, reason in ((~CausalMask(), "joined by &"), (CausalMask(-1), "see nothing")):
        with pytest.raises(NotImplementedError, match=f"{reason}.*, and an array has 189 elements"):
            fused(*args, mask=mask)
    monkeypatch.setattr(StandIn, "dense", False)
    monkeypatch.setattr(StandIn, "most_elements", 189)
    with pytest.raises(NotImplementedError, match=r"cudnn: it is no band.*, it has no arrays"):
        fused(*args, mask=~CausalMask() & np.ones((9, 7)))


def reason_of(context, reason):
    with context:
        return reason()


def test_an_error_names_the_engine(kernel, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(kernel, "kernel", broken)
    with pytest.raises(RuntimeError, match="kernel image") as error:
        fused(*arrays())
    assert any("ANYATTENTION_ENGINES=-cudnn" in note for note in error.value.__notes__)
