"""Lengths sharded over devices, and arrays on another device than the first; results lie where arguments do."""

import pytest

SCRIPT = r"""
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from anyattention import dot_product_attention, dot_product_attention_vjp, explain, masks, random

rng = np.random.default_rng(0)
qkv = [rng.standard_normal((2, 1040, 2, 8), dtype=np.float32) for _ in range(3)]
causal = {"is_causal": True, "mask": masks.LengthMask(np.array([1040, 700]))}
dropout = {"dropout_rng": random.key(1), "dropout_rate": 0.3, "broadcast_dropout": False}
results = {}


def compare(name, placed, options, implementation, eager=False):
    f = lambda *x: dot_product_attention(*x, implementation=implementation, **options)
    g = jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))
    wrap = (lambda f: f) if eager else jax.jit
    actual = wrap(f)(*placed), *wrap(g)(*placed)
    expected = jax.jit(f)(*map(jnp.asarray, qkv)), *jax.jit(g)(*map(jnp.asarray, qkv))
    results[name] = {
        "error": max(float(np.abs(np.asarray(x) - y).max()) for x, y in zip(actual, expected)),
        "moved": [i for i, (x, y) in enumerate(zip(actual, (placed[0], *placed)))
                  if not x.sharding.is_equivalent_to(y.sharding, 4)],
    }


for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
    for sharded, specs in {"both": (P("b", "a"),) * 3, "keys": (P("b"), P("b", "a"), P("b", "a"))}.items():
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(qkv, specs)]
        compare(f"{kind.name} {sharded} tiled", placed, causal, "tiled")
        if kind == AxisType.Explicit:
            compare(f"{kind.name} {sharded} exact", placed, causal, "exact")
        big = jax.device_put(jnp.ones((2, 4096, 4, 8)), NamedSharding(mesh, P("b", "a")))
        results[f"{kind.name} {sharded} plan"] = str(explain(big, big, big))
there = [jax.device_put(x, jax.devices()[1]) for x in qkv]
compare("device 1", there, dropout, "tiled", eager=True)
output, pullback = dot_product_attention_vjp(*there, **dropout)
assert pullback(output)[0].devices() == {jax.devices()[1]}
for key in (jax.random.key(1), jax.random.PRNGKey(1)):
    options = {"dropout_rng": key, "dropout_rate": 0.3, "implementation": "tiled"}
    jax.jit(lambda q: dot_product_attention(q, *there[1:], **options))(there[0])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(on_four_devices):
    """What the script finds; an abort of a program is one of the script."""
    return on_four_devices(SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["both", "keys"])
@pytest.mark.parametrize("case", ["Auto {} tiled", "Explicit {} tiled", "Explicit {} exact"])
def test_sharded_lengths(results, case, sharded):
    found = results[case.format(sharded)]
    assert found["error"] < 2e-4
    assert set(found["moved"]) <= ({1} if sharded == "keys" else set())  # XLA may spread the gradient of a whole query


@pytest.mark.slow
def test_what_none_chooses(results):
    """Exact where only a look at arrays tells; explicit axes say how the sequence is spread."""
    plan = results["Auto both plan"]
    assert plan.startswith("implementation  exact")
    assert "the length of query is sharded over a" in plan
    plan = results["Explicit both plan"]
    assert plan.startswith("implementation  tiled")
    assert "ring over mesh axis 'a', 2 devices" in plan


@pytest.mark.slow
def test_another_device(results):
    """Positions, counts, guests and keys go where query and key are."""
    assert results["device 1"]["error"] < 2e-5
    assert not results["device 1"]["moved"]
