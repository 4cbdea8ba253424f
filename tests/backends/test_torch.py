"""PyTorch's transforms, compilers and settings around the public function."""

import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen
from torch._subclasses.fake_tensor import FakeTensorMode

import anyattention as aa
from anyattention import masks
from anyattention._src.registry import backend_of
from anyattention_conformance import Case, flax_attention, within_c2, within_c3

F = aa.dot_product_attention
Q = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(0))

# PyTorch's own: it compiles a helper with what it has deprecated.
from_torch_itself = pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")


# --- compilers ---


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_without_graph_breaks(dtype, dynamic):
    key, x = torch.tensor([0, 0]), Q.to(dtype)

    def call(x):
        return F(x, x, x, mask=torch.ones(5, 5).tril(), dropout_rng=key, dropout_rate=0.1, is_causal=True)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)(x), call(x))


def run_afresh(code, *args, timeout):
    """Run code in a new interpreter, where nothing has been used before."""
    code = "import warnings; warnings.simplefilter('ignore')\n" + code
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=timeout)
    assert not done.returncode, done.stderr[-2000:]


GUESTS = """
import numpy as np, torch
from anyattention import dot_product_attention as f, random

x, key, mask = torch.ones(2, 5, 4, 8), random.key(3), np.tri(5)
calls = (
    lambda x, key, mask: f(x, x, x, mask=mask, bias=mask, dropout_rng=key, dropout_rate=0.5),
    lambda x, key, mask: f(x, x, x, mask=np.tri(5), dropout_rng=random.key(3), dropout_rate=0.5),
)
compiled = [torch.compile(call, fullgraph=True, backend="eager")(x, key, mask) for call in calls]
assert all(torch.equal(y, call(x, key, mask)) for y, call in zip(compiled, calls))
"""


def test_numpy_guests_do_not_break_the_graph():
    """Not even where NumPy's backend was never in use before the first trace."""
    run_afresh(GUESTS, timeout=120)


INDUCTOR = """
import sys, numpy as np, torch
from anyattention import dot_product_attention as f

arguments = {name: torch.tensor(x) for name, x in np.load(sys.argv[1]).items()}
call = torch.compile(lambda given: f(**given, dropout_rng=torch.tensor([0, 7]), dropout_rate=0.5), fullgraph=True)
np.save(sys.argv[2], call(arguments).numpy())
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
def test_inductor(tmp_path):
    """Twenty rounds of threefry do not become one expression, which would never be done compiling."""
    arguments = Case("inductor", mask=(2, 1, 3, 5), bias=(1, 2, 3, 5), dropout=0.5).inputs()
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray) and name != "dropout_rng"}
    np.savez(tmp_path / "given.npz", **arrays)
    run_afresh(INDUCTOR, str(tmp_path / "given.npz"), str(tmp_path / "result.npy"), timeout=240)
    assert not within_c2(np.load(tmp_path / "result.npy"), flax_attention(**arguments), arguments, "float32")


def test_export_with_a_symbolic_length():
    class Model(torch.nn.Module):
        def forward(self, x):
            return F(x, x, x, is_causal=True)

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Model(), (Q,), dynamic_shapes={"x": {1: length}})
    x = torch.cat([Q, Q], dim=1)
    assert torch.equal(program.module()(x), F(x, x, x, is_causal=True, implementation="exact"))


# --- tensors without data ---

EVERYTHING = {"mask": np.tri(5), "dropout_rng": aa.random.key(0), "dropout_rate": 0.1, "broadcast_dropout": False}


def test_meta_tensors():
    x = Q.to("meta")
    assert F(x, x, x).device.type == "meta"


def test_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 5, 4, 8, dtype=torch.bfloat16)
        y = F(x, x, x, torch.ones(4, 1, 1), **EVERYTHING)
    assert (type(y).__name__, y.shape, y.dtype) == ("FakeTensor", x.shape, x.dtype)


# --- settings ---


def test_autocast_does_not_reach_inside():
    expected = F(Q, Q, Q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (Q[0, 0] @ Q[0, 0].T).dtype is torch.bfloat16
        actual = F(Q, Q, Q)
    assert actual.dtype is torch.float32
    assert torch.equal(actual, expected)


def test_default_dtype_does_not_matter():
    expected, bias = F(Q, Q, Q, 0.1, **EVERYTHING), np.ones(5)
    wide = F(Q, Q, Q, bias)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(F(Q, Q, Q, 0.1, **EVERYTHING), expected)
        assert torch.equal(F(Q, Q, Q, bias), wide)
    finally:
        torch.set_default_dtype(torch.float32)


def test_inference_mode_and_parameters():
    with torch.inference_mode():
        assert F(Q, Q, Q).is_inference()
    assert torch.equal(F(torch.nn.Parameter(Q), Q, Q).detach(), F(Q, Q, Q))


# --- NumPy guests ---


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("change", [frozen, np.asfortranarray, lambda x: x[::-1].copy()[::-1], lambda x: x[..., 0]],
                         ids=["read-only", "Fortran", "backwards", "strided"])  # fmt: skip
def test_layouts_of_guests(change):
    x = change(np.random.default_rng(0).standard_normal((5, 5, 2)))
    x = x if x.ndim == 2 else x[..., 0]
    expected = F(Q, Q, Q, torch.tensor(x.copy()), torch.tensor(x > 0))
    assert torch.equal(F(Q, Q, Q, x, x > 0), expected)


@pytest.mark.parametrize("dtype", ["object", "U1", ">f4", "float8_e5m2"])
def test_guests_that_are_no_numbers(dtype):
    x = np.ones((5, 5), np.float32).astype(jnp.dtype(dtype) if "float8" in dtype else dtype)
    for name in ("bias", "mask"):
        with pytest.raises(TypeError):
            F(Q, Q, Q, **{name: x})


# --- derivatives and vmap ---


def test_compiled_programs_follow_the_settings():
    """A setting is compiled once, and what ran is what was asked for; what cannot be served raises."""
    ran = []

    def backend(module, inputs):
        name = "fused" if "scaled_dot" in module.code else "tiled" if "attend_by_tiles" in module.code else "exact"

        def run(*arrays):
            ran.append(name)
            return module(*arrays)

        programs.append(name)
        return run

    programs = []
    x = torch.randn(1, 12, 2, 8, generator=torch.Generator().manual_seed(0))
    F(x, x, x)  # the first call of all finds the library
    compiled = torch.compile(lambda x: F(x, x, x), fullgraph=True, backend=backend)
    asked = [None, "tiled", "exact", "tiled", None, "fused", "exact"]
    for implementation in asked:
        with aa.config(implementation=implementation):
            torch.testing.assert_close(compiled(x), F(x, x, x, implementation="exact"))
    assert ran == [name or "fused" for name in asked]
    assert sorted(programs) == ["exact", "fused", "fused", "tiled"]  # one for each setting
    with aa.config(engines=[], implementation="fused"), pytest.raises(Exception, match="cannot serve this call"):
        compiled(x)


@pytest.mark.parametrize("implementation", ["exact", "tiled", "fused", None])
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_vmap_over_the_mask_or_the_bias_alone(name, implementation):
    """Item by item, forward and by what is not mapped; fused has no rule for it."""
    x = torch.randn(3, 1, 1, 5, generator=torch.Generator().manual_seed(1))
    x = x > 0 if name == "mask" else x

    def call(query, part):
        return F(query, Q, Q, **{name: part}, implementation=implementation)

    if implementation == "fused":
        with pytest.raises(NotImplementedError):
            torch.func.vmap(call, (None, 0))(Q, x)
        return
    mapped = torch.func.vmap(call, (None, 0))(Q, x)
    torch.testing.assert_close(mapped, torch.stack([F(Q, Q, Q, **{name: part}, implementation="exact") for part in x]))
    gradient = torch.func.grad(lambda query: torch.func.vmap(call, (None, 0))(query, x).sin().sum())(Q)
    query = Q.detach().clone().requires_grad_()
    torch.stack([F(query, Q, Q, **{name: part}, implementation="exact") for part in x]).sin().sum().backward()
    torch.testing.assert_close(gradient, query.grad, rtol=1e-4, atol=1e-5)


def test_vmap():
    assert torch.equal(torch.func.vmap(F)(Q, Q, Q), F(Q, Q, Q))
    keys, masks = torch.tensor([[0, 1], [0, 2]]), torch.arange(50).reshape(2, 5, 5) % 3
    mapped = torch.func.vmap(lambda key, mask: F(Q, Q, Q, mask=mask, dropout_rng=key, dropout_rate=0.5))(keys, masks)
    for y, key, mask in zip(mapped, keys, masks, strict=True):
        assert torch.equal(y, F(Q, Q, Q, mask=mask, dropout_rng=key, dropout_rate=0.5))
    mapped = torch.func.vmap(torch.func.grad(lambda q, k: F(q, k, k).square().sum()), in_dims=(0, None))(Q, Q[0])
    for gradient, q in zip(mapped, Q, strict=True):
        q = q.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F(q, Q[0], Q[0]).square().sum(), q)
        assert not within_c3(*(x.numpy() for x in (gradient, expected, expected.double(), expected.abs())), "float32")


@from_torch_itself
def test_forward_and_second_derivatives():
    """Of a call with a hidden row, with bias and mask; C3 against Flax's."""
    q, k, v, t = np.random.default_rng(3).standard_normal((4, 3, 1, 2), dtype=np.float32)
    bias, mask = np.arange(9, dtype=np.float32).reshape(3, 3) / 8, np.tri(3, k=-1)

    def flax(dtype):
        q_, k_, v_, t_, bias_ = (jnp.asarray(x, dtype) for x in (q, k, v, t, bias))

        def function(q):
            return linen.dot_product_attention(q, k_, v_, bias_, mask)

        forward = jax.jit(lambda q: jax.jvp(function, (q,), (t_,))[1])(q_)
        return [np.asarray(x) for x in (forward, jax.jit(jax.hessian(lambda q: function(q).sum()))(q_))]

    def ours(q):
        return F(q, *map(torch.tensor, (k, v, bias, mask)))

    forward = torch.func.jvp(ours, (torch.tensor(q),), (torch.tensor(t),))[1]
    actual = forward, torch.func.hessian(lambda q: ours(q).sum())(torch.tensor(q))
    with jax.enable_x64(True):
        truth = flax(np.float64)
    for x, expected, right in zip(actual, flax(np.float32), truth, strict=True):
        assert not within_c3(x.numpy(), expected, right, np.full_like(right, np.abs(right).max()), "float32")


@from_torch_itself
def test_derivatives_in_float64_are_those_of_differences():
    q, bias = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((3, 2, 2), (2, 3, 3)))
    mask = torch.ones(3, 3).tril(-1)

    def function(q, bias):
        return F(q, q, q, bias, mask, dropout_rng=aa.random.key(1), dropout_rate=0.2)

    assert torch.autograd.gradcheck(function, (q, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (q, bias))


# --- tiled: one step of autograd, one operator of a compiler ---

MASK = torch.rand(2, 1, 70, 90, generator=torch.Generator().manual_seed(0)) > 0.3
MASK[0, 0, 4] = False
TILED = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask-and-bias": {"mask": MASK, "bias": torch.linspace(-1, 1, 90)},
    "dropout": {"dropout_rng": torch.tensor([0, 3]), "dropout_rate": 0.2},
    "rules": {"mask": masks.LengthMask(torch.tensor([3, 0])) & masks.LocalMask(5, 60)},
}
tiled = partial(F, implementation="tiled")


def grouped(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 70, 4, 8), (2, 90, 2, 8), (2, 90, 2, 5)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@from_torch_itself
@pytest.mark.parametrize(("backend", "dynamic"), [("eager", False), ("eager", True), ("inductor", False)])
@pytest.mark.parametrize("options", TILED.values(), ids=TILED)
def test_tiled_compiles_in_one_graph_with_its_gradient(options, backend, dynamic):

    def call(*arrays):
        return tiled(*arrays, **options)

    arrays = grouped()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)(*arrays)
    answers = [(x, *torch.autograd.grad((x**2).sum(), arrays)) for x in (compiled, call(*arrays))]
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)


def test_a_compiled_program_does_not_grow_with_the_number_of_tiles():
    sizes = []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph

    for length in (64, 4096):
        torch._dynamo.reset()
        x = torch.zeros(1, length, 1, 4)
        torch.compile(lambda x: tiled(x, x, x, is_causal=True), fullgraph=True, backend=count)(x)
    assert sizes[0] == sizes[1]


@from_torch_itself
@pytest.mark.parametrize(
    "options", [{}, {"mask": MASK[..., :6, :7]}, {"is_causal": True}], ids=["plain", "mask", "rule"]
)
def test_tiled_second_order(options, monkeypatch):
    monkeypatch.setattr(type(backend_of(Q).tiles), "sizes", lambda self, block, ruled: (2, 3))
    query, key, value = (x.detach()[..., :2, :3] for x in grouped(torch.float64))
    arrays = [x.requires_grad_() for x in (query[:, :6], key[:, :7], value[:, :7])]

    def call(*arrays):
        return tiled(*arrays, **options)

    assert torch.autograd.gradcheck(call, arrays)
    assert torch.autograd.gradgradcheck(call, arrays)
    assert torch.autograd.gradcheck(call, arrays, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arrays, check_fwd_over_rev=True, fast_mode=True)


@from_torch_itself
def test_tiled_under_torch_func():
    arrays = [x.detach() for x in grouped(torch.float64)]

    def loss(*arrays, implementation="tiled"):
        return (F(*arrays, mask=MASK[0], implementation=implementation) ** 2).sum()

    exact = partial(loss, implementation="exact")
    for transform in (
        lambda f: torch.func.grad(f, (0, 1, 2))(*(x[:1] for x in arrays)),
        lambda f: torch.func.vmap(torch.func.grad(f, (0, 1, 2)))(*arrays),
        lambda f: torch.func.vmap(torch.func.grad(f, (0, 2)), (0, None, 0))(arrays[0], arrays[1][0], arrays[2]),
        lambda f: torch.func.grad(lambda q: torch.func.grad(f)(q, *(x[:1] for x in arrays[1:])).sum())(arrays[0][:1]),
    ):
        torch.testing.assert_close(transform(loss), transform(exact), rtol=1e-9, atol=1e-11)


@from_torch_itself
def test_tiled_mapped_compiles_in_one_graph():
    """Also with the gradient of what all examples share; dropout is the same in each."""
    query, key, value = (x.detach() for x in grouped())
    arrays = [x.requires_grad_() for x in (query[:, None], key[:1], value[:1])]
    drop = {"dropout_rng": torch.tensor(aa.random.key(0)), "dropout_rate": 0.3}
    mapped = torch.func.vmap(lambda q, k, v: tiled(q, k, v, mask=MASK[:1], **drop), (0, None, None))
    exact = torch.func.vmap(lambda q, k, v: F(q, k, v, mask=MASK[:1], **drop), (0, None, None))
    outputs = []
    for function in (torch.compile(mapped, backend="aot_eager", fullgraph=True), exact):
        output = function(*arrays)
        outputs.append((output, *torch.autograd.grad((output**2).sum(), arrays)))
    torch.testing.assert_close(*outputs)


@from_torch_itself
def test_tiled_in_forward_mode(monkeypatch):
    """Of queries, of a bias, of all together; and with the reverse mode inside, as a Hessian has it."""
    monkeypatch.setattr(type(backend_of(Q).tiles), "sizes", lambda self, block, ruled: (20, 40))
    query, key, value = (x.detach()[:1] for x in grouped(torch.float64))
    bias = torch.linspace(-1, 1, MASK[:1].numel(), dtype=torch.float64).reshape(MASK[:1].shape)
    drop = {"dropout_rng": aa.random.key(0), "dropout_rate": 0.3}

    def results(implementation):
        call = partial(F, implementation=implementation)
        yield torch.func.jvp(lambda q: call(q, key, value, mask=MASK[:1], **drop), (query,), (query + 1,))
        yield torch.func.jvp(lambda b: call(query, key, value, b), (bias,), (bias - 1,))
        arrays = query, key, value, bias
        yield torch.func.jvp(lambda *x: call(*x, mask=MASK[:1]), arrays, tuple(x**2 for x in arrays))
        yield torch.func.jacfwd(lambda q: call(q, key, value, is_causal=True))(query[:, :2])
        yield torch.func.hessian(lambda k: (call(query[:, :3], k, value[:, :2]) ** 2).sum())(key[:, :2])

    for actual, expected in zip(results("tiled"), results("exact"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_use_does_not_load_the_compiler():
    """It takes a second and a half, and 80 MiB."""
    code = "import sys, torch; from anyattention import dot_product_attention as f; x = torch.ones(2, 1, 4)"
    code += "; f(x, x, x); f(x, x, x, implementation='tiled'); assert 'torch._dynamo' not in sys.modules"
    run_afresh(code, timeout=60)
