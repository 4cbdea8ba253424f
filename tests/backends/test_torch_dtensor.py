"""DTensors: on a mesh of one rank here, and of two processes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import anyattention as aa
from anyattention import masks

F = aa.dot_product_attention
G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 64, 4, 8, generator=G) for _ in range(3))
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "lengths": {"mask": masks.LengthMask(torch.tensor([20, 3]))},
    "lengths of NumPy": {"mask": masks.LengthMask(np.array([20, 3]))},
    "a mask of NumPy": {"mask": np.tri(64)},
    "a plain mask": {"mask": torch.ones(64, 64).tril()},
    "segments": {"mask": masks.SegmentMask(torch.arange(64) // 9, torch.arange(64) // 9)},
    "a plain bias": {"bias": torch.randn(4, 64, 64, generator=G)},
    "a scalar bias": {"bias": 0.5},
    "dropout": {"dropout_rng": torch.tensor([0, 7]), "dropout_rate": 0.2},
    "dropout per head": {"dropout_rng": aa.random.key(3), "dropout_rate": 0.2, "broadcast_dropout": False},
}
# PyTorch 2.11 cannot multiply matrices of which an axis within the batch is sharded.
BATCH_ALONE = torch.__version__ < "2.13"
PLACES = {"batch": Shard(0), "heads": Shard(2), "queries": Shard(1), "whole": Replicate()}


def gradients(arrays, options, implementation):
    arrays = [x.detach().requires_grad_() for x in arrays]
    output = F(*arrays, implementation=implementation, **options)
    return [output, *torch.autograd.grad(output.square().sum(), arrays)]


def check(mesh, place, name, implementation):
    """Output and gradients are those of plain tensors."""
    other = Replicate() if place == "queries" else PLACES[place]
    spread = [distribute_tensor(x, mesh, [y]) for x, y in zip((Q, K, V), (PLACES[place], other, other), strict=True)]
    found = gradients(spread, CALLS[name], implementation)
    expected = gradients((Q, K, V), CALLS[name], "exact" if implementation is None else implementation)
    for x, y in zip(found, expected, strict=True):
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), y, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("implementation", ["exact", "tiled", None])
def test_what_is_plain_beside_dtensors(mesh, implementation, name):
    check(mesh, "batch" if BATCH_ALONE else "heads", name, implementation)


def test_pullbacks_and_weights(mesh):
    spread = [distribute_tensor(x, mesh, [Shard(0)]) for x in (Q, K, V)]
    output, pullback = aa.dot_product_attention_vjp(*spread, is_causal=True)
    expected, of_plain = aa.dot_product_attention_vjp(Q, K, V, is_causal=True)
    for x, y in zip(pullback(output)[:3], of_plain(expected)[:3], strict=True):
        torch.testing.assert_close(x.full_tensor(), y, atol=2e-5, rtol=1e-4)
    weights = aa.dot_product_attention_weights(*spread[:2], is_causal=True)
    torch.testing.assert_close(weights.full_tensor(), aa.dot_product_attention_weights(Q, K, is_causal=True))


def test_fused_refuses_and_none_avoids_it(mesh):
    """PyTorch has no strategy for the gradient of its kernel on CPU."""
    x = distribute_tensor(torch.randn(2, 256, 4, 8, generator=G), mesh, [Shard(0)])
    with pytest.raises(NotImplementedError, match="no strategy for its gradient of DTensors"):
        F(x, x, x, implementation="fused")
    assert aa.explain(x, x, x).implementation == "exact"


WORKER = """
import os, sys, warnings
import torch, torch.distributed as dist, torch.multiprocessing as mp
sys.path.insert(0, sys.argv[1])

def work(rank, path):
    import test_torch_dtensor as tests
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    mesh = tests.init_device_mesh("cpu", (2,))
    for place in ("batch",) if tests.BATCH_ALONE else ("batch", "heads", "queries"):
        for name in ("causal", "a mask of NumPy", "dropout per head"):
            for implementation in ("exact", "tiled"):
                tests.check(mesh, place, name, implementation)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[2],), nprocs=2)
"""


def test_two_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-W", "ignore", script, __file__.rpartition("/")[0], tmp_path / "store"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]
