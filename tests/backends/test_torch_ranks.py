"""A sequence over the ranks of a process group: two and three processes, output and all gradients against the whole."""

import os
import sys
import time
import warnings
from datetime import timedelta
from functools import cache, partial

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.backends.gloo import Kind, compare, dropout, error_of, identity, kinds, main, once, outcomes, same_bits
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import anyattention as aa
from anyattention import biases, masks

F = aa.dot_product_attention
MODULE = "tests.backends.test_torch_ranks"


def cut_for(group):
    """What cuts arrays into this rank's part: rows, and the columns of what has columns alone."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def cut(x, axes):
        axis = "rows" if "rows" in axes else "columns"
        if axis not in axes or (at := axes.index(axis) - len(axes)) < -x.ndim or x.shape[at] == 1:
            return x
        part = x.shape[at] // size
        index = [slice(None)] * x.ndim
        index[at] = slice(rank * part, (rank + 1) * part)
        return x[tuple(index)].detach().clone() if isinstance(x, torch.Tensor) else x[tuple(index)]

    return cut


def check(kind, group, **more):
    """Output and gradients of this rank's part are those of the whole."""
    cut, expected = cut_for(group), kind.truth()
    found = kind.mapped(cut).results(**(more or {"sequence_axis": group}))
    compare(found, [cut(x, axes) for x, axes in zip(expected, kind.axes(), strict=True)], kind.tolerance)


def parts(group, length=32, **options):
    """Query, key and value of this rank, and what they are of."""
    kind = Kind((1, length, 2, 8), **options)
    return [x.requires_grad_() for x in kind.mapped(cut_for(group)).arrays], kind


def of_a_mesh(group):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("seq",))
    check(Kind(is_causal=True), group, sequence_axis=mesh)


def of_config(group):
    (query, key, value), _ = parts(group)
    expected = F(query, key, value, is_causal=True, sequence_axis=group)
    with aa.config(sequence_axis=group):
        assert torch.equal(F(query, key, value, is_causal=True), expected)


def of_all_queries(group, kind):
    """Every rank has all queries, and some of the keys, as in decoding."""
    cut, expected = cut_for(group), kind.truth()

    def keys(x, axes):
        return x.detach().clone() if "rows" in axes else cut(x, axes)

    with aa.config(exchange="reduce"):
        found = kind.mapped(keys).results(sequence_axis=group)
    compare(found, [keys(x, axes) for x, axes in zip(expected, kind.axes(), strict=True)], kind.tolerance)


def some_ranks(group):
    """Ranks 0 and 2 of three are 0 and 1 of their own group."""
    some = dist.new_group([0, 2])
    if dist.get_rank() != 1:
        check(Kind(is_causal=True), some)
    else:
        x = torch.ones(1, 4, 1, 8)
        assert "this rank, 1, is not in the group" in error_of(F, x, x, x, sequence_axis=some)


def bits(group, length, **options):
    kind, cut = identity(length, **options), cut_for(group)
    with torch.no_grad():
        found = F(*kind.mapped(cut).arrays, **kind.options, sequence_axis=group)
        whole = F(*kind.arrays, **kind.options, implementation="exact")
    visible = torch.ones(length, length).tril() if "is_causal" in options else torch.ones(length, length)
    shown = cut(visible[:, None].expand(length, 3, length)[None], ("batch", "rows", "heads", "depth")) > 0
    same_bits(
        found[shown.expand(found.shape)], cut(whole, ("batch", "rows", "heads", "depth"))[shown.expand(found.shape)]
    )


def answers(group, dtype):
    """Written down for a comparison with the truth."""
    kind = Kind((1, 2048, 2, 64), dtype=dtype, is_causal=True)
    found = [x.detach().float().numpy() for x in kind.mapped(cut_for(group)).results(sequence_axis=group)]
    np.savez(f"{sys.argv[2]}/{dtype}-{dist.get_rank(group)}.npz", *found)


def what_is_sent(group):
    """Keys and values of 16 bits, before the work that they overlap with."""
    from anyattention_backends.torch.ranks import Ranks

    (query, key, value), _ = parts(group, dtype=torch.bfloat16)
    log, send, receive, product = [], Ranks.send, Ranks.receive, torch.matmul

    def noted(name, function, of=None):
        def call(*args, **options):
            log.append((name, [x.dtype for x in args[1]] if of else None))
            return function(*args, **options)

        return call

    try:
        Ranks.send, Ranks.receive, torch.matmul = (
            noted("send", send, True),
            noted("receive", receive),
            noted("product", product),
        )
        with torch.no_grad():
            F(query, key, value, sequence_axis=group, implementation="tiled")
    finally:
        Ranks.send, Ranks.receive, torch.matmul = send, receive, product
    assert log[0] == ("send", [torch.bfloat16] * 2)
    assert [name for name, _ in log].index("product") < [name for name, _ in log].index("receive")
    assert [name for name, _ in log].count("send") == dist.get_world_size(group) - 1


def derivatives(group):
    (query, key, value), _ = parts(group)
    attend = partial(F, is_causal=True, sequence_axis=group)
    output = attend(query, key, value)
    said = "first derivative in reverse mode alone: for others gather it"
    assert said in error_of(torch.autograd.grad, output.sum(), query, create_graph=True)
    for transform in (
        torch.func.grad(lambda x: attend(x, key, value).sum()),
        torch.func.vmap(lambda x: attend(x, x, x)),
    ):
        assert said in error_of(transform, query)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its own torch.jit.script
        assert said in error_of(torch.func.jvp, attend, (query, key, value), (query, key, value))
    with torch.no_grad():
        assert attend(query, key, value).grad_fn is None


def compiled(group):
    (query, key, value), _ = parts(group)
    attend = partial(F, is_causal=True, sequence_axis=group)
    expected = torch.autograd.grad(attend(query, key, value).square().sum(), (query, key, value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "values of masks" in error_of(torch.compile(attend, backend="eager", fullgraph=True), query, key, value)
        found = torch.compile(attend, backend="eager")(query, key, value)
    compare(torch.autograd.grad(found.square().sum(), (query, key, value)), expected, 1e-6)


def mistakes(group):
    size = dist.get_world_size(group)
    (query, key, value), _ = parts(group, 16 * size)
    attend = partial(F, query, key, value)
    mesh = DeviceMesh("cpu", torch.arange(size)[None], mesh_dim_names=("data", "seq"))
    whole = distribute_tensor(query, mesh["seq"], [Shard(1)])
    bias, mask = torch.zeros(16, 16), torch.ones(16 * size, 16 * size)
    for said, function, options in (
        ("TypeError: sequence_axis='seq' is the name of a mesh axis, which JAX has", attend, {"sequence_axis": "seq"}),
        ("dimensions, data and seq: pass one, mesh['seq']", attend, {"sequence_axis": mesh}),
        ("DTensors say by their placements", partial(F, whole, whole, whole), {"sequence_axis": group}),
        (
            f"bias has 16 columns, but kv_length of the whole is {16 * size} ({size} parts of 16)",
            attend,
            {"bias": bias},
        ),
        (f"mask has {16 * size} rows, but this device has 16 queries", attend, {"mask": mask}),
        ("query_ids of", attend, {"mask": masks.SegmentMask(torch.zeros(16 * size).int(), torch.zeros(16).int())}),
        ("query_arrays[0] of", attend, {"bias": biases.Rule(lambda i, j, a: a, (torch.zeros(1, 16 * size),))}),
        ("it gives no row statistics", attend, {"implementation": "exact"}),
        ("are computed without bias", attend, {"implementation": "fused", "bias": torch.zeros(16, 1)}),
    ):
        found = error_of(function, **({"sequence_axis": group} | options))
        assert said in found, (said, found)
    with aa.config(exchange="gather"):
        assert "torch has ring and reduce over" in error_of(attend, sequence_axis=group)
    with aa.config(sequence_axis=group):
        said = error_of(aa.dot_product_attention_vjp, query, key, value)
    assert "dot_product_attention_vjp knows no sequence over" in said


def other_shapes(group):
    """The same error on each rank, again and again."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    x, y = torch.ones(1, 8, 2, 4), torch.ones(1, 8 if rank else 6, 2, 4)
    for _ in range(2):
        said = error_of(F, y, y, y, sequence_axis=group)
        assert "ValueError: query and key must have the same shape and dtype on every rank of the process group" in said
        assert "rank 0: query (1, 6, 2, 4) float32" in said
        assert f"rank {size - 1}: query (1, 8, 2, 4) float32, key (1, 8, 2, 4) float32" in said
    said = error_of(F, x.to(torch.bfloat16 if rank else torch.float32), x, x, sequence_axis=group)
    assert "rank 0: query (1, 8, 2, 4) float32, key (1, 8, 2, 4) float32; rank 1: query (1, 8, 2, 4) bfloat16" in said


def asked_once(group):
    """Shapes are compared once."""
    (query, key, value), _ = parts(group)
    F(query, key, value, sequence_axis=group)
    ask, dist.all_gather_object = dist.all_gather_object, None
    try:
        F(query, key, value, sequence_axis=group)
    finally:
        dist.all_gather_object = ask


def noted(said):
    assert "anyattention: rank 0 of the process group of 2 ranks, turn 0 of 2, waiting for rank 1" in said, said


def stuck(group):
    """No rank waits longer than the timeout, which is 5 seconds."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    (query, key, value), _ = parts(group)
    F(query, key, value, sequence_axis=group)
    if dist.get_rank(group) == 0:
        start = time.monotonic()
        said = error_of(F, query, key, value, sequence_axis=group)
        assert said.startswith("RuntimeError")
        assert 4.0 < time.monotonic() - start < 8.0
        noted(said)
    dist.barrier()


def dead(group):
    """A rank that is gone is told at once, and after the timeout at the latest."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    (query, key, value), _ = parts(group)
    F(query, key, value, sequence_axis=group)
    if dist.get_rank(group) == 1:
        os._exit(0)
    start = time.monotonic()
    said = error_of(F, query, key, value, sequence_axis=group)
    assert said.startswith("RuntimeError")
    assert time.monotonic() - start < 6.0
    noted(said)


#: Of three ranks a few kinds, since each rank computes the whole too.
OF_THREE = (
    *("none", "causal", "causal, no query sees a key", "causal by batch entry", "window", "lengths, of which one is 0"),
    *("segments of NumPy, an id of no key", "dense", "dense, one row", "a rule", "bias", "bias of one row", "relative"),
    *("bias of an element", "a bias by rule", "sinks of queries", "dropout per head, causal", "grouped, bias"),
    *("bfloat16, causal", "other lengths, bias, dropout"),
)


def cases(size):
    """By name."""
    found = {name: partial(check, kind) for name, kind in kinds(44 * size).items() if size == 2 or name in OF_THREE}
    odd = 2, 45 * size, 4, 16  # which has no halves for a zigzag
    found["causal, odd"] = partial(check, Kind(odd, is_causal=True))
    found["lengths, causal, odd"] = partial(
        check, Kind(odd, is_causal=True, mask=masks.LengthMask(torch.tensor([0, 40])))
    )
    found["dropout per head, causal, odd"] = partial(check, Kind(odd, is_causal=True, **dropout(False)))
    for name, broadcast in (("a mask", True), ("each head", False)):
        found[f"bits of {name}"] = partial(bits, length=32 * size, **dropout(broadcast))
        found[f"bits of {name}, zigzag"] = partial(bits, length=32 * size, is_causal=True, **dropout(broadcast))
    found |= {
        "what is sent": what_is_sent,
        "mistakes": mistakes,
        "other shapes": other_shapes,
        "asked once": asked_once,
    }
    for queries, more in ((1, {}), (3, {"is_causal": True}), (7, dropout(False) | {"kv_heads": 2})):
        ids = torch.arange(40 * size)[None] // 9
        options = more | {"mask": masks.SegmentMask(ids[:, :queries] + 2, ids)} if queries == 1 else more
        kind = Kind((2, queries, 4, 16), kv_length=40 * size, **options)
        found[f"all queries, {queries}"] = partial(of_all_queries, kind=kind)
    if size == 3:
        return found | {"some ranks": some_ranks}
    found |= {"a mesh": of_a_mesh, "config": of_config, "derivatives": derivatives, "compiled": compiled}
    for dtype in (torch.float32, torch.bfloat16):
        found[f"answers in {dtype}"] = partial(answers, dtype=dtype)
    return found | {"stuck": stuck}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What came of each case on so many ranks, and the folder of what they wrote."""

    @cache
    def of(size):
        def run(folder):
            return str(folder), outcomes(MODULE, size, folder)

        return once(tmp_path_factory, f"ranks-{size}", run)

    return of


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in (2, 3) for name in cases(size)])
def test_a_sequence_over_ranks(ranks, size, name):
    assert ranks(size)[1][name] == ["ok"] * size


@pytest.mark.needs("jax", "flax")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_at_most_twice_those_of_flax(ranks, dtype):
    """Against the truth in float64: contract C3."""
    from anyattention_conformance import flax_answer, truth, within_c3

    folder, found = ranks(2)
    assert found[f"answers in {dtype}"] == ["ok"] * 2
    kind, name = Kind((1, 2048, 2, 64), dtype=dtype), str(dtype).removeprefix("torch.")
    as_numpy = [x.float().numpy().astype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for x in kind.arrays]
    arguments = dict(zip(("query", "key", "value"), as_numpy, strict=True)) | {"mask": np.tri(2048, dtype=bool)}
    cotangent = kind.weights.numpy()
    flax, (exact, size) = flax_answer(arguments, cotangent), truth(arguments, name, cotangent)
    files = [np.load(f"{folder}/{dtype}-{rank}.npz") for rank in range(2)]
    found = [np.concatenate([file[part] for file in files], axis=1) for part in files[0]]
    for part, ours in zip((None, "query", "key", "value"), found, strict=True):
        flaxs, right, sizes = ((x.output if part is None else x.gradients[part]) for x in (flax, exact, size))
        assert not within_c3(ours, np.asarray(flaxs, np.float32), right, sizes, name), part


def test_a_dead_rank(tmp_path):
    assert outcomes(MODULE, 2, tmp_path, "dead", survivors=[0])["dead"] == ["ok"]


def test_plain_names_of_axes_without_ranks():
    x = torch.ones(1, 4, 1, 8)
    with pytest.raises(TypeError, match=r"which JAX has: for PyTorch pass a process group, such as torch.distributed"):
        F(x, x, x, sequence_axis="seq")


if __name__ == "__main__":
    main(cases(int(sys.argv[1])), {"dead": dead})
