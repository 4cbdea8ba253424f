"""PyTorch's transforms, compilers and settings around the public function."""

import pytest
import torch

import anyattention as aa

F = aa.dot_product_attention
Q = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_without_graph_breaks(dtype, dynamic):
    key, x = torch.tensor([0, 0]), Q.to(dtype)

    def call(x):
        return F(x, x, x, mask=torch.ones(5, 5).tril(), dropout_rng=key, dropout_rate=0.1, is_causal=True)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)(x), call(x))


def test_export_with_a_symbolic_length():
    class Model(torch.nn.Module):
        def forward(self, x):
            return F(x, x, x, is_causal=True)

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Model(), (Q,), dynamic_shapes={"x": {1: length}})
    x = torch.cat([Q, Q], dim=1)
    assert torch.equal(program.module()(x), F(x, x, x, is_causal=True))


def test_meta_tensors():
    x = Q.to("meta")
    assert F(x, x, x).device.type == "meta"


def test_autocast_does_not_reach_inside():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(F(Q, Q, Q), F(Q, Q, Q).float())


def test_vmap():
    assert torch.equal(torch.func.vmap(F)(Q, Q, Q), F(Q, Q, Q))


def test_gradients_with_a_hidden_row():
    q, bias = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((1, 3, 2, 4), (2, 3, 3)))
    mask = torch.ones(3, 3).tril(-1)
    assert torch.autograd.gradcheck(lambda q, bias: F(q, q, q, bias, mask), (q, bias))
