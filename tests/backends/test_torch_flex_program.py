"""Soft cap, sinks, biases with a gradient, and dropout, by FlexAttention itself: on a CPU, with all logits."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as flex

import anyattention as aa
from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask
from anyattention_backends.torch import backend, flex_program
from anyattention_backends.torch.arrays import TorchArrays
from anyattention_backends.torch.flex import Flex
from anyattention_conformance import Golden, suite, targets

pytestmark = [  # PyTorch's own
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
]
fused = partial(aa.dot_product_attention, implementation="fused")


@pytest.fixture
def on_cpu(monkeypatch):
    """The engine alone, on CPU, with all logits and of any depth, and with the gradients that PyTorch keeps to GPUs."""
    engine = Flex()
    vars(engine).update(platforms=("cpu",), compiled=False, range_of_depths=(1, 256))
    monkeypatch.setattr(backend, "engines", (engine,))
    monkeypatch.setattr(flex, "_validate_device", lambda *arrays: None)
    return engine


# --- Flax's answers, as recorded ---

NAMES = ("bias-keys", "bias-scalar", "dropout", "dropout-2-batch-per-head", "lengths-33x47-dropout")


def test_the_cases(on_cpu):
    """Contract C3, of gradients too."""
    runs = [run for run in suite.runs("full") if run.case.id in NAMES and run.dtype in ("float32", "bfloat16")]
    target = targets.make(fused, "torch")
    report = suite.certify("fused", "torch", [(run, target.run(*run)) for run in runs], runs, oracle=Golden())
    assert [(x.case, x.dtype, x.quantity, x.message) for x in report.failures] == []
    assert {"dbias", "output", "dq"} <= {x.quantity for x in report.results}
    assert len(runs) == 2 * len(NAMES)


# --- the formula in float64 ---

HEADS, ROWS, COLUMNS = 4, 9, 7
KEYS = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5, 6]])
LENGTHS = LengthMask(torch.tensor([7, 0, 3]), torch.tensor([2, 9, 0]))
MASKS = {
    "none": None,
    "window past the keys": LocalMask(1, 0),
    "lengths": LENGTHS,
    "segments": SegmentMask(torch.nn.functional.pad(KEYS, (0, 2), value=9), KEYS) & CausalMask(),
}


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DROPOUT = {"dropout_rng": aa.random.key(3), "dropout_rate": 0.5}
CAP, SINKS, OWN_SINKS = {"logits_soft_cap": 1.5}, {"sinks": draw(1, HEADS)}, {"sinks": 3 * draw(2, 3, HEADS, ROWS)}
BIAS, OF_KEYS = {"bias": draw(3, HEADS, ROWS, COLUMNS)}, {"bias": draw(4, 3, 1, 1, COLUMNS)}
EACH = DROPOUT | {"broadcast_dropout": False}
ALL, ALL_OF_EACH = CAP | SINKS | BIAS | DROPOUT | {"scale": 0.4}, CAP | OWN_SINKS | OF_KEYS | EACH
WORDS = {
    "soft cap and sinks": (CAP | SINKS, "lengths"),
    "sinks of each query": (OWN_SINKS, "segments"),
    "bias": (BIAS, "window past the keys"),
    "bias of each key": (OF_KEYS, "none"),
    "dropout": (DROPOUT, "segments"),
    "dropout of each head": (EACH, "none"),
    "all": (ALL, "lengths"),
    "all of each": (ALL_OF_EACH, "window past the keys"),
}


def arrays(*batch, depth=16, v_depth=24, kv_heads=2):
    batch = batch or (3,)
    shapes = (ROWS, HEADS, depth), (COLUMNS, kv_heads, depth), (COLUMNS, kv_heads, v_depth)
    return [draw(seed, *batch, *shape) for seed, shape in enumerate(shapes, 5)]


def formula(query, key, value, mask=None, bias=None, sinks=None, scale=None, logits_soft_cap=None, **dropout):
    """Flax's attention written out, with the words of today's models, for grouped heads and one batch axis."""
    key, value = (x.repeat_interleave(HEADS // x.shape[-2], dim=-2) for x in (key, value))
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    logits = logits if bias is None else logits + bias
    if mask is not None:
        visible = torch.tensor(mask.to_array(ROWS, COLUMNS).tolist())
        logits = torch.where(visible, logits, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = (sinks[:, None] if sinks.ndim == 1 else sinks)[..., None]
        logits = torch.cat([logits, column.expand(*logits.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :COLUMNS]
    if dropout:
        shape = weights.shape if not dropout.get("broadcast_dropout", True) else (1, 1, *weights.shape[-2:])
        bits = jax.random.bernoulli(jax.random.wrap_key_data(dropout["dropout_rng"]), 0.5, tuple(shape))
        weights = weights * torch.as_tensor(np.array(bits)) / 0.5
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def with_gradients(function, given, words, dtype, **more):
    """The output, and the gradients of its sum of squares by query, key, value, bias and sinks."""
    names = [name for name in ("bias", "sinks") if name in words]
    leaves = [x.to(dtype).requires_grad_() for x in (*given, *(words[name] for name in names))]
    output = function(*leaves[:3], **more, **words | dict(zip(names, leaves[3:], strict=True)))
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize(("words", "mask"), WORDS.values(), ids=WORDS)
def test_the_formula(on_cpu, words, mask):
    """Rows without a key too, which are zero beside sinks; and rows that dropout leaves nothing."""
    found = with_gradients(fused, arrays(), words, torch.float32, mask=MASKS[mask])
    right = with_gradients(formula, arrays(), words, torch.float64, mask=MASKS[mask])
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=3e-6 * max(1.0, y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(on_cpu, dtype):
    """Sinks and biases in 16 bits and in 32."""
    given = [x.to(dtype) for x in arrays()]
    for wide in (dtype, torch.float32):
        words = {key: x.to(wide) if isinstance(x, torch.Tensor) else x for key, x in ALL.items()}
        output = fused(*given, mask=LENGTHS, **words)
        assert output.dtype == dtype
        right = formula(
            *[x.double() for x in given],
            mask=LENGTHS,
            **{key: x.double() if isinstance(x, torch.Tensor) else x for key, x in words.items()},
        )
        torch.testing.assert_close(output.double(), right, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_several_batch_axes(on_cpu):
    words = ALL_OF_EACH | {"bias": draw(1, 3, 1, 1, 1, COLUMNS), "sinks": draw(2, 2, HEADS, ROWS)}
    found = fused(*arrays(3, 2), **words)
    wide = {"bias": words["bias"].expand(3, 2, 1, 1, COLUMNS), "sinks": words["sinks"].expand(3, 2, HEADS, ROWS)}
    flat = [x.reshape(6, *x.shape[2:]).double() for x in (*arrays(3, 2), *wide.values())]
    right = formula(*flat[:3], **words | {"bias": flat[3], "sinks": flat[4]})
    torch.testing.assert_close(found.reshape(right.shape).double(), right, rtol=0, atol=3e-6)


@pytest.mark.parametrize("sink", [-np.inf, float(np.finfo(np.float32).min), 1e30])
def test_sinks_from_nothing_to_everything(on_cpu, sink):
    """Beside fully masked rows, whose logits are finfo.min, one of the same weighs as one key."""
    words = {"sinks": torch.full((HEADS,), sink)}
    found = with_gradients(fused, arrays(), words, torch.float32, mask=LENGTHS)
    right = with_gradients(formula, arrays(), words, torch.float64, mask=LENGTHS)
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=3e-6 * max(1.0, y.abs().max()))


def test_low_biases_are_left_to_tiled(on_cpu):
    """In a row whose biases are all low, lse has lost the sum, and a gradient would be off by a number of keys."""
    bias = torch.zeros(ROWS, COLUMNS)
    bias[3] = torch.finfo(torch.float32).min
    for words in ({"bias": bias}, {"bias": bias} | DROPOUT):
        found = with_gradients(fused, arrays(), words, torch.float32)
        for x, y in zip(found, with_gradients(formula, arrays(), words, torch.float64), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=0, atol=3e-6 * max(1.0, y.abs().max()))


def test_hidden_nan(on_cpu):
    """It does not show, but in the mean of all values, which fully masked rows get, as Flax's do."""
    query, key, value = arrays()
    key[:, 6], value[:, 6] = torch.nan, torch.nan
    mask = LengthMask(torch.tensor([5, 0, 3]))
    for words in (DROPOUT, BIAS):
        output = fused(query, key, value, mask=mask, **words)
        assert output[[0, 2]].isfinite().all()
        assert output[1].isnan().all()


def test_values_of_fully_masked_rows_have_a_gradient_of_16_bits(on_cpu):
    """Each row has the mean of what is kept: in a closed form, within four roundings of the largest."""
    query, key, value, doutput = (draw(seed, 1, 128, 1, 16).bfloat16().requires_grad_() for seed in range(4))
    output = fused(query, key, value, mask=LengthMask(torch.tensor([0])), **DROPOUT)
    (dvalue,) = torch.autograd.grad(output, value, doutput)
    keep = torch.as_tensor(np.array(aa.random.bernoulli(DROPOUT["dropout_rng"], 0.5, (128, 128))), dtype=torch.float64)
    right = torch.einsum("qk,bqhd->bkhd", keep / 64, doutput.double())
    torch.testing.assert_close(dvalue.double(), right, rtol=0, atol=2.0**-6 * right.abs().max().item())


# --- keep bits ---


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("key", [aa.random.key(5), torch.tensor([0, 5])], ids=["numpy", "torch"])
def test_the_bits_are_those_of_jax(on_cpu, monkeypatch, broadcast, key):
    """One array for all heads where Flax has one; some rows at a time."""
    given = []
    monkeypatch.setattr(flex_program, "_AT_ONCE", 100)
    monkeypatch.setattr(flex_program, "_program", lambda *x: given.append(flex_program.Given(*x)) or x[0])
    fused(*arrays(3, 2), dropout_rng=key, dropout_rate=0.3, broadcast_dropout=broadcast)
    shape = (1, 1, 1, ROWS, COLUMNS) if broadcast else (3, 2, HEADS, ROWS, COLUMNS)
    right = jax.random.bernoulli(jax.random.key(5), np.float32(0.7), shape)
    np.testing.assert_array_equal(given[0].keep, np.reshape(right, (-1, *shape[-3:])))
    assert given[0].keep.shape == ((1, 1, ROWS, COLUMNS) if broadcast else (6, HEADS, ROWS, COLUMNS))


def test_too_many_bits_are_refused(on_cpu):
    on_cpu.most_elements = ROWS * COLUMNS
    fused(*arrays(), **DROPOUT)
    with pytest.raises(NotImplementedError, match="flex: the keep bits of its dropout would be an array of 756 elem"):
        fused(*arrays(), **DROPOUT, broadcast_dropout=False)


def test_a_bias_stays_as_small_as_it_is(on_cpu, monkeypatch):
    given = []
    monkeypatch.setattr(flex_program, "_program", lambda *x: given.append(flex_program.Given(*x)) or x[0])
    for shape in ((1, 4, 1, 7), (7,), (), (4, 9, 1), (3, 1, 9, 7)):
        fused(*arrays(), bias=torch.zeros(shape))
    assert [tuple(x.bias.shape) for x in given] == [(1, 4, 1, 7), (7,), (1,) * 4, (4, 9, 1), (3, 1, 9, 7)]


# --- other derivatives, and programs ---


def test_second_derivatives_by_every_operand(on_cpu):
    def second(function, dtype):
        names, words = ("bias", "sinks"), ALL
        leaves = [x.to(dtype).requires_grad_() for x in (*arrays(), *(words[name] for name in names))]
        output = function(*leaves[:3], **words | dict(zip(names, leaves[3:], strict=True)), mask=LENGTHS)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    for x, y in zip(second(fused, torch.float32), second(formula, torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-4 * max(1.0, y.abs().max()))


def test_torch_func_is_refused(on_cpu):
    query, key, value = arrays()
    with pytest.raises(NotImplementedError, match=r"flex: .*it has no derivative within torch\.func"):
        torch.func.grad(lambda x: fused(query, key, value, bias=x).sum())(draw(0, ROWS, COLUMNS))


@pytest.mark.parametrize(("words", "mask"), [(BIAS, "none"), (ALL, "lengths")], ids=["bias", "all"])
def test_a_compiled_program_has_the_gradients(on_cpu, monkeypatch, words, mask):
    """As PyTorch's compiler traces them; for a GPU it goes on to make one kernel of each call."""
    flex_program._compiled.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    on_cpu.compiled = True
    found = with_gradients(fused, arrays(), words, torch.float32, mask=MASKS[mask])
    right = with_gradients(formula, arrays(), words, torch.float64, mask=MASKS[mask])
    if words is BIAS:  # of several batch axes, which become one
        words = {"bias": draw(1, 3, 2, 1, 1, COLUMNS)}
        found += with_gradients(fused, arrays(3, 2), words, torch.float32)
        flat = [x.reshape(6, *x.shape[2:]) for x in (*arrays(3, 2), words["bias"])]
        right += with_gradients(formula, flat[:3], {"bias": flat[3]}, torch.float64)
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x.reshape(y.shape).double(), y, rtol=0, atol=3e-6 * max(1.0, y.abs().max()))
    flex_program._compiled.cache_clear()


def test_within_another_program(on_cpu):
    """Dropout and sinks are in its graph; a bias is refused there, since nothing can look at it."""
    torch._dynamo.reset()
    words, key = EACH | CAP, torch.tensor([0, 3])
    call = lambda *x: fused(*x[:3], sinks=x[3], **words | {"dropout_rng": x[4]}, mask=LENGTHS)  # noqa: E731
    given = *arrays(), draw(1, HEADS), key
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), call(*given), rtol=1e-5, atol=1e-6)
    with pytest.raises(Exception, match="bias cannot be inspected"):
        torch.compile(fused, fullgraph=True, backend="eager")(*arrays(), draw(0, COLUMNS))


# --- the choice ---


def test_by_name_and_after_what_ran_on_a_device(monkeypatch):
    monkeypatch.setattr(TorchArrays, "platform", lambda self, x: "cuda")
    large = [torch.zeros(2, 128, 4, 64, dtype=torch.bfloat16)] * 3
    bias = torch.zeros(128, 128, dtype=torch.bfloat16)
    learned = bias.clone().requires_grad_()
    calls = {
        "sdpa": [{"bias": bias}, {"bias": bias, "mask": CausalMask()}],
        "flex": [{"bias": learned}, DROPOUT, {"sinks": torch.zeros(4)}, {"logits_soft_cap": 2.0}],
    }
    for engine, options in calls.items():
        for words in options:
            assert aa.explain(*large, **words, implementation="fused").engine == engine
            assert aa.explain(*large, **words).engine != "flex"
            with aa.config(engines=["flex"]):
                assert aa.explain(*large, **words).engine == "flex"
    with pytest.raises(NotImplementedError, match="sdpa: it has no dropout of Flax's bits; flex: it has no deriv"):
        torch.func.grad(lambda x: fused(x, *large[1:], **DROPOUT).sum())(large[0])
