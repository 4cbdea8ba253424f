"""A sequence over the ranks of a process group: two and three processes, output and all gradients against the whole."""

import pytest
import torch

import anyattention as aa
from tests.backends.gloo import Kind, compare, kinds, main, outcomes, per_head

F = aa.dot_product_attention


def cut_for(group):
    """What cuts arrays into this rank's part: rows, and the columns of what has columns alone."""
    import torch.distributed as dist

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


def check(kind, group):
    """Output and gradients of this rank's part are those of the whole."""
    cut, expected = cut_for(group), kind.truth()
    found = kind.mapped(cut).results(sequence_axis=group)
    compare(found, [cut(x, axes) for x, axes in zip(expected, kind.axes(), strict=True)], kind.tolerance)


def cases(size):
    found = {name: lambda group, kind=kind: check(kind, group) for name, kind in kinds(44 * size).items()}
    return found


SIZES = (2, 3)
NAMES = {size: [*cases(size)] for size in SIZES}


@pytest.fixture(scope="module", params=SIZES)
def ranks(request, tmp_path_factory):
    return request.param, outcomes("tests.backends.test_torch_ranks", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", sorted({name for names in NAMES.values() for name in names}))
def test_cases(ranks, name):
    size, found = ranks
    if name in NAMES[size]:
        assert found[name] == ["ok"] * size


if __name__ == "__main__":
    main(cases)
