"""DTensors: on a mesh of one rank here, and of two and four processes, output and all gradients against the whole."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import anyattention as aa
from anyattention import masks
from tests.backends.gloo import Kind, compare, kinds, main, outcomes, per_head

F = aa.dot_product_attention
R, BATCH, ROWS, HEADS, DEPTH = Replicate(), Shard(0), Shard(1), Shard(2), Shard(3)
#: By name, the placements of query, and of key and value.
PLACES = {
    "batch": ((BATCH,), (BATCH,)),
    "heads": ((HEADS,), (HEADS,)),
    "queries": ((ROWS,), (R,)),
    "keys": ((R,), (ROWS,)),
    "both": ((ROWS,), (ROWS,)),
    "whole": ((R,), (R,)),
}
ON_TWO_AXES = {
    "batch, both": ((BATCH, ROWS), (BATCH, ROWS)),
    "both, heads": ((ROWS, HEADS), (ROWS, HEADS)),
    "batch, heads": ((BATCH, HEADS), (BATCH, HEADS)),
    "heads, queries": ((HEADS, ROWS), (HEADS, R)),
    "keys, heads": ((R, HEADS), (ROWS, HEADS)),
}


def check(kind, mesh, places, guests="plain", **more):
    """Output and gradients are those of the whole; `guests` says whether bias, mask and sinks are DTensors too."""
    of_query, of_others = places

    def spread(x, axes):
        if "depth" in axes:
            return distribute_tensor(x, mesh, of_query if "rows" in axes else of_others)
        if guests == "plain" or not isinstance(x, torch.Tensor):
            return x.detach().clone() if isinstance(x, torch.Tensor) else x
        if guests == "replicated":
            return distribute_tensor(x, mesh, [R] * mesh.ndim)
        return distribute_tensor(x, mesh, [Shard(x.ndim - 1)] + [R] * (mesh.ndim - 1))

    expected, part = kind.truth(), kind.mapped(spread)
    found = part.results(**more)
    assert found[0].placements == tuple(of_query)
    for x, given in zip(found, [found[0], *part.differentiated], strict=True):
        assert isinstance(x, DTensor) is isinstance(given, DTensor)
    compare([x.full_tensor() if isinstance(x, DTensor) else x for x in found], expected, kind.tolerance)


def cases(size):
    mesh = init_device_mesh("cpu", (2, 2) if size == 4 else (2,), mesh_dim_names=("data", "seq")[-(size // 2) :])
    found = {}

    def add(name, function, *args, **options):
        found[name] = lambda _: function(*args, **options)

    small = kinds(24) if size == 4 else kinds(44)
    for place, placements in (ON_TWO_AXES if size == 4 else PLACES).items():
        for name, kind in small.items():
            if "one key head" in name and "heads" in place:  # which a key head cannot be
                continue
            add(f"{place}: {name}", check, kind, mesh, placements)
            guests = {"bias", "mask", "sinks"} & {*kind.options}
            if guests and size == 2:
                add(f"{place}: {name}, replicated", check, kind, mesh, placements, "replicated")
                add(f"{place}: {name}, sharded", check, kind, mesh, placements, "sharded")
    return found


def names(size):
    """Without a mesh."""
    places = ON_TWO_AXES if size == 4 else PLACES
    return [f"{place}: {name}" for place in places for name in kinds(8)]


@pytest.fixture(scope="module", params=(2,))
def ranks(request, tmp_path_factory):
    return request.param, outcomes("tests.backends.test_torch_dtensor", request.param, tmp_path_factory.mktemp("ranks"))


if __name__ == "__main__":
    main(cases)
