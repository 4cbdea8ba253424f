"""Checkpoints, hooks on what is saved, autocast, and gradients of many cotangents, in PyTorch."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import anyattention as aa
from anyattention import masks

F = aa.dot_product_attention
G = torch.Generator().manual_seed(0)
LENGTH = 300  # above which None no longer takes exact
Q, K, V = (torch.randn(1, LENGTH, 2, 8, generator=G) for _ in range(3))
LOW = torch.zeros(LENGTH, LENGTH)
LOW[5] = torch.finfo(torch.float32).min  # fused falls back to tiled, as it sees when it runs
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "lengths": {"mask": masks.LengthMask(torch.tensor([200]))},
    "dense": {"mask": torch.rand(LENGTH, LENGTH, generator=G) > 0.3},
    "bias": {"bias": torch.randn(2, LENGTH, LENGTH, generator=G)},
    "a low row": {"bias": LOW},
    "fully masked rows": {"mask": masks.CausalMask(-3)},
    "dropout": {"dropout_rng": torch.tensor([0, 7]), "dropout_rate": 0.2},
}
SERVED = {
    (name, call)
    for name in ("tiled", "fused", None, "exact")
    for call in CALLS
    if not (name == "fused" and call in ("fully masked rows", "dropout"))
}
each_call = pytest.mark.parametrize(("implementation", "call"), sorted(SERVED, key=str))


def with_gradients(function, arrays=(Q, K, V)):
    """The output, and the gradients of its square by each array."""
    arrays = [x.clone().requires_grad_() for x in arrays]
    output = function(*arrays)
    output.square().sum().backward()
    return [output.detach(), *(x.grad for x in arrays)]


def exact(call, arrays=(Q, K, V)):
    return with_gradients(lambda *x: F(*x, implementation="exact", **CALLS[call]), arrays)


def close(found, expected, by=1e-4):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= by * max(1.0, y.abs().max()), (x - y).abs().max()


@each_call
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpoint(implementation, call, reentrant):
    def forward(*x):
        return F(*x, implementation=implementation, **CALLS[call])

    found = with_gradients(lambda *x: checkpoint(forward, *x, use_reentrant=reentrant))
    close(found, exact(call))


@pytest.mark.parametrize("implementation", ["tiled", "fused", "exact"])
@pytest.mark.parametrize("early_stop", [False, True])
def test_checkpoint_of_a_block_with_autocast(implementation, early_stop):
    """Attention stands amid a block whose own products are in 16 bits; the gradient runs within autocast too."""
    torch.manual_seed(0)
    before, after = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def block(x):
        q, k, v = (y.unflatten(-1, (2, 8)) for y in before(x).float().chunk(3, dim=-1))
        return after(F(q, k, v, implementation=implementation, is_causal=True).flatten(-2))

    def gradient(function):
        x = Q[..., :8].flatten(-2).clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            function(x).float().square().sum().backward()
        return x.grad

    assert torch.equal(gradient(lambda x: checkpoint(block, x, use_reentrant=False)), gradient(block))


def packed(function):
    """Every tensor that is packed while the function runs, with its storage."""
    found = []

    def pack(x):
        found.append((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes(), x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return found


@pytest.mark.parametrize("call", ["plain", "causal", "dense", "bias", "lengths"])
def test_fused_keeps_what_sdpa_keeps(call):
    """Query, key, value, output and the logarithms, each once, and the mask or bias."""
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    found = packed(lambda: F(q, k, v, implementation="fused", **CALLS[call]))
    own = [x.untyped_storage().data_ptr() for x in (q, k, v)]
    assert all([storage for storage, *_ in found].count(x) <= 1 for x in own)
    given = CALLS[call].get("mask", CALLS[call].get("bias"))
    of_sdpa = packed(
        lambda: torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=given[None] if isinstance(given, torch.Tensor) else None
        )
    )
    kept, least = (sum({storage: size for storage, size, _ in x}.values()) for x in (found, of_sdpa))
    assert kept <= least + 16 * LENGTH


@each_call
def test_saved_on_cpu(implementation, call):
    with torch.autograd.graph.save_on_cpu():
        found = with_gradients(lambda *x: F(*x, implementation=implementation, **CALLS[call]))
    close(found, exact(call))


SMALL = [x[:, :12] for x in (Q, K, V)]


def small(call):
    cut = {"mask": lambda x: x[..., :12, :12] if isinstance(x, torch.Tensor) else x, "bias": lambda x: x[..., :12, :12]}
    return {name: cut.get(name, lambda x: x)(x) for name, x in CALLS[call].items()}


@pytest.mark.parametrize("call", ["fully masked rows", "dropout"])
def test_what_fused_refuses(call):
    with pytest.raises(NotImplementedError):
        F(Q, K, V, implementation="fused", **CALLS[call])
    with pytest.raises(NotImplementedError):
        F(*SMALL, implementation="fused", **small(call))


@pytest.mark.parametrize(("implementation", "call"), sorted(x for x in SERVED if x[0] in ("tiled", "fused")))
def test_the_gradient_within_autocast_is_that_outside(implementation, call):
    """The first, and the second, whose own gradient runs within autocast too."""

    def gradients(within):
        x = [x.clone().requires_grad_() for x in SMALL]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            output = F(*x, implementation=implementation, **small(call))
            first = torch.autograd.grad(output.square().sum(), x, create_graph=True)
            second = torch.autograd.grad(sum(y.square().sum() for y in first), x)
        return [*first, *second]

    close(gradients(True), gradients(False), by=1e-5)


def test_exact_within_autocast_has_the_gradient_of_pytorch():
    """Whose products of the backward pass are in 16 bits there, as docs/libraries.md says."""

    def gradient(within):
        x = [x.clone().requires_grad_() for x in SMALL]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            return torch.autograd.grad(F(*x, implementation="exact").square().sum(), x)[0]

    difference = (gradient(True) - gradient(False)).abs().max() / gradient(False).abs().max()
    assert 1e-4 < difference < 2e-2


def test_pullbacks_and_compiled_gradients_within_autocast():
    def gradients(within):
        x = [x.clone().requires_grad_() for x in SMALL]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            output, pullback = aa.dot_product_attention_vjp(*SMALL, is_causal=True)
            compiled = torch.compile(lambda *x: F(*x, implementation="tiled", is_causal=True), backend="eager")
            compiled(*x).square().sum().backward()
            return [*pullback(output)[:3], *(y.grad for y in x)]

    close(gradients(True), gradients(False), by=1e-6)


@each_call
def test_many_cotangents_at_once(implementation, call):
    """`vectorize=True` and `is_grads_batched` map with an older vmap than `torch.func`, that knows few operators."""
    x = tuple(x[:, :5, :, :4].contiguous() for x in (Q, K, V))
    options = {
        name: y[..., :5, :5] if isinstance(y, torch.Tensor) and name != "dropout_rng" else y
        for name, y in small(call).items()
    }

    def jacobian(name, **how):
        def function(*x):
            return F(*x, implementation=name, **options)

        return torch.autograd.functional.jacobian(function, x, **how)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # PyTorch maps its kernel so
        found = jacobian(implementation, vectorize=True)
    close(found, jacobian("exact"), by=1e-5)


@pytest.mark.parametrize("implementation", ["tiled", None])
def test_hessian_of_many_cotangents_at_once(implementation):
    query, key, value = (x[:, :5] for x in (Q, K, V))

    def hessian(name, **how):
        def function(x):
            return F(x, key, value, implementation=name, is_causal=True).square().sum()

        return torch.autograd.functional.hessian(function, query, **how)

    close([hessian(implementation, vectorize=True)], [hessian("exact")], by=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["exact", "tiled", "fused", None])
def test_results_can_be_viewed_with_heads_and_depth_as_one_axis(implementation, dtype, heads):
    """Whichever implementation serves the call: so do gradients, of tiled; a filled-up depth is cut off again."""
    for length, depth in ((5, 8), (LENGTH, 8), (LENGTH, 5)):
        q = torch.randn(2, length, heads[0], 8, generator=G).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        k, v = (torch.randn(2, length, heads[1], size, generator=G).to(dtype) for size in (8, depth))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        for mask in (None, masks.CausalMask(), masks.LengthMask(torch.tensor([3, length]))):
            output = F(q, k, v, mask=mask, implementation=implementation)
            assert output.is_contiguous()
            assert output.view(2, length, -1).shape == (2, length, heads[0] * depth)
            if implementation == "tiled":
                for gradient in torch.autograd.grad(output.square().sum(), (q, k, v)):
                    gradient.view(2, length, -1)
    results = aa.dot_product_attention_vjp(q.detach(), k.detach(), v.detach())
    for x in (results[0], *results[1](results[0])[:3]):
        x.view(2, LENGTH, -1)


def test_layout_in_compiled_programs():
    for implementation in ("exact", "tiled", "fused"):

        def flat(x, name=implementation):
            return F(x, x, x, implementation=name, is_causal=True).view(1, -1, 16)

        compiled = torch.compile(flat, backend="aot_eager", fullgraph=True)
        np.testing.assert_allclose(compiled(Q), flat(Q), atol=1e-6)
