"""DTensors: on a mesh of one rank here, and of two and four processes, output and all gradients against the whole."""

import sys
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.backends.gloo import Kind, compare, dropout, error_of, identity, kinds, main, once, outcomes, same_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import anyattention as aa
from anyattention import biases, masks
from anyattention.partials import merge

F = aa.dot_product_attention
MODULE = "tests.backends.test_torch_dtensor"
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
    "keys, batch": ((R, BATCH), (ROWS, BATCH)),
}
#: Of four ranks a few kinds, since each rank computes the whole too.
OF_FOUR = (
    *("causal", "lengths, of which one is 0", "segments of NumPy, an id of no key", "dense", "relative"),
    *("bias of one row", "a bias by rule", "a bias by rule for each head", "grouped, bias"),
    *("dropout per head, causal", "grouped, dropout per head"),
)
#: Where queries or keys alone are cut, these.
OF_ONE_LENGTH = (
    *(*OF_FOUR, "none", "window", "bias", "a rule", "sinks of queries", "scale and cap", "dense, one row"),
    *("segments, causal", "causal by batch entry", "other lengths, causal", "bfloat16, causal"),
)


@cache
def mesh_of(size):
    return init_device_mesh(
        "cpu", (2, 2) if size == 4 else (size,), mesh_dim_names=("data", "seq")[-(size // 2 or 1) :]
    )


def spread(mesh, places, guests="plain"):
    """What distributes arrays; `guests`, bias, mask and sinks, are plain, "replicated", or "sharded" anyhow."""
    of_query, of_others = places

    def of(x, axes):
        if "depth" in axes:
            return distribute_tensor(x.detach(), mesh, of_query if "rows" in axes else of_others)
        if guests == "plain" or not isinstance(x, torch.Tensor):
            return x.detach().clone() if isinstance(x, torch.Tensor) else x
        first = R if guests == "replicated" else Shard(x.ndim - 1)
        return distribute_tensor(x.detach(), mesh, [first] + [R] * (mesh.ndim - 1))

    return of


def check(kind, size, places, guests="plain", **more):
    """Output and gradients are those of the whole."""
    expected, part = kind.truth(), kind.mapped(spread(mesh_of(size), places, guests))
    found = part.results(**more)
    assert found[0].placements == tuple(places[0])
    for x, given in zip(found, [found[0], *part.differentiated], strict=True):
        assert isinstance(x, DTensor) is isinstance(given, DTensor)
    compare([x.full_tensor() if isinstance(x, DTensor) else x for x in found], expected, kind.tolerance)


def bits(size, places, **options):
    kind = identity(24, heads=4, **options)
    with torch.no_grad():
        found = kind.mapped(spread(mesh_of(size), places)).arrays
        found = F(*found, **kind.options).full_tensor()
        same_bits(found, F(*kind.arrays, **kind.options, implementation="exact"))


def collectives(place, kind):
    """What ranks send each other, forward and backward; no more than has to be."""
    kind = kind.mapped(spread(mesh_of(2), PLACES[place], "replicated"))
    with CommDebugMode() as mode:
        kind.results()
    found = {str(name).rpartition(".")[2]: count for name, count in mode.get_comm_counts().items()}
    assert not any("gather" in name for name in found), found
    if place in ("batch", "heads", "queries"):
        assert not found, found


def placements_of_gradients():
    mesh, kind = mesh_of(2), Kind(bias=torch.randn(4, 88, 88), sinks=torch.randn(4))
    for place, expected in {
        "batch": [BATCH, BATCH, BATCH, BATCH, Partial(), Partial()],
        "queries": [ROWS, ROWS, Partial(), Partial(), R, Partial()],
        "both": [ROWS, ROWS, ROWS, ROWS, R, R],
        "keys": [R, R, ROWS, ROWS, R, R],
        "heads": [HEADS, HEADS, HEADS, HEADS, R, R],
    }.items():
        found = kind.mapped(spread(mesh, PLACES[place], "replicated")).results()
        assert [x.placements[0] for x in found] == expected, place
    of = [distribute_tensor(x, mesh, [HEADS]) for x in kind.arrays]
    slopes = distribute_tensor(torch.ones(4), mesh, [Shard(0)]).requires_grad_()
    F(*of, bias=biases.Alibi(slopes)).sum().backward()
    assert slopes.grad.placements == (Shard(0),)


def uneven():
    """Batch entries and queries that do not divide."""
    draw = torch.Generator().manual_seed(0)
    kind = Kind(
        (3, 33, 4, 16), mask=masks.LengthMask(torch.tensor([5, 0, 33])), bias=torch.randn(3, 1, 33, 33, generator=draw)
    )
    for more in ({}, {"is_causal": True}, dropout(False)):
        kind.options |= more
        for place in ("batch", "queries"):
            check(kind, 2, PLACES[place])
    check(Kind((1, 33, 2, 16), kv_length=44, **dropout(False)), 2, ((ROWS,), (R,)))
    check(Kind((1, 8, 2, 16), is_causal=True), 2, PLACES["batch"])  # of which one rank has none


def grown():
    """A bias or mask has more axes than the query, or a batch where it has one entry."""
    draw = torch.Generator().manual_seed(0)
    bias, mask = torch.randn(3, 1, 1, 44, 44, generator=draw), torch.rand(5, 3, 1, 1, 44, 44, generator=draw) < 0.8
    for place in ("heads", "queries", "whole"):
        for options in ({"bias": bias[:, 0]}, {"bias": bias, "is_causal": True}, {"mask": mask}):
            kind = Kind((1, 44, 4, 16), **options)
            expected = F(*kind.arrays, **options, implementation="exact")
            part = kind.mapped(spread(mesh_of(2), PLACES[place]))
            for implementation in ("exact", "tiled"):
                compare(
                    [F(*part.arrays, **part.options, implementation=implementation).full_tensor()], [expected], 2e-5
                )


def few_key_heads():
    """Key heads that are fewer than the ranks are on all of them, and each rank takes the one it needs."""
    places = (HEADS,), (R,)
    for name in ("one key head, causal", "one key head, dropout per head"):
        check(kinds(44)[name], 2, places)
    pullbacks(2, places, kinds(44)["one key head, causal"])


def few_key_heads_on_two_axes():
    kind = Kind((2, 24, 8, 16), kv_heads=2, **dropout(False))
    check(kind, 4, ((HEADS, HEADS), (R, R)))
    pullbacks(4, ((HEADS, HEADS), (R, R)), Kind((2, 24, 8, 16), kv_heads=2))
    shared = [x.detach().clone() for x in kind.arrays]
    part = [distribute_tensor(x, mesh_of(4), [HEADS, HEADS]) for x in shared]
    assert "key has 2 heads, which do not divide by the 4 ranks of mesh dimension 'data' and" in error_of(F, *part)


def hidden_padding():
    """NaN behind a mask does not show."""
    kind = Kind(mask=masks.LengthMask(torch.tensor([40, 88])), **dropout(False))
    expected = kind.truth()[0]
    kind.arrays[1].data[0, 40:], kind.arrays[2].data[0, 40:] = torch.nan, torch.nan
    for place in ("batch", "heads", "queries", "both", "keys"):
        part = kind.mapped(spread(mesh_of(2), PLACES[place]))
        compare([F(*part.arrays, **part.options, implementation="tiled").full_tensor()], [expected], 2e-5)


def pullbacks(size, places, kind=None):
    kind, draw = kind or kinds(32)["grouped, bias"], torch.Generator().manual_seed(0)
    length, heads = kind.arrays[0].shape[1:3]
    slopes, sinks, bias = (torch.randn(x, generator=draw) for x in (heads, heads, (2, heads, length, length)))
    options = {"mask": masks.CausalMask(), "bias": biases.Alibi(slopes) + bias, "sinks": sinks}
    for guests in ("plain", "replicated"):
        kind.options = dict(options)
        part = kind.mapped(spread(mesh_of(size), places, guests))
        output, pullback = aa.dot_product_attention_vjp(*part.arrays, **part.options)
        expected, of_whole = aa.dot_product_attention_vjp(*kind.arrays, **kind.options)
        query, key, value, of_bias, sinks = pullback(output)
        given = [*part.arrays, *part.options["bias"].arrays(), part.options["sinks"]]
        found = [query, key, value, *of_bias, sinks]
        for x, y in zip(found, given, strict=True):
            assert type(x) is type(y)
            assert not isinstance(x, DTensor) or x.placements == y.placements
        query, key, value, of_bias, sinks = of_whole(expected)
        found = [x.full_tensor() if isinstance(x, DTensor) else x for x in (output, *found)]
        compare(found, [expected, query, key, value, *of_bias, sinks], 2e-5)


def weights_and_partials(size, places):
    kind = kinds(32)["grouped, bias"]
    part = kind.mapped(spread(mesh_of(size), places))
    with torch.no_grad():
        found = aa.dot_product_attention_weights(*part.arrays[:2], is_causal=True).full_tensor()
        compare([found], [aa.dot_product_attention_weights(*kind.arrays[:2], is_causal=True)], 2e-5)
        found = aa.dot_product_attention_partial(*part.arrays, **part.options, is_causal=True)
        expected = aa.dot_product_attention_partial(*kind.arrays, **kind.options, is_causal=True)
        compare([x.full_tensor() for x in found], expected, 2e-5)
        compare([merge(found, found).output.full_tensor()], [expected.output], 2e-5)


def engines():
    """A rank's part may go to any implementation."""
    kind, pullback = Kind((2, 88, 4, 16), is_causal=True), aa.dot_product_attention_vjp
    for place in ("batch", "heads"):
        for implementation in ("exact", "tiled", "fused"):
            check(kind, 2, PLACES[place], implementation=implementation)
        part = kind.mapped(spread(mesh_of(2), PLACES[place]))
        assert aa.explain(*part.arrays, **part.options).engine == "sdpa"
    for implementation in ("exact", "tiled"):
        check(kinds()["dropout per head, causal"], 2, PLACES["queries"], implementation=implementation)
        check(kinds()["grouped, dropout per head"], 2, PLACES["heads"], implementation=implementation)
    for place in ("both", "keys"):
        part = kind.mapped(spread(mesh_of(2), PLACES[place]))
        plan = aa.explain(*part.arrays, **part.options)
        assert (plan.implementation, plan.engine) == ("fused", "sdpa")
        assert aa.explain(*part.arrays, **part.options, bias=torch.zeros(4, 1, 1)).implementation == "tiled"
        assert f"{'zigzag ring' if place == 'both' else 'reduce'} over mesh dimension 'seq', 2 devices" in str(plan)
        assert "it gives no row statistics" in error_of(F, *part.arrays, implementation="exact")
        said = error_of(aa.dot_product_attention_weights, *part.arrays[:2])
        assert "parts of several devices" in said
        assert "knows no sequence over mesh dimension 'seq'" in error_of(pullback, *part.arrays)
        assert "partials know no sequence_axis" in error_of(aa.dot_product_attention_partial, *part.arrays)


def second_derivatives():
    for place in ("batch", "heads", "queries", "whole"):
        for implementation in ("exact", "tiled"):
            found = []
            kind = Kind((2, 16, 2, 8), is_causal=True)
            for part in (kind.mapped(spread(mesh_of(2), PLACES[place])), kind):
                wanted = [x.requires_grad_() for x in part.arrays]
                output = F(*wanted, **part.options, implementation=implementation)
                first = torch.autograd.grad((output * part.weights).sum(), wanted, create_graph=True)
                found.append(torch.autograd.grad(sum(x.square().sum() for x in first), wanted))
            compare([x.full_tensor() for x in found[0]], found[1], 2e-5)


def compiled():
    for place in ("batch", "heads", "queries"):
        kind = Kind((2, 32, 4, 16), is_causal=True)
        part = kind.mapped(spread(mesh_of(2), PLACES[place]))
        attend = torch.compile(partial(F, implementation="tiled", **part.options), backend="aot_eager", fullgraph=True)
        wanted = [x.requires_grad_() for x in part.arrays]
        output = attend(*wanted)
        found = [output, *torch.autograd.grad((output * part.weights).sum(), wanted)]
        compare([x.full_tensor() for x in found], kind.truth(), 2e-5)


def mistakes(size):
    mesh, others = mesh_of(size), [R] * (size // 2 - 1)
    plain = torch.randn(2, 32, 4, 8)

    def placed(*placements, x=plain):
        return distribute_tensor(x, mesh, [*others, *placements])

    query, where = placed(ROWS), "mesh dimension 'seq'"
    summed = DTensor.from_local(plain, mesh, [*others, Partial()], run_check=False)
    short = placed(ROWS, x=plain[:, :31])
    other = distribute_tensor(plain, init_device_mesh("cpu", (1, size)), [R, ROWS])
    parted = (placed(BATCH), placed(HEADS), placed(HEADS))
    one_head, ranks = placed(HEADS, x=plain[:, :, :1]), size // 2 if size == 4 else size
    sinks = {"sinks": placed(R, x=plain[0, 0, :, 0])}
    unlike, alike = f"on {where}, key and value", "redistribute key and value to Shard(dim="
    for said, arguments, options in (
        ("TypeError: key is a plain tensor beside DTensors: distribute it on the same mesh", (query, plain, plain), {}),
        ("TypeError: query is a plain tensor beside DTensors", (plain, query, query), {}),
        ("TypeError: query is a plain tensor beside a bias, mask or sinks", (plain,) * 3, sinks),
        ("distribute both on one mesh", (query, other, other), {}),
        (f"key is Shard(dim=1) on {where}, value Replicate(): redistribute them alike", (query, query, placed(R)), {}),
        (f"key is Partial(sum) on {where}, a sum over ranks: redistribute it", (query, summed, summed), {}),
        (f"the depth of query is sharded on {where}: redistribute it to Replicate(), or to", (placed(DEPTH),) * 3, {}),
        (f"query is Shard(dim=0) {unlike} Shard(dim=2): {alike}0)", parted, {}),
        (f"query is Shard(dim=0) {unlike} Replicate(): {alike}0)", (placed(BATCH), placed(R), placed(R)), {}),
        (f"query is Shard(dim=1) {unlike} Shard(dim=2): {alike}1), or to Replicate()", (query, *parted[1:]), {}),
        (f"query is Replicate() {unlike} Shard(dim=2): redistribute them to", (placed(R), *parted[1:]), {}),
        (f"q_length 31 does not divide by the {ranks} ranks of {where}: pad to 32 and hide the", (short,) * 3, {}),
        (f"key has 1 heads, which do not divide by the 2 ranks of {where}", (placed(HEADS), one_head, one_head), {}),
        ("incompatible", (query,) * 3, {"bias": torch.zeros(16, 32)}),
        ("sinks have shape (3,)", (query,) * 3, {"sinks": torch.zeros(3)}),
    ):
        found = error_of(F, *arguments, **options)
        assert said.lower() in found.lower(), (said, found)
    if size == 4:
        both = distribute_tensor(plain, mesh, [ROWS, ROWS])
        said = "ValueError: lengths are sharded on mesh dimension 'data' and mesh dimension 'seq': redistribute so that"
        assert said in error_of(F, both, both, both)


def cases(size):
    """By name."""
    found = {}
    if size == 4:
        for place, placements in ON_TWO_AXES.items():
            for name in OF_FOUR:
                kind = kinds(24)[name]
                found[f"{place}: {name}"] = partial(check, kind, 4, placements)
            found[f"{place}: bits"] = partial(bits, 4, placements, **dropout(False))
        found["pullbacks"] = partial(pullbacks, 4, ON_TWO_AXES["batch, heads"])
        found["few key heads"] = few_key_heads_on_two_axes
        return found | {"mistakes": partial(mistakes, 4)}
    for place, placements in PLACES.items():
        for name, kind in kinds(44).items():
            if "one key head" in name and place == "heads":  # which a key head cannot be
                continue
            some = {"whole": OF_FOUR, "queries": OF_ONE_LENGTH, "keys": OF_ONE_LENGTH}.get(place, (name,))
            if name in some:  # where ranks exchange keys, `test_torch_ranks` has the kernel
                more = {"implementation": "tiled"} if place in ("both", "keys") else {}
                found[f"{place}: {name}"] = partial(check, kind, 2, placements, **more)
            guests = {"both": "sharded", "heads": "replicated"}.get(place)
            if guests and {"bias", "mask", "sinks"} & {*kind.options} and "," not in name:
                found[f"{place}: {name}, {guests}"] = partial(check, kind, 2, placements, guests)
        for name, broadcast in (("a mask", True), ("each head", False)):
            found[f"{place}: bits of {name}"] = partial(bits, 2, placements, **dropout(broadcast))
    for place in ("batch", "heads", "queries", "both"):
        for name in ("none", "causal", "segments", "dense"):
            found[f"what is sent, {place}: {name}"] = partial(collectives, place, kinds(44)[name])
    for place in ("batch", "heads", "queries"):
        found[f"pullbacks, {place}"] = partial(pullbacks, 2, PLACES[place])
        found[f"weights and partials, {place}"] = partial(weights_and_partials, 2, PLACES[place])
    more = {
        "placements of gradients": placements_of_gradients,
        "uneven": uneven,
        "grown": grown,
        "hidden padding": hidden_padding,
    }
    more |= {
        "few key heads": few_key_heads,
        "engines": engines,
        "second derivatives": second_derivatives,
        "compiled": compiled,
        "mistakes": partial(mistakes, 2),
    }
    return found | more


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    @cache
    def of(size):
        return once(tmp_path_factory, f"dtensors-{size}", lambda folder: outcomes(MODULE, size, folder))

    return of


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in (2, 4) for name in cases(size)])
def test_dtensors_of_several_ranks(ranks, size, name):
    assert ranks(size)[name] == ["ok"] * size


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def gradients(arrays, options, implementation):
    arrays = [x.detach().requires_grad_() for x in arrays]
    output = F(*arrays, implementation=implementation, **options)
    return [output, *torch.autograd.grad(output.square().sum(), arrays)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("implementation", ["exact", "tiled", None])
def test_what_is_plain_beside_dtensors(mesh, implementation, name):
    whole = [distribute_tensor(x, mesh, [HEADS]) for x in (Q, K, V)]
    found = gradients(whole, CALLS[name], implementation)
    expected = gradients((Q, K, V), CALLS[name], "exact" if implementation is None else implementation)
    for x, y in zip(found, expected, strict=True):
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), y, atol=2e-5, rtol=1e-4)


def test_a_mesh_of_one_rank_exchanges_nothing(mesh):
    x = distribute_tensor(Q, mesh, [ROWS])
    assert F(x, x, x, implementation="exact").placements == (ROWS,)
    assert aa.explain(x, x, x).implementation == "fused"


def test_a_group_of_one_rank_exchanges_nothing(mesh):
    for axis in (dist.group.WORLD, mesh):
        assert torch.equal(F(Q, K, V, implementation="exact", sequence_axis=axis), F(Q, K, V, implementation="exact"))


if __name__ == "__main__":
    main({name: lambda group, case=case: case() for name, case in cases(int(sys.argv[1])).items()})
