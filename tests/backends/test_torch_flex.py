"""FlexAttention as an engine: on CPU forward and step by step; its gradients and its program by a stand-in."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import AuxOutput

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask
from anyattention_backends.torch import backend, flex_program
from anyattention_backends.torch.arrays import TorchArrays
from anyattention_backends.torch.flex import Flex

pytestmark = [  # PyTorch's own
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
]
fused = partial(aa.dot_product_attention, implementation="fused")
tiled = partial(aa.dot_product_attention, implementation="tiled")


@pytest.fixture
def on_cpu(monkeypatch):
    """The engine alone, on CPU, with all logits."""
    engine = Flex()
    vars(engine).update(platforms=("cpu",), compiled=False)
    monkeypatch.setattr(backend, "engines", (engine,))
    return engine


def arrays(batch=(3,), q_length=9, kv_length=7, heads=4, kv_heads=4, depth=16, v_depth=16, dtype=torch.float32):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shapes = (q_length, heads, depth), (kv_length, kv_heads, depth), (kv_length, kv_heads, v_depth)
    return [draw(*batch, *shape).to(dtype) for shape in shapes]


LENGTHS = torch.tensor([7, 0, 3])
OFFSETS = torch.tensor([4, -3, 2**33])
ROWS = torch.tensor([2, 9, 0])
KEYS = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5, 6]])
EARLY = torch.nn.functional.pad(KEYS, (0, 2), value=9)
LATE = torch.nn.functional.pad(KEYS, (2, 0), value=9)
MASKS = {
    "none": None,
    "causal": CausalMask(),
    "later": CausalMask(3),
    "earlier": CausalMask(-2),
    "far": CausalMask(2**40),
    "never": CausalMask(-(2**40)),
    "window": LocalMask(3, 2),
    "window past the keys": LocalMask(1, 0),
    "window ahead": LocalMask(-2, 4),
    "empty window": LocalMask(-2, 1),
    "windows": CausalMask(1) & LocalMask(4, 2),
    "an offset that is a tensor": CausalMask(torch.tensor(3, dtype=torch.uint8)),
    "offsets": CausalMask(OFFSETS),
    "one offset, far": LocalMask(2**40, 1, torch.tensor(2**35)),
    "windows of offsets": LocalMask(3, -1, OFFSETS.numpy()) & CausalMask(torch.tensor(4)) & LocalMask(5, 5),
    "lengths": LengthMask(LENGTHS),
    "one length": LengthMask(torch.tensor(4)),
    "lengths of NumPy": LengthMask(LENGTHS.numpy().astype(np.uint8)),
    "both lengths": LengthMask(LENGTHS, ROWS),
    "causal lengths": LengthMask(LENGTHS, ROWS) & CausalMask(-1),
    "window and lengths": LengthMask(LENGTHS) & LocalMask(2, 0),
    "segments": SegmentMask(EARLY, KEYS),
    "one row of segments": SegmentMask(EARLY[0], KEYS[0]),
    "causal segments": SegmentMask(LATE, KEYS) & CausalMask(),
    "everything": SegmentMask(LATE, KEYS) & LocalMask(3, 1) & LengthMask(LENGTHS, ROWS),
    "everything, moved": SegmentMask(LATE, KEYS) & LocalMask(3, 1, OFFSETS) & LengthMask(LENGTHS, ROWS),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_tiled(on_cpu, name):
    """Rows without a key too: there are some in most of them."""
    for changes in ({}, {"kv_heads": 2, "v_depth": 24}):
        args = arrays(**changes)
        torch.testing.assert_close(fused(*args, mask=MASKS[name]), tiled(*args, mask=MASKS[name]), rtol=1e-5, atol=1e-6)


WORDS = {
    "scale": {"scale": 0.3},
    "soft cap": {"logits_soft_cap": 1.5},
    "both": {"scale": -0.7, "logits_soft_cap": 2.0},
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_scale_and_soft_cap(on_cpu, words):
    for name in ("none", "everything"):
        args, mask = arrays(kv_heads=2), MASKS[name]
        torch.testing.assert_close(
            fused(*args, mask=mask, **words), tiled(*args, mask=mask, **words), rtol=1e-5, atol=1e-6
        )


def test_other_batches_and_more_than_a_block(on_cpu):
    for args, mask in (
        (arrays(()), CausalMask()),
        (arrays((2, 3)), LengthMask(LENGTHS, torch.tensor([[9], [4]])) & CausalMask(2)),
        (arrays((2,), 300, 200), SegmentMask(torch.arange(300) // 70, torch.arange(200) // 70) & LocalMask(90, 5)),
    ):
        torch.testing.assert_close(fused(*args, mask=mask), tiled(*args, mask=mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(on_cpu, dtype):
    args = arrays(dtype=dtype)
    output = fused(*args, mask=MASKS["both lengths"])
    assert output.dtype == dtype
    expected = aa.dot_product_attention(*[x.double() for x in args], mask=MASKS["both lengths"])
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_wrong_shapes_are_shape_errors(on_cpu):
    for mask in (LengthMask(torch.tensor([1, 2])), SegmentMask(KEYS, KEYS)):
        with pytest.raises(aa.ShapeError):
            fused(*arrays(), mask=mask)


# --- what CPU lacks: gradients, and the compiled program ---


def kernel(query, key, value, block_mask, enable_gqa, return_aux, score_mod=None):
    """What FlexAttention computes: zero where no key is seen, and minus infinity as the logarithm of the sum."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if score_mod is not None:
        b, h, i, j = (torch.arange(size) for size in logits.shape)
        logits = score_mod(logits, b[:, None, None, None], h[:, None, None], i[:, None], j)
    logits = torch.where(block_mask, logits, -torch.inf)
    seen = (logits > -torch.inf).any(-1, keepdim=True)
    weights = torch.where(seen, torch.softmax(torch.where(seen, logits, 0.0), -1), 0.0)
    return weights @ value, AuxOutput(lse=torch.logsumexp(logits, -1))


def dense(visible, batch, heads, q_length, kv_length, device):
    b, i, j = (torch.arange(size, device=device) for size in (batch, q_length, kv_length))
    return visible(b[:, None, None, None], None, i[:, None], j)


@pytest.fixture
def compiled(on_cpu, monkeypatch):
    """The engine with the kernel written out, compiled."""
    monkeypatch.setattr(flex, "flex_attention", kernel)
    monkeypatch.setattr(flex, "create_block_mask", dense)
    on_cpu.compiled = True
    flex_program._compiled.cache_clear()
    torch._dynamo.reset()
    yield on_cpu
    flex_program._compiled.cache_clear()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["step by step", "compiled"])
def stand_in(request, compiled):
    compiled.compiled = request.param
    return compiled


def with_gradients(function, args, mask):
    args = [x.requires_grad_() for x in args]
    output = function(*args, mask=mask)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    first, again = (torch.autograd.grad(output, args, cotangent, retain_graph=retain) for retain in (True, False))
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-6)
    return output.detach(), *again


@pytest.mark.parametrize("name", ["lengths", "everything"])
def test_gradients(stand_in, name):
    """And twice from one graph."""
    for changes in ({}, {"q_length": 9, "batch": (1, 3), "kv_heads": 2, "v_depth": 24}):
        answers = (with_gradients(function, arrays(**changes), MASKS[name]) for function in (fused, tiled))
        torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_gradients_of_scale_and_soft_cap(stand_in, words):
    answers = (with_gradients(partial(f, **words), arrays(), MASKS["lengths"]) for f in (fused, tiled))
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_those_of_tiled(stand_in):
    def second(function):
        query, key, value = arrays()
        query.requires_grad_()
        (first,) = torch.autograd.grad(
            function(query, key, value, mask=MASKS["lengths"]).sum(), query, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), query)[0]

    torch.testing.assert_close(second(fused), second(tiled), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_one_program_for_all_bands_and_lengths(compiled):
    """Offsets are no constants of the program, and lengths become symbols: PyTorch compiles it eight times at most."""
    for n in range(3, 20):
        args, mask = arrays(q_length=n, kv_length=n + 1), LocalMask(n // 2, n % 3)
        torch.testing.assert_close(fused(*args, mask=mask), tiled(*args, mask=mask), rtol=1e-5, atol=1e-6)


def test_each_kind_of_call_has_a_program_of_its_own(compiled, monkeypatch):
    """PyTorch compiles one code eight times, and raises at the ninth; numbers are no constants of a program."""
    graphs = []
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph)
    )
    words = {"sinks": torch.ones(4), "logits_soft_cap": 1.5, "scale": 0.3, "bias": torch.ones(9, 7)}
    words |= {"dropout_rng": aa.random.key(1), "dropout_rate": 0.3}
    kinds = [{name: words[name]} for name in words if "dropout" not in name]
    kinds = [*kinds, words, words | {"broadcast_dropout": False}, {"bias": torch.ones(7)}, {}]
    for options in kinds:
        for mask in (None, MASKS["lengths"]):
            args = arrays(kv_heads=2)
            output, right = fused(*args, mask=mask, **options), tiled(*args, mask=mask, **options)
            torch.testing.assert_close(output, right, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2 * len(kinds)
    other = {"scale": 0.6, "logits_soft_cap": 0.7, "dropout_rate": 0.2}
    torch.testing.assert_close(fused(*args, **words | other), tiled(*args, **words | other), rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2 * len(kinds)


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_compiles_within_another_program_in_one_graph(on_cpu, name):
    args = arrays(kv_heads=2)
    compiled = torch.compile(lambda *args: fused(*args, mask=MASKS[name]), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), tiled(*args, mask=MASKS[name]), rtol=1e-5, atol=1e-6)


def test_an_error_names_the_engine(on_cpu, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(flex, "flex_attention", broken)
    with pytest.raises(RuntimeError, match="kernel image") as error:
        fused(*arrays())
    assert any("ANYATTENTION_ENGINES=-flex" in note for note in error.value.__notes__)


REASONS = {
    "a wide bias": ({"bias": torch.zeros(9, 7, dtype=torch.float64)}, "the bias makes logits float64"),
    "wide sinks": ({"sinks": torch.zeros(4, dtype=torch.float64)}, "the sinks make logits float64"),
    "an array": ({"mask": torch.ones(9, 7)}, "no band, lengths and segments"),
    "an array beside a rule": ({"mask": CausalMask() & torch.ones(9, 7)}, "no band, lengths and segments"),
    "another combination": ({"mask": ~CausalMask()}, "no band, lengths and segments"),
    "float64": ({"dtype": torch.float64}, "no kernel for float64"),
    "a float32 softmax": ({"force_fp32_for_softmax": True, "dtype": torch.bfloat16}, "returns float32"),
}


@pytest.mark.parametrize(("options", "reason"), REASONS.values(), ids=REASONS)
def test_refuses_with_the_reason(on_cpu, options, reason):
    with pytest.raises(NotImplementedError, match="cannot serve this call: flex: .*" + reason):
        fused(*arrays(), **options)


def test_refuses_depths_and_coarse_products(on_cpu, monkeypatch):
    for sizes in ({"depth": 8}, {"v_depth": 8}, {"depth": 257}, {"kv_length": 0}):
        with pytest.raises(NotImplementedError, match=r"depths are not from 16 to 256|empty"):
            fused(*arrays(**sizes))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with pytest.raises(NotImplementedError, match="TF32"):
        fused(*arrays())
    fused(*arrays(dtype=torch.bfloat16))


def test_it_comes_after_sdpa_and_on_cuda_alone(monkeypatch):
    assert [engine.name for engine in backend.engines] == ["sdpa", "flex"]
    with pytest.raises(NotImplementedError, match="flex: it runs on cuda, not on cpu"):
        fused(*arrays(), mask=CausalMask(1))
    monkeypatch.setattr(TorchArrays, "platform", lambda self, x: "cuda")
    large = arrays(q_length=128, kv_length=64, dtype=torch.bfloat16)
    assert aa.explain(*large, implementation="fused").engine == "sdpa"
    assert aa.explain(*large, mask=CausalMask(1), implementation="fused").engine == "flex"
    assert aa.explain(*large, mask=~CausalMask(1), implementation="fused").engine == "sdpa"
    assert aa.explain(*large, mask=CausalMask(1)).engine == "sdpa"  # None takes what has run on a device
    with aa.config(engines=["flex"]):
        assert aa.explain(*large, mask=CausalMask(1)).engine == "flex"
