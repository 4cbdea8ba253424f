"""Programs of PyTorch that are made once and run at many lengths: compiled, exported, traced, or sent to ONNX."""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import anyattention as aa
from anyattention import masks

F = aa.dot_product_attention
G = torch.Generator().manual_seed(0)
LENGTH = 300  # above which None no longer takes exact
X, LONGER = torch.randn(1, LENGTH, 2, 8, generator=G), torch.randn(1, 700, 2, 8, generator=G)  # more than a tile
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"mask": masks.LocalMask(8, 0)},
    "lengths": {"mask": masks.LengthMask(torch.tensor([200]))},
    "low bias": {"bias": torch.full((1, 1), -1e9)},
    "fully masked rows": {"mask": masks.CausalMask(-2)},
}
FUSED = {"plain", "causal", "lengths"}  # in a trace; of others it says why not
every = pytest.mark.parametrize(
    ("implementation", "call"),
    [(name, call) for name in (None, "exact", "tiled", "fused") for call in CALLS if name != "fused" or call in FUSED],
)
# Of the tracer itself: shapes are compared in Python.
traced = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")


class Attend(torch.nn.Module):
    def __init__(self, implementation, call):
        super().__init__()
        self.options = {"implementation": implementation, **CALLS[call]}

    def forward(self, x):
        return F(x, x, x, **self.options)


def close(found, x, call):
    torch.testing.assert_close(found, Attend("exact", call)(x), atol=5e-6, rtol=1e-5)


# --- torch.compile ---


def counting():
    """A backend of torch.compile, and how often it was asked for a program."""
    programs = []

    def compile(graph, inputs):
        programs.append(graph)
        return graph.forward

    return compile, programs


@every
@pytest.mark.parametrize("how", ["", "marked", "dynamic"])
def test_ten_lengths_are_two_programs(implementation, call, how):
    """Nothing in the code depends on the very number, be it for an error's text."""
    torch._dynamo.reset()
    backend, programs = counting()
    attend = Attend(implementation, call)
    compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=True if how == "dynamic" else None)
    for length in range(260, 350, 10):
        x = LONGER[:, :length].clone()
        if how == "marked":
            torch._dynamo.mark_dynamic(x, 1)
        close(compiled(x), x, call)
    assert len(programs) <= 2 - bool(how)


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
@pytest.mark.parametrize("mask", [masks.CausalMask, lambda i: masks.LocalMask(i, 1)], ids=["offset", "window"])
def test_offsets_that_change_with_each_step(implementation, mask):
    """As in decoding; made within the program and outside."""
    for given in (mask, lambda x: x):
        torch._dynamo.reset()
        backend, programs = counting()

        def call(x, y, given=given):
            return F(x, x, x, mask=given(y), implementation=implementation)

        compiled = torch.compile(call, fullgraph=True, backend=backend)
        for i in range(3, 13):
            expected = F(X, X, X, mask=mask(i), implementation="exact")
            torch.testing.assert_close(compiled(X, i if given is mask else mask(i)), expected)
        assert len(programs) <= 2


# --- exports and traces ---


@every
@pytest.mark.parametrize("strict", [False, True])
def test_export_at_any_length(implementation, call, strict):
    attend = Attend(implementation, call)
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=4096)}}
    program = torch.export.export(attend, (X,), dynamic_shapes=shapes, strict=strict).module()
    for x in (LONGER, LONGER[:, :7]):
        close(program(x), x, call)


@traced
@every
def test_jit_trace(implementation, call):
    """Neither values nor lengths of the example are in the program."""
    program = torch.jit.trace(Attend(implementation, call), (X,), check_trace=False)
    for x in (LONGER, -X):
        close(program(x), x, call)


@every
def test_make_fx_and_functionalize(implementation, call):
    attend = Attend(implementation, call)
    close(make_fx(attend)(X)(-X), -X, call)
    close(torch.func.functionalize(attend)(X), X, call)
    close(make_fx(torch.func.functionalize(attend))(X)(X / 2), X / 2, call)


@pytest.mark.parametrize("implementation", ["exact", "tiled", "fused", None])
def test_gradients_in_a_trace(implementation):
    def gradient(attend):
        return torch.func.grad(lambda x: attend(x).square().sum())

    found = make_fx(gradient(Attend(implementation, "causal")))(X)(X / 2)
    torch.testing.assert_close(found, gradient(Attend("exact", "causal"))(X / 2), atol=1e-5, rtol=1e-4)


def test_a_trace_does_not_look_at_values():
    """The bias of the example is high, and that of the call is not."""
    program = make_fx(lambda x, bias: F(x, x, x, bias=bias))(X, torch.zeros(1, 1))
    low = torch.full((1, 1), -1e9)
    torch.testing.assert_close(program(X, low), F(X, X, X, bias=low, implementation="exact"))


# --- ONNX ---


@traced
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("call", ["plain", "causal", "window", "lengths", "fully masked rows"])
def test_onnx(call):
    """None takes no operator that ONNX lacks."""
    x, file = torch.randn(1, 1024, 2, 8, generator=G), io.BytesIO()
    torch.onnx.export(Attend(None, call), (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, Attend("exact", call)(x), atol=1e-5)
    with pytest.raises(NotImplementedError, match="'tiled' cannot serve this call: ONNX lacks the operator"):
        torch.onnx.export(Attend("tiled", call), (x,), io.BytesIO(), dynamo=False)


DRAWN = np.random.default_rng(0)
ARRAYS = {
    "query": DRAWN.standard_normal((2, 40, 4, 8)),
    "key": DRAWN.standard_normal((2, 50, 2, 8)),
    "value": DRAWN.standard_normal((2, 50, 2, 5)),
    "bias": DRAWN.standard_normal((4, 1, 50)),
    "mask": DRAWN.random((2, 1, 40, 50)) > 0.4,
    "sinks": DRAWN.standard_normal(4),
    "lengths": np.array([30, 0]),
}
ARRAYS = {name: torch.asarray(x if x.dtype.kind in "bi" else x.astype("float32")) for name, x in ARRAYS.items()}
EVERY = {  # options of a call, of the arrays
    "heads": lambda given: {},
    "causal": lambda given: {"is_causal": True},
    "scale": lambda given: {"scale": 0.3},
    "soft cap": lambda given: {"logits_soft_cap": 1.5},
    "sinks": lambda given: {"sinks": given["sinks"]},
    "bias": lambda given: {"bias": given["bias"]},
    "mask": lambda given: {"mask": given["mask"]},
    "window": lambda given: {"mask": masks.LocalMask(3, 1)},
    "lengths": lambda given: {"mask": masks.LengthMask(given["lengths"])},
    "fully masked rows": lambda given: {"mask": masks.CausalMask(-2)},
    "all": lambda given: {
        **{"is_causal": True, "scale": 0.3, "logits_soft_cap": 1.5},
        **{name: given[name] for name in ("bias", "mask", "sinks")},
    },
}


class Every(torch.nn.Module):
    """All these calls in one program, since each export takes seconds."""

    def __init__(self, implementation):
        super().__init__()
        self.implementation = implementation

    def forward(self, query, key, value, bias, mask, sinks, lengths):
        given = {"bias": bias, "mask": mask, "sinks": sinks, "lengths": lengths}
        arrays = [query, key, value]
        found = [F(*arrays, implementation=self.implementation, **options(given)) for options in EVERY.values()]
        alone = [x[0] for x in (query[:, :, :2], key, value)]  # no grouped heads, no batch
        return (*found, F(*alone, implementation=self.implementation))


def cut(q_length, kv_length):
    """The arrays at other lengths."""
    sizes = {40: q_length, 50: kv_length}
    return {name: x[tuple(slice(sizes.get(size)) for size in x.shape)].clone() for name, x in ARRAYS.items()}


LENGTHS = {"q_length": torch.export.Dim("q_length", min=3), "kv_length": torch.export.Dim("kv_length", min=3)}
DYNAMIC = {
    name: {
        axis: LENGTHS[{40: "q_length", 50: "kv_length"}[size]] for axis, size in enumerate(x.shape) if size in (40, 50)
    }
    for name, x in ARRAYS.items()
}


def right(given):
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    return Every("exact")(**wide)


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_export_of_every_word(implementation):
    program = torch.export.export(Every(implementation), (), ARRAYS, dynamic_shapes=DYNAMIC).module()
    for given in (ARRAYS, cut(7, 9), cut(13, 5)):
        for found, wanted in zip(program(**given), right(given), strict=True):
            torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.needs("onnxscript")
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)  # PyTorch's and onnxscript's own
def test_onnx_of_every_word():
    """At any lengths, for which None is exact."""
    module = Every(None).eval()
    model = torch.onnx.export(module, kwargs=ARRAYS, dynamo=True, verbose=False, dynamic_shapes=DYNAMIC)
    check(model.model_proto.SerializeToString())


@traced
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_of_every_word_by_a_trace():
    """PyTorch's older way; None is exact there too."""
    axes = {name: {axis: str(dim) for axis, dim in dims.items()} for name, dims in DYNAMIC.items()}
    options, file = {"input_names": list(ARRAYS), "dynamic_axes": axes, "dynamo": False}, io.BytesIO()
    torch.onnx.export(Every(None).eval(), tuple(ARRAYS.values()), file, opset_version=18, **options)
    check(file.getvalue())


def check(model):
    """At the lengths of the example and others."""
    session = onnxruntime.InferenceSession(model)
    for given in (ARRAYS, cut(7, 9), cut(13, 5)):
        outputs = session.run(None, {x.name: given[x.name].numpy() for x in session.get_inputs()})
        for found, wanted in zip(outputs, right(given), strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=1e-5)
