"""What stands for a tensor in PyTorch, is of another dtype, or of another device than query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anyattention as aa
from anyattention import ShapeError, masks

F = aa.dot_product_attention
G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, length, 2, 8, generator=G) for length in (4, 6, 6))
LOWER = torch.ones(4, 6).tril(2)
KEY = torch.tensor([0, 7])
everywhere = pytest.mark.parametrize("implementation", ["exact", "tiled", None])
from_torch_itself = pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes, and what is deprecated


class Hidden(torch.Tensor):
    """A tensor that keeps its values beside its storage, as `CausalBias` does."""

    @staticmethod
    def __new__(cls, values):
        self = torch.Tensor._make_subclass(cls, torch.full_like(values, float("nan"), dtype=torch.float32))
        self.values_ = values
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Plain(torch.Tensor):
    """A tensor of another name."""


# --- storage that is not the meaning ---


@pytest.mark.parametrize("implementation", ["exact", "tiled", "fused", None])
def test_causal_bias_is_a_mask(implementation):
    for bias, shown in ((causal_upper_left(4, 6), torch.ones(4, 6).tril()), (causal_lower_right(4, 6), LOWER)):
        expected = F(Q, K, V, mask=shown, implementation="exact")
        if implementation == "fused" and shown is LOWER:  # SDPA refuses an offset on CPU, as of any such mask
            continue
        torch.testing.assert_close(F(Q, K, V, mask=bias, implementation=implementation), expected)
        found = torch.compile(lambda q, m: F(q, K, V, mask=m, implementation=implementation), backend="eager")(Q, bias)
        torch.testing.assert_close(found, expected)


def test_causal_bias_among_other_masks():
    lengths, bias = masks.LengthMask(torch.tensor([3, 5])), causal_lower_right(4, 6)
    torch.testing.assert_close(F(Q, K, V, mask=lengths & bias), F(Q, K, V, mask=lengths & LOWER))
    assert torch.equal(masks.combine_masks(bias, torch.ones(4, 6)), LOWER)
    with pytest.raises(ShapeError, match=r"mask is for lengths \(4, 5\), but those of query and key are \(4, 6\)"):
        F(Q, K, V, mask=causal_lower_right(4, 5))
    with pytest.raises(TypeError, match=r"bias: a mask by rule, .* is no array: pass it as mask="):
        F(Q, K, V, bias=bias)


def foreign(name):
    x = torch.ones(4, 6)
    if name == "block mask":
        return create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 4, 6, device="cpu")
    return {
        "masked": lambda: masked_tensor(x, x.tril().bool()),
        "nested": lambda: torch.nested.nested_tensor([x, x]),
        "jagged": lambda: torch.nested.nested_tensor([x, x], layout=torch.jagged),
        "COO": x.to_sparse,
        "CSR": x.to_sparse_csr,
        "a user's": lambda: Hidden(x),
        "uninitialised": torch.nn.UninitializedParameter,
    }[name]()


def ways(x):
    """Each argument that takes an array, by the name in the message."""
    return {
        "query": lambda **how: F(x, K, V, **how),
        "key": lambda **how: F(Q, x, V, **how),
        "value": lambda **how: F(Q, K, x, **how),
        "bias": lambda **how: F(Q, K, V, bias=x, **how),
        "mask": lambda **how: F(Q, K, V, mask=x, **how),
        "mask of lengths": lambda **how: F(Q, K, V, mask=masks.LengthMask(x), **how),
        "mask of ids": lambda **how: F(Q, K, V, mask=masks.SegmentMask(torch.ones(4), x), **how),
        "dropout_rng": lambda **how: F(Q, K, V, dropout_rng=x, dropout_rate=0.1, **how),
    }


@from_torch_itself
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("masked", r"MaskedTensor.*get_mask\(\)"),
        ("nested", "nested tensor: pad it"),
        ("jagged", "NestedTensor.*: pad it"),
        ("COO", r"layout sparse_coo: pass to_dense\(\)"),
        ("CSR", r"layout sparse_csr: pass to_dense\(\)"),
        ("a user's", "Hidden, whose storage is not what it means: pass a plain tensor"),
        ("uninitialised", "UninitializedParameter, whose storage"),
        ("block mask", "BlockMask, which is no tensor: pass one, or a mask"),
    ],
)
def test_what_cannot_be_understood_is_refused_in_every_argument(name, advice):
    x = foreign(name)
    for argument, way in ways(x).items():
        if name == "block mask" and argument == "dropout_rng":
            continue
        for implementation in ("exact", "tiled", "fused", None):
            with pytest.raises(TypeError, match=f"^{argument.split()[0]}: .*{advice}"):
                way(implementation=implementation)
    with pytest.raises(TypeError, match=rf"masks\[1\]: .*{advice}" if name != "block mask" else ""):
        masks.combine_masks(torch.ones(4, 6), x)


@everywhere
def test_tensors_that_are_what_they_hold(implementation):
    """Of other names, and parameters: in every argument."""
    expected = F(Q, K, V, mask=LOWER, bias=LOWER, implementation=implementation)
    for of in (torch.nn.Parameter, torch.nn.Buffer, lambda x: x.as_subclass(Plain)):
        found = F(of(Q), of(K), of(V), mask=of(LOWER), bias=of(LOWER), implementation=implementation)
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


# --- dtypes ---


@everywhere
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_unsigned_lengths_and_ids(implementation, dtype):
    """PyTorch promotes those of more than 8 bits with no other dtype."""
    lengths, ids = np.array([3, 5], dtype), (np.arange(6) // 2).astype(dtype)
    shown = torch.arange(6) < torch.tensor([3, 5])[:, None, None, None]
    same = torch.arange(4)[:, None] // 2 == torch.arange(6) // 2
    for put in (torch.tensor, lambda x: x):
        found = F(Q, K, V, mask=masks.LengthMask(put(lengths)), implementation=implementation)
        torch.testing.assert_close(found, F(Q, K, V, mask=shown))
        for other in (put(ids[:4]), torch.arange(4) // 2, np.arange(4) // 2):
            mask = masks.SegmentMask(other, put(ids))
            torch.testing.assert_close(F(Q, K, V, mask=mask, implementation=implementation), F(Q, K, V, mask=same))
    every = masks.LengthMask(torch.tensor(2**64 - 1, dtype=torch.uint64))
    torch.testing.assert_close(F(Q, K, V, mask=every, implementation=implementation), F(Q, K, V))


@pytest.mark.parametrize("implementation", ["exact", "tiled", "fused", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scalar_of_numpy_is_rounded_as_jax_does(implementation, dtype):
    """Neither are logits in float64 then, nor does fused refuse; a Python scalar takes the dtype of the call."""
    from flax import linen

    x = np.random.default_rng(0).standard_normal((1, 5, 2, 8)).astype("float32")
    for bias in (np.float64(0.3), np.array(0.3), 0.3):
        expected = linen.dot_product_attention(*(jnp.asarray(x, dtype),) * 3, bias=bias)
        y = torch.tensor(x).to(getattr(torch, dtype))
        if implementation == "fused" and dtype != "float32" and not isinstance(bias, float | np.floating):
            continue
        found = F(y, y, y, bias=bias, implementation=implementation)
        assert found.dtype == y.dtype
        np.testing.assert_allclose(
            found.float(), np.asarray(expected, "float32"), atol=1e-6 if dtype == "float32" else 0.02
        )
    double = torch.tensor(x, dtype=torch.float64)
    found = F(double, double, double, mask=LOWER[:1, :5] > 0, bias=np.float64(0.3), implementation="tiled")
    assert found.dtype == torch.float64


@pytest.mark.parametrize("implementation", ["exact", "tiled", "fused", None])
@pytest.mark.parametrize("bias", [-1e5, 1e5, np.float64(-1e5)], ids=str)
def test_scalars_under_another_default_dtype(implementation, bias):
    """PyTorch would make them tensors of that, and -1e5 is minus infinity in float16."""
    x, mask = torch.randn(1, 260, 1, 8, generator=G), torch.rand(1, 1, 260, 260, generator=G) > 0.3
    expected = F(x, x, x, bias=bias, mask=mask, implementation=implementation)
    torch.set_default_dtype(torch.float16)
    try:
        found = F(x, x, x, bias=bias, mask=mask, implementation=implementation)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)


def test_a_python_scalar_in_float64_is_not_rounded():
    x = torch.randn(1, 5, 2, 8, generator=G, dtype=torch.float64)
    mask = torch.eye(5) == 0
    fill = 0.1 + 2.0**-40
    expected = F(x, x, x, bias=torch.full((1, 1), fill, dtype=torch.float64), mask=mask, implementation="tiled")
    assert torch.equal(F(x, x, x, bias=fill, mask=mask, implementation="tiled"), expected)


# --- devices ---


class NoFloat64(TorchDispatchMode):
    """A device without float64, as MPS is: any such tensor raises."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.device.type == "meta" and x.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": np.tri(6)},
        {"bias": np.zeros((6, 6))},
        {"bias": np.float64(0.5)},
        {"bias": 0.5},
        {"is_causal": True},
    ],
    ids=str,
)
def test_a_device_without_float64(implementation, options):
    with NoFloat64():
        x = torch.zeros(1, 6, 4, 8, device="meta")
        output = F(x, x, x, implementation=implementation, **options)
        assert (output.dtype, output.shape) == (torch.float32, x.shape)
        assert aa.dot_product_attention_vjp(x, x, x, **options)[1](output)[0].shape == x.shape


def test_a_narrowed_mask_keeps_what_it_shows(monkeypatch):
    """Where float64 is not there, 1e-300 is still not zero."""
    from anyattention._src.registry import load

    tensor, mask = torch.tensor, np.where(np.tri(6) > 0, 1e-300, 0.0)

    def refuse(x, **how):
        if getattr(x, "dtype", None) == np.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor(x, **how)

    monkeypatch.setattr(torch, "tensor", refuse)
    found = load("torch").arrays.adopt(mask, Q)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy() != 0, mask != 0)


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_what_stands_on_another_device(implementation):
    """A 0-d tensor of the CPU meets tensors of any device in PyTorch; keys are wanted as words anyway."""
    x = torch.zeros(1, 6, 2, 4, device="meta")
    zero = torch.tensor(3)
    for options in (
        {"bias": zero * 0.5},
        {"mask": zero},
        {"mask": masks.LengthMask(zero)},
        {"mask": masks.LengthMask(3, zero) & masks.CausalMask()},
        {"dropout_rng": KEY, "dropout_rate": 0.1},
        {"dropout_rng": aa.random.key(3), "dropout_rate": 0.1, "broadcast_dropout": False},
        {"dropout_rng": jax.random.key(3), "dropout_rate": 0.1},
    ):
        output = F(x, x, x, implementation=implementation, **options)
        assert (output.device.type, output.shape) == ("meta", x.shape)
    with torch.device("meta"):  # as models are built; the key's words are wanted all the same
        assert torch.equal(
            F(Q, K, V, dropout_rng=aa.random.key(3), dropout_rate=0.5),
            F(Q, K, V, dropout_rng=torch.tensor([0, 3], device="cpu"), dropout_rate=0.5),
        )


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("rate", [torch.tensor(0.1), np.float32(0.1), jnp.float32(0.1)], ids=lambda x: type(x).__name__)
def test_a_rate_of_any_library(implementation, rate):
    expected = F(Q, K, V, dropout_rng=KEY, dropout_rate=np.float32(0.1), implementation=implementation)
    found = F(Q, K, V, dropout_rng=KEY, dropout_rate=rate, implementation=implementation)
    torch.testing.assert_close(found, expected)
