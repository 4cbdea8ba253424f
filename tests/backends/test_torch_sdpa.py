"""PyTorch's own kernel as an engine: within C3 wherever it serves, and a reason wherever it does not."""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import anyattention as aa
from anyattention import masks
from anyattention._src import plan
from anyattention_backends.torch.arrays import TorchArrays
from anyattention_backends.torch.sdpa import SDPA
from anyattention_conformance import FORMS, Answer, flax_answer, flax_attention, truth, within_c3

NAMES = ("query", "key", "value", "bias")
REFUSED = {  # cases of the conformance suite that the kernel cannot serve, and part of the reason
    "q-length-0": "empty",
    "kv-length-0": "empty",
    "depth-0": "empty",
    "bias-higher-rank": "axes that query and key lack",
    "mask-higher-rank": "axes that query and key lack",
    "heads-grown-by-bias": "axes that query and key lack",
    "keys-grown-by-bias": "axes that query and key lack",
    "dropout": "no dropout of Flax's bits",
    "dropout-everywhere": "no dropout of Flax's bits",
}
fused = partial(aa.dot_product_attention, implementation="fused")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def to_torch(x):
    x = np.asarray(x)
    return torch.tensor(x.astype(np.float32)).bfloat16() if x.dtype.name == "bfloat16" else torch.tensor(x)


def to_numpy(x, like):
    return (x.detach().float() if x.dtype == torch.bfloat16 else x.detach()).numpy().astype(like.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_within_c3_or_refused(case, dtype):
    arguments = case.inputs(dtype)
    placed = {name: to_torch(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    expected = REFUSED.get(case.id)
    if case.id == "force-fp32" and dtype != "float32":
        expected = "returns float32"
    if expected:
        with pytest.raises(NotImplementedError, match=expected):
            fused(**placed)
        return
    leaves = [placed[name].requires_grad_() for name in NAMES[:3]]
    cotangent = np.random.default_rng(1).standard_normal(flax_attention(**arguments).shape)
    cotangent = cotangent.astype(arguments["query"].dtype)
    flax, (exact, size) = flax_answer(arguments, cotangent), truth(arguments, dtype, cotangent)
    output = fused(**placed)
    gradients = torch.autograd.grad(output, leaves, to_torch(cotangent))
    answer = Answer(to_numpy(output, flax.output), dict(zip(NAMES, gradients, strict=False)))
    assert not within_c3(answer.output, flax.output, exact.output, size.output, dtype)
    for name, gradient in answer.gradients.items():
        gradient = to_numpy(gradient, flax.gradients[name])
        problem = within_c3(gradient, flax.gradients[name], exact.gradients[name], size.gradients[name], dtype)
        assert not problem, f"gradient of {name}: {problem}"


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("implementation", ["fused", None])
def test_a_scale_that_is_not_positive(implementation, scale):
    """The kernel multiplies by it the minus infinity of what is causally hidden too, and returns NaN."""
    arrays = [normal(2, 40, 2, 16, seed=seed).requires_grad_() for seed in range(3)]
    cotangent = normal(2, 40, 2, 16, seed=3)

    def results(given, implementation):
        output = aa.dot_product_attention(*given, is_causal=True, scale=scale, implementation=implementation)
        return output, *torch.autograd.grad(output, given, cotangent.to(output.dtype))

    found = results(arrays, implementation)
    expected = results([x.detach().double().requires_grad_() for x in arrays], "exact")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6)


# --- what the smoke cases lack ---

HIDDEN = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
HIDDEN[1, :, 2] = False
LOWEST = torch.finfo(torch.float32).min


def low_row(low, others=0.0):
    """A bias that stands for a mask: one row is low throughout, as of padding; all others in every second key."""
    bias = torch.where(torch.arange(7) % 2 == 0, others, low).expand(5, 7).clone()
    bias[2] = low
    return bias.double()


LOW = {
    "low-scalar": {"bias": LOWEST},
    "low": {"bias": low_row(LOWEST)},
    "low-and-hidden": {"bias": low_row(LOWEST), "mask": HIDDEN},
    "low-where-nothing-is-seen": {"bias": low_row(LOWEST), "mask": HIDDEN & (torch.arange(5) != 2)[:, None]},
}
KERNELS = {  # what the kernel computes
    "causal": {"is_causal": True},
    "lengths": {"mask": masks.LengthMask(torch.tensor([3, 0]))},
    "hidden-row": {"mask": HIDDEN},
    "hidden-row-one-head": {"mask": HIDDEN & torch.tensor([True, True, False, True])[:, None, None]},
    "bias-scalar": {"bias": 0.5},
    "bias-and-hidden-row": {"mask": HIDDEN, "bias": normal(4, 5, 7)},
    "bias-and-lengths": {"mask": masks.LengthMask(torch.tensor([3, 0])), "bias": normal(4, 1, 1)},
    "precision": {"precision": "highest"},
}
OPTIONS = KERNELS | LOW


@pytest.mark.parametrize(("kv_heads", "v_depth"), [(4, 8), (2, 8), (2, 3), (4, 9)])
@pytest.mark.parametrize("batch", [(2,), (1, 2), ()], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_exact_with_its_gradients(options, batch, kv_heads, v_depth):
    if not batch:
        options = {name: x[0] if name == "mask" and isinstance(x, torch.Tensor) else x for name, x in options.items()}
        if isinstance(options.get("mask"), masks.Mask):
            options = options | {"mask": masks.LengthMask(torch.tensor(0))}
    arrays = [normal(*batch, *s, dtype=torch.float64) for s in ((5, 4, 8), (7, kv_heads, 8), (7, kv_heads, v_depth))]
    arrays = [x.requires_grad_() for x in arrays]
    answers = []
    for implementation in ("exact", "fused"):
        output = aa.dot_product_attention(*arrays, **options, implementation=implementation)
        answers.append(
            (output.detach(), *torch.autograd.grad(output, arrays, normal(*output.shape, dtype=output.dtype)))
        )
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low", [-100.0, -1e4, -1e9, -1e38], ids=str)
def test_the_gradient_of_a_low_row_within_c3(low, dtype):
    """A row whose biases are all low: the logarithm of its sum, from which kernels have the gradient, is rounded."""
    low = max(low, torch.finfo(dtype).min)
    name = str(dtype).removeprefix("torch.")
    random = np.random.default_rng(5)
    arguments = {x: random.standard_normal((2, n, 2, 16)) for x, n in (("query", 5), ("key", 7), ("value", 7))}
    placed = {x: torch.tensor(y).to(dtype).requires_grad_() for x, y in arguments.items()}
    bias = low_row(low).to(dtype)
    given = {x: y.detach().float().numpy().astype(name) for x, y in (*placed.items(), ("bias", bias))}
    cotangent = random.standard_normal((2, 5, 2, 16)).astype(name)
    flax, (exact, size) = flax_answer(given, cotangent), truth(given, name, cotangent)
    gradients = torch.autograd.grad(fused(**placed, bias=bias), list(placed.values()), to_torch(cotangent))
    for x, gradient in zip(NAMES, gradients, strict=False):
        gradient = to_numpy(gradient, flax.gradients[x])
        problem = within_c3(gradient, flax.gradients[x], exact.gradients[x], size.gradients[x], name)
        assert not problem, f"gradient of {x}: {problem}"


@pytest.mark.parametrize("keys", [7, 200])
def test_one_look_at_a_few_keys_mostly_tells(monkeypatch, keys):
    """A bias that hides the last keys goes to the kernel, and so does one that leaves only keys beside those."""
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *x, **y: (calls.append(1), kernel(*x, **y))[1]
    )
    query, key, value = (normal(2, n, 2, 8) for n in (5, keys, keys))
    for shown in ([0], [1], [keys - 1]):
        bias = torch.full((keys,), -1e30)
        bias[shown] = 0.0
        exact = aa.dot_product_attention(query, key, value, bias=bias, implementation="exact")
        torch.testing.assert_close(fused(query, key, value, bias=bias), exact)
    assert len(calls) == 3
    fused(query, key, value, bias=torch.full((keys,), -1e30))
    assert len(calls) == 3


def test_queries_that_see_nothing_on_a_kernel_that_answers_nan(monkeypatch):
    def kernel(query, key, value, attn_mask, is_causal, scale):
        logits = query @ key.mT / query.shape[-1] ** 0.5
        return torch.softmax(torch.where(attn_mask, logits, -torch.inf), dim=-1) @ value

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    test_equals_exact_with_its_gradients(KERNELS["hidden-row"], (2,), 4, 8)


def test_second_order():
    arrays = [normal(2, n, 2, 4, dtype=torch.float64).requires_grad_() for n in (3, 5, 5)]
    mask = HIDDEN[:, :, :3, :5] & torch.tensor([True, False, True])[:, None]
    assert torch.autograd.gradcheck(lambda *x: fused(*x, mask=mask), arrays)
    assert torch.autograd.gradgradcheck(lambda *x: fused(*x, mask=mask), arrays)


def test_gradient_twice_from_one_graph_and_of_some_arguments():
    query, key, value = (normal(2, 5, 2, 4, seed=seed) for seed in range(3))
    query.requires_grad_()
    output = fused(query, key, value)
    first, second = (torch.autograd.grad(output.sum(), query, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    exact = aa.dot_product_attention(query, key, value, implementation="exact")
    torch.testing.assert_close(first, torch.autograd.grad(exact.sum(), query)[0], rtol=1e-5, atol=1e-6)


def differentiated_twice(attend, arrays):
    """Output, first and second derivatives."""
    output = attend(*arrays)
    first = torch.autograd.grad(
        (output * normal(*output.shape, dtype=torch.float64, seed=9)).sin().sum(), arrays, create_graph=True
    )
    return output, *first, *torch.autograd.grad(sum(x.sin().sum() for x in first), arrays)


@pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("within", ["", "checkpoint", "reentrant checkpoint", "saved on CPU"])
def test_second_derivatives_are_those_of_exact(options, within):
    """Within a checkpoint too, which lets a saved tensor be unpacked once."""
    options = {name: x.double() if name == "bias" and isinstance(x, torch.Tensor) else x for name, x in options.items()}
    arrays = [normal(2, *s, dtype=torch.float64, seed=i) for i, s in enumerate(((5, 4, 8), (7, 2, 8), (7, 2, 8)))]
    arrays = [x.requires_grad_() for x in arrays]

    def attend(query, key, value):
        return fused(query * 1, key * 1, value * 1, **options)

    def inside(*arrays):
        if within == "saved on CPU":
            with torch.autograd.graph.save_on_cpu():
                return attend(*arrays)
        return checkpoint(attend, *arrays, use_reentrant=False) if within else attend(*arrays)

    if within == "reentrant checkpoint":  # which PyTorch itself differentiates once, by `backward`
        checkpoint(attend, *arrays, use_reentrant=True).sin().sum().backward()
        expected = torch.autograd.grad(
            aa.dot_product_attention(*arrays, **options, implementation="exact").sin().sum(), arrays
        )
        torch.testing.assert_close([x.grad for x in arrays], list(expected), rtol=1e-10, atol=1e-10)
        return
    actual = differentiated_twice(inside, arrays)
    exact = partial(aa.dot_product_attention, **options, implementation="exact")
    torch.testing.assert_close(actual, differentiated_twice(exact, arrays), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")  # PyTorch's own
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch maps the gradient of jacrev so
@pytest.mark.parametrize("mask", [None, masks.CausalMask(), masks.LengthMask(torch.tensor([3])), HIDDEN[1:]], ids=str)
@pytest.mark.parametrize("name", ["grad", "vjp", "vmap", "vmap of grad", "grad of vmap", "jacrev"])
def test_transformations_that_the_kernel_has(name, mask):
    """Of `torch.func`, with the kernel's own gradient; those that map the call are refused on CPU."""
    func = torch.func
    query, key, value = (normal(3, 1, n, 2, 4, dtype=torch.float64, seed=n) for n in (5, 7, 7))

    def transformed(implementation):
        def attend(query, key, value):
            return aa.dot_product_attention(query, key, value, mask=mask, implementation=implementation)

        def loss(query, key, value):
            return attend(query, key, value).sin().sum()

        one = query[0], key[0], value[0]
        return {
            "grad": lambda: func.grad(loss, argnums=(0, 1, 2))(*one),
            "vjp": lambda: func.vjp(attend, *one)[1](one[0]),
            "vmap": lambda: func.vmap(attend)(query, key, value),
            "vmap of grad": lambda: func.vmap(func.grad(loss))(query, key, value),
            "grad of vmap": lambda: func.grad(lambda x: func.vmap(attend)(x, key, value).sin().sum())(query),
            "jacrev": lambda: func.jacrev(attend)(*one),
        }[name]()

    if "vmap" not in name:
        torch.testing.assert_close(transformed("fused"), transformed("exact"), rtol=1e-10, atol=1e-10)
        return
    with pytest.raises(NotImplementedError, match="no rule to map it on CPU"):
        transformed("fused")
    torch.testing.assert_close(transformed(None), transformed("exact"), rtol=1e-10, atol=1e-10)


def test_no_switch_of_the_process_is_set(monkeypatch):
    """Threads would leave it behind; and the caller's own choice of kernels counts."""
    flags = torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.flash_sdp_enabled
    monkeypatch.setattr(TorchArrays, "platform", lambda self, x: "cuda")
    monkeypatch.setattr(torch.backends.cuda, "enable_math_sdp", None)
    monkeypatch.setattr(torch._C, "_set_sdp_use_math", None)
    x = normal(2, 5, 4, 8, dtype=torch.bfloat16)
    before = [flag() for flag in flags]
    fused(x, x, x, mask=HIDDEN[..., :5])
    assert [flag() for flag in flags] == before
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: torch.nn.attention.SDPBackend.MATH.value)
    with pytest.raises(RuntimeError, match="all logits") as error:
        fused(x, x, x)
    assert "ANYATTENTION_ENGINES=-sdpa" in error.value.__notes__[0]


def kept_for_backward(attend):
    """Bytes of what autograd keeps, each storage once."""
    seen = {}
    x = normal(1, 256, 4, 16).requires_grad_()

    def pack(y):
        seen[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        attend(x * 1, x * 2, x * 3)
    return sum(seen.values())


def by_hand(query, key, value, **options):
    four = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*four, **options).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_kept_for_backward_is_what_the_kernel_keeps(causal):
    ours = kept_for_backward(partial(fused, is_causal=causal))
    assert ours == kept_for_backward(partial(by_hand, is_causal=causal))
    mask = torch.arange(256) < 200
    ours, theirs = (
        kept_for_backward(f) for f in (partial(fused, mask=mask), partial(by_hand, attn_mask=mask[None, None, None]))
    )
    assert ours <= theirs + 2 * 256  # which keys are hidden


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_hidden_padding_does_not_show(bad, dense):
    """Of keys and values; a fully masked row averages all values, as Flax does."""
    lengths = torch.tensor([4, 7, 0])
    hidden = torch.arange(7) >= lengths[:, None]
    arrays = [normal(3, n, 2, 8, seed=n) for n in (5, 6, 7)]
    query, key, value = arrays[0], normal(3, 7, 2, 8, seed=1), normal(3, 7, 2, 8, seed=2)
    mask = ~hidden[:, None, None] if dense else masks.LengthMask(lengths)
    expected = aa.dot_product_attention(query, key, value, mask=mask, implementation="exact")
    padded = [query, *(torch.where(hidden[..., None, None], bad, x) for x in (key, value))]
    padded = [x.requires_grad_() for x in padded]
    output = fused(*padded, mask=mask)
    torch.testing.assert_close(output[:2], expected[:2], rtol=1e-5, atol=1e-6)
    for gradient in torch.autograd.grad(output[:2].sin().sum(), padded):
        assert torch.isfinite(gradient).all()
    mean = (padded[2][2] / 7).sum(dim=0).expand(5, 2, 8)
    torch.testing.assert_close(output[2], mean, equal_nan=True)


def test_nothing_is_left_to_the_garbage_collector():
    """The hook on the kernel's node makes no cycle."""
    gc.disable()
    try:
        x = normal(1, 64, 2, 8).requires_grad_()
        alive = weakref.ref(x)
        fused(x, x, x).sum().backward()
        del x
        assert alive() is None
    finally:
        gc.enable()


# --- CUDA, as far as it goes without: the kernel for CPU takes the calls ---


class Recorder:
    """The kernel, and what it was given."""

    def __init__(self):
        self.kernel = torch.nn.functional.scaled_dot_product_attention

    def __call__(self, *arrays, **options):
        assert torch.backends.cuda.math_sdp_enabled()  # no switch of the process is set
        self.arrays, self.mask = arrays, options["attn_mask"]
        return self.kernel(*arrays, **options)


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's path, in float32 too, so that its numbers can be compared."""
    recorder = Recorder()
    monkeypatch.setattr(SDPA, "on_cuda", ("float32", "bfloat16", "float16"))
    monkeypatch.setattr(TorchArrays, "platform", lambda self, x: "cuda")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorder)
    return recorder


@pytest.mark.parametrize(("kv_heads", "depth", "v_depth"), [(4, 8, 8), (2, 12, 8), (2, 3, 17)])
@pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS)
def test_on_cuda_it_equals_exact_with_its_gradients(cuda, options, kv_heads, depth, v_depth):
    options = {name: x.float() if name == "bias" and isinstance(x, torch.Tensor) else x for name, x in options.items()}
    arrays = [normal(2, *s).requires_grad_() for s in ((5, 4, depth), (7, kv_heads, depth), (7, kv_heads, v_depth))]
    answers = []
    for implementation in ("exact", "fused"):
        output = aa.dot_product_attention(*arrays, **options, implementation=implementation)
        answers.append((output.detach(), *torch.autograd.grad(output, arrays, normal(*output.shape))))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    if options.keys() - {"precision"}:
        assert {x.shape[1] for x in cuda.arrays} == {4}  # the memory-efficient kernel has no grouped heads
    (width,) = {x.shape[-1] for x in cuda.arrays}
    assert width % 8 == 0


def test_flash_on_cuda_gets_the_very_arrays(cuda):
    query, key, value = (normal(2, 5, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    for mask in (None, masks.CausalMask()):
        fused(query, key, value, mask=mask)
        for given, x in zip(cuda.arrays, (query, key, value), strict=True):
            assert given.data_ptr() == x.data_ptr()
            assert given.transpose(1, 2).shape == x.shape
    fused(query, torch.cat([key, key], 1), torch.cat([value, value], 1), mask=masks.CausalMask())
    assert [x.shape[1] for x in cuda.arrays] == [4, 4, 4]  # another kernel, since the lengths differ


def test_strides_on_cuda_are_one(cuda):
    x = normal(2, 8, 4, 5, dtype=torch.float16).transpose(1, 3)
    mask = HIDDEN[..., :5]
    for given in (mask, mask.mT, mask[..., :1]):
        fused(x, x, x, mask=given)
        assert {y.stride(-1) for y in (*cuda.arrays, cuda.mask)} == {1}
        assert cuda.mask.shape[-1] == 5


def test_compiles_on_cuda_in_one_graph(monkeypatch):
    monkeypatch.setattr(TorchArrays, "platform", lambda self, x: "cuda")
    monkeypatch.setattr(SDPA, "on_cuda", ("float32",))
    x = normal(2, 5, 4, 8)
    compiled = torch.compile(lambda x, m: fused(x, x, x, mask=m), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, HIDDEN[..., :5]), fused(x, x, x, mask=HIDDEN[..., :5]))


@pytest.mark.parametrize("gradient", [False, True])
def test_an_error_names_the_engine(cuda, gradient):
    def none(*arrays, **options):
        raise RuntimeError("No available kernel. Aborting execution.")

    cuda.kernel = none
    with pytest.raises(RuntimeError, match=r"(?s)No available kernel.*ANYATTENTION_ENGINES=-sdpa"):
        fused(*[normal(2, 5, 4, 8).requires_grad_(gradient)] * 3)


ON_CUDA = {
    "float64": ({"dtype": torch.float64}, "no kernel for float64 is as accurate"),
    "a wide bias": ({"bias": torch.zeros(5, 5), "dtype": torch.bfloat16}, "no kernel for float32 is as accurate"),
    "a depth": ({}, "no kernel for depths beyond 256"),
}


@pytest.mark.parametrize("name", ON_CUDA)
def test_refuses_on_cuda(cuda, name):
    options, reason = ON_CUDA[name]
    x = normal(2, 5, 4, 257) if name == "a depth" else X
    with pytest.raises(NotImplementedError, match=reason):
        fused(x, x, x, **options)


def test_refuses_other_platforms():
    with pytest.raises(NotImplementedError, match="sdpa: it runs on cpu and cuda, not on meta"):
        fused(*[X.to("meta")] * 3)


def test_the_rules_for_cuda_row_by_row(cuda):
    """The least call of each rule, and one that is smaller, on tensors without storage."""

    def chosen(length, **options):
        x = torch.empty(1, length, 1, 16, device="meta", dtype=torch.bfloat16)
        return aa.explain(x, x, x, **options)

    by_fused, by_tiled = plan.RULES["torch", "cuda"]
    assert by_fused == plan.Rule("fused", of_a_head=2**8)
    assert by_tiled == plan.Rule("tiled", of_an_entry=2**30)
    assert chosen(2**4 - 1).implementation == "exact"
    assert (chosen(2**4).implementation, chosen(2**4).engine) == ("fused", "sdpa")
    unserved = {"bias": torch.zeros(1, 1, device="meta").requires_grad_()}
    assert chosen(2**15 - 1, **unserved).implementation == "exact"
    assert chosen(2**15, **unserved).implementation == "tiled"
    with aa.config(engines=()):
        assert chosen(2**15).implementation == "tiled"


def test_under_a_compiler_the_bias_is_not_looked_at():
    """The engine is refused, with the reason, and None takes another implementation, in one graph."""
    x, bias = normal(1, 256, 1, 8), low_row(LOWEST)[2, 0].float().expand(256)
    seen = []

    def attend(x, bias):
        seen.append(aa.explain(x, x, x, bias=bias))
        return aa.dot_product_attention(x, x, x, bias=bias)

    output = torch.compile(attend, backend="eager")(x, bias)
    torch.testing.assert_close(output, x.mean(1, keepdim=True).expand_as(x))
    assert "the values of the bias cannot be inspected here" in str(seen[0])
    assert aa.explain(x, x, x, bias=bias).engine == "sdpa"


def test_masks_by_rule_beside_a_bias_on_cuda(cuda):
    """They are expanded there, where tiled is slow, unless that takes too much memory."""
    x, bias = normal(2, 5, 4, 8), normal(4, 1, 5)
    for mask in (masks.CausalMask(), masks.LocalMask(1, 1) & HIDDEN[..., :5], ~masks.CausalMask(1)):
        answers = [
            aa.dot_product_attention(x, x, x, bias=bias, mask=mask, implementation=implementation)
            for implementation in ("exact", "fused")
        ]
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    plan = str(aa.explain(x, x, x, bias=bias, mask=~masks.CausalMask(1), implementation="fused"))
    assert "the mask is an array of 50 elements" in plan
    assert "all biases of some row are far below zero" in plan
    long = torch.empty(1, 2**15 + 8, 1, 8, device="meta")
    with pytest.raises(NotImplementedError, match=r"an array has \d+ elements"):
        fused(long, long, long, mask=~masks.CausalMask())


def test_compiles_in_one_graph():
    x = normal(2, 5, 4, 8)
    compiled = torch.compile(lambda x, m: fused(x, x, x, mask=m), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, HIDDEN[..., :5]), fused(x, x, x, mask=HIDDEN[..., :5]))


def test_memory_layout_is_kept():
    """Queries come and go as [batch, length, heads, depth] without a copy being made for the kernel."""
    assert fused(*[normal(2, 5, 4, 8)] * 3).is_contiguous()


X = normal(2, 5, 4, 8)
REASONS = {
    "a mask by rule": ({"mask": masks.CausalMask(1)}, "an array of 50 elements"),
    "a bias beside a mask by rule": (
        {"mask": masks.CausalMask(), "bias": X[0, :, 0, :5]},
        "an array of 50 elements",
    ),
    "joined masks": ({"mask": masks.CausalMask() & torch.ones(5, 5)}, "an array of 50 elements"),
    "a bias with a gradient": ({"bias": torch.zeros(5, 5).requires_grad_()}, "needs a gradient"),
    "a wide bias": ({"bias": torch.zeros(5, 5, dtype=torch.float64)}, "makes logits float64"),
    "a complex call": ({"dtype": torch.complex64}, "no kernel for complex64"),
    "einsums": ({"qk_attn_weights_einsum": torch.einsum, "attn_weights_value_einsum": torch.einsum}, "einsum"),
}


@pytest.mark.parametrize(("options", "reason"), REASONS.values(), ids=REASONS)
def test_refuses_with_the_reason(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        fused(X, X, X, **options)


@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")  # PyTorch's own
def test_transformations_are_refused_and_served_otherwise():
    grad = torch.func.grad
    with pytest.raises(NotImplementedError, match=r"no second derivative within torch\.func"):
        grad(lambda x: grad(lambda x: fused(x, x, x).sum())(x).sum())(X)
    with pytest.raises(NotImplementedError, match=r"no second derivative within torch\.func"):
        grad(lambda x: fused(x, x, x).sum())(X.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: fused(x, x, x), (X,), (X,))
    large = normal(1, 256, 1, 4)
    assert aa.explain(large, large, large).engine == "sdpa"
    _, tangent = torch.func.jvp(lambda x: aa.dot_product_attention(x, x, x), (large,), (large,))
    exact = torch.func.jvp(lambda x: aa.dot_product_attention(x, x, x, implementation="exact"), (large,), (large,))
    torch.testing.assert_close(tangent, exact[1])


@pytest.mark.parametrize("library", [np, pytest.importorskip("jax.numpy")], ids=["numpy", "jax"])
def test_other_libraries_have_no_engine(library):
    x = library.ones((2, 1, 4))
    with pytest.raises(NotImplementedError, match=r"no engine for numpy|cudnn: it runs on gpu, not on cpu"):
        fused(x, x, x)
    with pytest.raises(NotImplementedError, match=r"all the weights|no engine for numpy"):
        aa.dot_product_attention_weights(x, x, implementation="fused")
