"""What serves a call, and that nothing which a call asks for is ignored."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention as aa
from anyattention._src import plan, registry
from anyattention._src.call import Call, Operands, Options
from anyattention.extend import Fused, Implementation

ROOT = Path(__file__).parents[1]
X = np.random.default_rng(0).standard_normal((1, 300, 2, 16), dtype=np.float32)
BACKENDS = {"numpy": X, "jax": jnp.asarray(X), "torch": torch.tensor(X)}
MORE = dataclasses.make_dataclass(
    "MoreOptions", [("soft_cap", float, None)], bases=(Options,), frozen=True, kw_only=True
)


def call_of(x, options=None, **operands):
    backend = registry.backend_of(x)
    return Call(
        backend=backend,
        operands=Operands(x, x, x, **operands),
        options=options or Options(dtype=backend.arrays.dtype_name(x)),
    )


def implementations():
    yield from ((name, x) for x in BACKENDS.values() for name in ("exact", "tiled"))
    for library in ("jax", "torch", "mlx"):
        x = BACKENDS.get(library)
        yield from ((engine, x) for engine in registry.engines(registry.load(library)))


@pytest.mark.parametrize(("which", "x"), [(which, x) for which, x in implementations() if x is not None])
def test_an_option_that_nobody_knows_is_refused(which, x, monkeypatch):
    """By every implementation: an option is a word, and words are served by name."""
    call = call_of(x, MORE(dtype="float32", soft_cap=30.0))
    if isinstance(which, Implementation):
        monkeypatch.setattr(type(call.backend.arrays), "platform", lambda self, x: which.platforms[0])
        monkeypatch.setitem(vars(which), "absent", "") if "absent" not in vars(Fused) else None
        assert "it does not know 'soft_cap'" in list(which.refusals(call))
    else:
        with pytest.raises(NotImplementedError, match="does not know 'soft_cap'"):
            plan.choose(call, which)


@pytest.mark.parametrize("x", BACKENDS.values(), ids=BACKENDS)
def test_neither_does_none_ignore_it(x):
    with pytest.raises(NotImplementedError, match="does not know 'soft_cap'"):
        plan.choose(call_of(x, MORE(dtype="float32", soft_cap=30.0)))
    assert plan.explain(call_of(x, MORE(dtype="float32", soft_cap=30.0))).implementation is None
    assert plan.explain(call_of(x, MORE(dtype="float32"))).implementation is not None


def test_exact_refuses_words_alone():
    """Choosing by rule relies on it."""
    assert type(registry.EXACT).refusals is Implementation.refusals


def test_every_operand_and_option_is_a_word():
    """Whatever is not at its default, so that a new field cannot be forgotten."""
    for name in Operands._fields[3:]:
        assert name in call_of(X, **{name: X}).needs
    for field in dataclasses.fields(Options):
        if field.name != "dtype":
            assert Options(dtype="float32", **{field.name: object()}).needs == {field.name}
    assert call_of(X).needs == frozenset()


def test_options_are_frozen_hashable_and_by_keyword():
    options = Options(dtype="float32", precision="highest")
    assert hash(options) == hash(Options(dtype="float32", precision="highest"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.precision = None
    with pytest.raises(TypeError):
        Options("float32")
    with pytest.raises(TypeError):
        Call(None, None, None)


@pytest.mark.parametrize("name", ["dot_product_attention", "dot_product_attention_partial", "explain"])
def test_every_argument_reaches_the_call(name, monkeypatch):
    """The functions spell their arguments out; none is lost on the way."""
    import inspect

    home = inspect.getmodule(getattr(aa, name))
    parameters = inspect.signature(getattr(aa, name)).parameters
    given = {}
    monkeypatch.setattr(home, "call_of", lambda **arguments: given.update(arguments) or call_of(X))
    getattr(aa, name)(X, X, X)
    assert set(given) - {"partial"} == set(parameters) - {"implementation"}


# --- explain ---


def test_explain_explains_what_would_raise():
    refused = aa.explain(X, X, X, module=object(), implementation="tiled")
    assert refused.implementation is None
    assert refused.reasons == ("module is given the weights, which tiled never has all at once",)
    assert "the call raises" in str(refused)


def test_explain_gives_sizes_and_thresholds():
    small = np.zeros((1, 12, 2, 4), np.float32)
    assert "144 logits of a head, 288 of a batch entry, 12 queries" in aa.explain(small, small, small).reasons
    assert "tiled from 65536 logits of a head, 64 queries" in aa.explain(small, small, small).reasons


def test_explain_tells_no_rule_of_an_implementation_that_another_rule_chose():
    """Two rules choose tiled on JAX: the one for a single query says nothing of a long call."""
    one, many = jax.ShapeDtypeStruct((1, 1, 2, 4), "float32"), jax.ShapeDtypeStruct((1, 1024, 2, 4), "float32")
    assert aa.explain(many, many, many).reasons == ("1048576 logits of a head, 2097152 of a batch entry, 1024 queries",)
    single = aa.explain(one, many, many).reasons
    assert single[0] == "1024 logits of a head, 2048 of a batch entry, 1 query"
    assert single[2].startswith("tiled from 4096 logits of a head, at most 1 query, in float32 and float64")


def test_one_query_on_jax():
    """Tiled where it is faster than Flax: in 32 bits, and in a program, which a growing cache would compile anew."""
    arrays = [jnp.zeros((2, n, 8, 16)) for n in (1, 4096, 4096)]
    assert aa.explain(*arrays).implementation == "exact"
    seen = []
    jax.eval_shape(lambda *x: seen.append(aa.explain(*x)), *arrays)
    jax.eval_shape(lambda *x: seen.append(aa.explain(*x)), *(x.astype(jnp.bfloat16) for x in arrays))
    assert [plan.implementation for plan in seen] == ["tiled", "exact"]


def test_explain_tells_what_kernels_do_with_neighbours():
    x = torch.zeros(2, 64, 1, 8)
    told = str(aa.explain(x, x, x, is_causal=True))
    assert "the bits of a batch entry do not depend on the other entries" in told
    assert "NaN or infinity may show in a row whose query may not see it" in told
    assert "may depend on the other entries" in str(aa.explain(x, x, x, bias=torch.zeros(64)))


def test_explain_takes_shapes():
    """Of JAX, with masks of shapes too, and without a device."""
    shape = jax.ShapeDtypeStruct((2, 4096, 8, 64), jnp.bfloat16)
    assert aa.explain(shape, shape, shape).implementation == "tiled"
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert aa.explain(shape, shape, shape, mask=aa.masks.LengthMask(lengths)).implementation == "tiled"
    with pytest.raises(aa.ShapeError):
        aa.explain(shape, jax.ShapeDtypeStruct((2, 4096, 7, 64), jnp.bfloat16), shape)


def test_a_plan_holds_names():
    x = BACKENDS["torch"]
    found = aa.explain(x, x, x)
    assert found == ("fused", "torch", found.reasons, "sdpa")
    assert {type(part) for part in (*found.reasons, found.implementation, found.library, found.engine)} == {str}


# --- accelerators ---


@pytest.mark.needs("jax", "torch")
def test_none_picks_what_ran_on_a_device(monkeypatch):
    """The table is no wider than the committed runs: outputs and gradients of a dtype, none of them wrong but known."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu import correctness

    from anyattention_conformance import Golden

    ran, golden = set(), Golden()
    for path in (ROOT / "benchmarks/results").glob("gpu-*.json"):
        for framework, by_engine in json.loads(path.read_text())["correctness"].items():
            for engine, verdicts in by_engine.items():
                for case, dtype, gradients, _ in correctness.tasks(engine, quick=False):
                    verdict = verdicts.get(f"{case.id} {dtype}", {"verdict": "not run"})
                    by_rule = isinstance(case, correctness.rules.Ruled)
                    refused = not by_rule and isinstance(golden.answer(case, dtype), str)  # Flax raises: no kernel ran
                    if verdict["verdict"] == "conforms" and not refused and gradients and not verdict["why"]:
                        ran.add((framework, engine, case.compute_dtype(dtype)))
    assert plan.RUN_ON_A_DEVICE
    for (library, platform, engine), dtypes in plan.RUN_ON_A_DEVICE.items():
        assert platform in ("gpu", "cuda")
        assert {(library, engine, dtype) for dtype in dtypes} <= ran
    assert ("torch", "sdpa", "float32") not in {(a, c, x) for (a, _, c), y in plan.RUN_ON_A_DEVICE.items() for x in y}


def test_others_run_by_name_or_by_config(monkeypatch):
    class Other(Fused):
        name = "sdpa"
        platforms = ("cuda",)
        dtypes = ("float32", "bfloat16")

    x = BACKENDS["torch"]
    backend = registry.backend_of(x)
    monkeypatch.setattr(backend, "engines", (Other(),))
    monkeypatch.setattr(type(backend.arrays), "platform", lambda self, x: "cuda")
    assert "no run of it in float32 on a cuda is on record" in str(aa.explain(x, x, x))
    assert aa.explain(x, x, x).implementation == "exact"
    assert aa.explain(x, x, x, implementation="fused").engine == "sdpa"
    with aa.config(engines=["sdpa"]):
        assert aa.explain(x, x, x).engine == "sdpa"
    assert aa.explain(*[x.bfloat16()] * 3).engine == "sdpa"


def test_the_platform_of_jax():
    """Of a concrete array its own device; of a tracer that of `jax.default_device`, else of the default backend."""
    code = """
import jax, jax.numpy as jnp
from anyattention_backends.jax import backend
platform, seen = backend.arrays.platform, []
class Device:
    platform = "tpu"
x = jnp.ones(1)
assert platform(x) == "cpu" == jax.default_backend()
jax.jit(lambda x: seen.append(platform(x)))(x)
jax.default_backend = lambda: "gpu"
assert platform(x) == "cpu"
jax.jit(lambda x: seen.append(platform(x)))(x)
with jax.default_device(jax.devices("cpu")[0]):
    jax.jit(lambda x: seen.append(platform(x)))(x)
assert seen == ["cpu", "gpu", "cpu"], seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)
