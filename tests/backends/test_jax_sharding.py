"""Batches and heads on several devices: every device computes its own part, without a word to the others."""

import pytest

# All cases in one process, which has to be told of its devices before it imports JAX.
SCRIPT = r"""
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from anyattention import dot_product_attention, masks
from anyattention_backends.jax import backend
from anyattention_backends.jax.fused import JAXKernel as Kernel
from anyattention_backends.jax.once import alike

BATCH, LENGTH, HEADS, DEPTH = 4, 600, 4, 16
COLLECTIVE = re.compile(r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)[\w-]*[(]")
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "heads"))
of_rows = NamedSharding(mesh, PartitionSpec("batch", None, "heads", None))
of_pairs = NamedSharding(mesh, PartitionSpec("batch", "heads", None, None))
random = np.random.default_rng(0)
qkv = tuple(random.standard_normal((BATCH, LENGTH, HEADS, DEPTH), dtype=np.float32) for _ in range(3))
bias = random.standard_normal((BATCH, HEADS, LENGTH, LENGTH), dtype=np.float32)
ids = jnp.asarray(random.integers(3, size=(BATCH, LENGTH)))
dropout = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.1}
cases = {
    "none": {},
    "causal": {"is_causal": True},
    "lengths": {"mask": masks.LengthMask(jnp.array([100, 600, 300, 5]))},
    "segments": {"mask": masks.SegmentMask(ids, ids)},
    "dropout": dropout,
    "dropout of each head": {**dropout, "broadcast_dropout": False},
    "bias": {},
}


class StandIn(Kernel):  # the way to a kernel and back, with attention by JAX's own operations in between
    name, platform, dtypes = "cudnn", "cpu", ("float32",)

    def lacks(self, call, mask):
        return {}

    def kernel(self, query, key, value, bias, mask, scale):
        query, key, value, lengths, bias = alike(query, key, value, mask.kv_lengths, bias)
        return jax.nn.dot_product_attention(
            query, key, value, bias, scale=scale, is_causal=mask.causal, key_value_seq_lengths=lengths
        )


backend.engines = (StandIn(),)


def difference(actual, expected, exactly):
    try:
        if exactly:
            np.testing.assert_array_equal(actual, expected)
        else:
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=5e-6)
    except AssertionError as error:
        return str(error)
    return ""


def examine(implementation, case, differentiated):
    def function(*x):
        return dot_product_attention(*x, implementation=implementation, **cases[case])

    given = (*qkv, bias) if case == "bias" else qkv
    if differentiated:
        function = jax.grad(lambda *x, f=function: (f(*x) ** 2).sum(), tuple(range(len(given))))
    specs = [of_pairs if x is bias else of_rows for x in given]
    placed = [jax.device_put(x, spec) for x, spec in zip(given, specs)]
    compiled = jax.jit(function).lower(*placed).compile()
    actual = jax.tree.leaves(compiled(*placed))
    expected = jax.tree.leaves(jax.jit(function)(*map(jnp.asarray, given)))  # all on the first device
    assert all(len(x.devices()) == 1 for x in expected)
    # XLA rounds the gradients of two heads and of four in different ways, Flax's among them.
    exactly = implementation == "exact" and not differentiated
    return {
        "collectives": sorted(set(COLLECTIVE.findall(compiled.as_text()))),
        "differences": [difference(x, y, exactly) for x, y in zip(actual, expected)],
        "shardings": [str(x.sharding) for x, y in zip(actual, specs) if not x.sharding.is_equivalent_to(y, 4)],
    }


results = {
    f"{implementation}, {case}, {'gradient' if differentiated else 'output'}": examine(
        implementation, case, differentiated
    )
    for implementation, served in (("exact", cases), ("tiled", cases), ("fused", ("none", "causal", "lengths", "bias")))
    for case in served
    for differentiated in (False, True)
}
total = jax.jit(jnp.sum).lower(jax.device_put(qkv[0], of_rows)).compile().as_text()
print(json.dumps(results | {"a sum": sorted(set(COLLECTIVE.findall(total)))}))
"""
CASES = ("none", "causal", "lengths", "segments", "dropout", "dropout of each head", "bias")


@pytest.fixture(scope="module")
def results(on_four_devices):
    """What the script finds in each case."""
    return on_four_devices(SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["output", "gradient"])
@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        *((implementation, case) for implementation in ("exact", "tiled") for case in CASES),
        *(("fused", case) for case in ("none", "causal", "lengths", "bias")),
    ],
)
def test_sharded_batches_and_heads(results, implementation, case, what):
    """No communication, the numbers of one device, and results where the arguments are.

    But for one bit: whether a kernel can be trusted with a bias, which all devices decide together.
    """
    found = results[f"{implementation}, {case}, {what}"]
    assert found["collectives"] == ([["pred[]", "all-reduce"]] if (implementation, case) == ("fused", "bias") else [])
    assert not any(found["differences"]), found["differences"]
    assert not found["shardings"]


@pytest.mark.slow
def test_communication_is_seen(results):
    """What is found nowhere above is found where it must be."""
    assert results["a sum"] == [["f32[]", "all-reduce"]]
