"""DTensors: their placements say how a call is spread over a mesh, and each rank computes with its own parts.

Of batch, heads and queries every rank has its part of the logits, so that its call is one of plain tensors with an
origin in the whole. Where the keys are sharded, ranks exchange them along that dimension of the mesh.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention._src.interfaces import Axis
from anyattention._src.rules.by_rule import PAIRS, ByRule
from anyattention.extend import Call

LENGTH = -3  # the axis of query, key and value
#: What stands at which axis of [batch..., length, heads, depth] and others, from the last one on; batch axes follow.
ROWS, COLUMNS = ("batch", "rows", "heads", "depth"), ("batch", "columns", "heads", "depth")
STATISTICS = ("batch", "heads", "rows")


def is_spread(x: Any) -> bool:
    """Whether it is a DTensor, whose module takes half a second to import."""
    kind = type(x)
    return kind is not Tensor and kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed.")


def meaning(axes: Sequence[str], rank: int, axis: int) -> Any:
    """What an axis of an array of this rank means; batch axes are told by their number, from the last one on."""
    back = rank - 1 - axis
    names = [name for name in reversed(axes) if name != "batch"]
    return names[back] if back < len(names) else ("batch", back - len(names))


class Placed(NamedTuple):
    """How an array was given, and what the gradient of a rank's part is."""

    shape: tuple[int, ...]
    given: tuple[Any, ...] | None  # placements; None of a plain tensor
    gradient: tuple[Any, ...]  # placements


class Layout:
    """How the logits of a call lie on a mesh, by the placements of query, key and value.

    Raises:
        ValueError: placements that do not go together.
    """

    def __init__(self, query: Any, key: Any, value: Any) -> None:
        self.mesh, rank = query.device_mesh, query.ndim
        self.placements = tuple(query.placements)
        #: By mesh dimension, which axis of the logits is sharded over it; None for none.
        self.cuts: list[Any] = [None] * self.mesh.ndim
        #: The mesh dimension over which keys are sharded too.
        self.exchange: int | None = None
        self.whole_queries = False
        #: Whether every rank has all key heads, and needs one of them.
        self.one_key_head = False
        of_length: list[int] = []
        unlike: list[str] = []
        for number, placed in enumerate(zip(query.placements, key.placements, value.placements, strict=True)):
            where = self.name(number)
            for name, placement in zip(("query", "key", "value"), placed, strict=True):
                _check(name, placement, rank, where)
            of_query, of_key, of_value = (self._axis(x, rank) for x in placed)
            if of_key != of_value:
                raise ValueError(
                    f"key is {placed[1]!r} on {where}, value {placed[2]!r}: redistribute them alike, for example value "
                    f"to {placed[1]!r}"
                )
            if self.mesh.size(number) == 1:
                continue
            if "rows" in (of_query, of_key):
                of_length.append(number)
                self.cuts[number] = "rows"
                if of_key == "rows":
                    self.exchange, self.whole_queries = number, of_query is None
                    if of_query not in (None, "rows"):
                        raise ValueError(_unlike(placed, where, rank))
                elif of_key is not None:
                    raise ValueError(_unlike(placed, where, rank))
            elif of_query == "heads" and of_key is None:
                self.cuts[number] = of_query
                unlike.append(_unlike(placed, where, rank))
            elif of_query != of_key:
                raise ValueError(_unlike(placed, where, rank))
            else:
                self.cuts[number] = of_query
        if len(of_length) > 1:
            names = " and ".join(self.name(x) for x in of_length)
            raise ValueError(f"lengths are sharded on {names}: redistribute so that one of them is Replicate()")
        self._check_heads(query.shape[-2], key.shape[-2], unlike)

    def _check_heads(self, heads: int, kv_heads: int, unlike: Sequence[str]) -> None:
        """Raise ValueError unless each rank has whole groups of heads, or a part of one."""
        over = [number for number, cut in enumerate(self.cuts) if cut == "heads"]
        parts = math.prod([self.mesh.size(number) for number in over])  # of a generator dynamo has no product
        if unlike:  # where keys are not sharded, since these heads are too few
            group, own = heads // max(kv_heads, 1), max(heads // parts, 1)
            self.one_key_head = (
                len(unlike) == len(over) and bool(kv_heads % parts) and not (heads % parts or group % own)
            )
            if not self.one_key_head:
                raise ValueError(unlike[0])
        elif kv_heads % parts:
            names = " and ".join(map(self.name, over))
            raise ValueError(
                f"key has {kv_heads} heads, which do not divide by the {parts} ranks of {names}: redistribute key and "
                "value to Replicate() there"
            )

    def name(self, number: int) -> str:
        """A dimension of the mesh as messages say it."""
        names = self.mesh.mesh_dim_names
        return f"mesh dimension {names[number]!r}" if names else f"mesh dimension {number}"

    @staticmethod
    def _axis(placement: Any, rank: int) -> Any:
        return meaning(ROWS, rank, placement.dim % rank) if placement.is_shard() else None

    def where(self, axes: Sequence[str], shape: Sequence[int]) -> tuple[Any, ...]:
        """The placements of an array as the logits lie.

        What has keys alone goes with these; what has queries too, or is dense, has all keys.
        """
        from torch.distributed.tensor import Replicate, Shard

        found: list[Any] = []
        for number, cut in enumerate(self.cuts):
            of_keys = number == self.exchange and "columns" in axes and "rows" not in axes
            cut = "columns" if of_keys else None if number == self.exchange and self.whole_queries else cut
            places = [
                Shard(axis)
                for axis, size in enumerate(shape)
                if size != 1 and cut is not None and meaning(axes, len(shape), axis) == cut
            ]
            found.append(places[0] if places else Replicate())
        return tuple(found)

    def gradient(self, placements: Sequence[Any]) -> tuple[Any, ...]:
        """Those of the gradients of parts that are placed so: sums where ranks with other logits have the same part.

        Over the ranks that exchange keys they are sums already.
        """
        from torch.distributed.tensor import Partial

        pairs = enumerate(zip(placements, self.cuts, strict=True))
        return tuple(
            Partial() if not x.is_shard() and cut is not None and number != self.exchange else x
            for number, (x, cut) in pairs
        )


def _check(name: str, placement: Any, rank: int, where: str) -> None:
    """Raise ValueError for a placement that no call can have."""
    heads = rank - 2
    if placement.is_partial():
        raise ValueError(
            f"{name} is {placement!r} on {where}, a sum over ranks: redistribute it to Replicate() or Shard()"
        )
    if type(placement).__name__ not in ("Shard", "Replicate"):
        raise ValueError(f"{name} is {placement!r} on {where}: redistribute it to Shard() or Replicate()")
    if placement.is_shard() and placement.dim % rank == rank - 1:
        raise ValueError(
            f"the depth of {name} is sharded on {where}: redistribute it to Replicate(), or to heads, Shard({heads})"
        )


def _unlike(placed: Sequence[Any], where: str, rank: int) -> str:
    query, key, _ = placed
    length = query.is_shard() and query.dim % rank == rank - 3
    others = f"them to {query!r}"
    if query.is_shard():
        others = f"key and value to {query!r}" + (", or to Replicate()" if length else "")
    return f"query is {query!r} on {where}, key and value {key!r}: redistribute {others}"


def localized(call: Call, axis: Axis | None) -> tuple[Call, Axis | None]:
    """The call of this rank's parts, and the axis over which its keys are exchanged; a call of plain tensors as it is.

    Raises:
        TypeError, ValueError: DTensors and others where there must be one kind, or placements that do not go together.
    """
    query, key, value, bias, mask, *_, sinks = call.operands
    if type(query) is type(key) is type(value) is Tensor and bias is mask is sinks is None:
        return call, axis
    named = {name: x for name, x in zip(("query", "key", "value"), call.operands, strict=False) if x is not None}
    if not any(map(is_spread, (*named.values(), *_guests(call)))):
        return call, axis
    for name, x in named.items():
        if not is_spread(x):
            of = "DTensors" if name != "query" or is_spread(key) else "a bias, mask or sinks that are DTensors"
            raise TypeError(
                f"{name} is a plain tensor beside {of}: distribute it on the same mesh, as "
                "torch.distributed.tensor.distribute_tensor does"
            )
        if x.device_mesh != query.device_mesh:
            raise ValueError(f"query is on {query.device_mesh}, {name} on {x.device_mesh}: distribute both on one mesh")
    layout = Layout(query, key, key if value is None else value)
    return Spreading(call, layout).local()


def _guests(call: Call) -> list[Any]:
    bias, mask, sinks = call.operands.bias, call.operands.mask, call.operands.sinks
    return [x for guest in (bias, mask, sinks) for x in (guest.arrays() if isinstance(guest, ByRule) else [guest])]


class Spreading:
    """A call of DTensors: its parts, and how what comes of them lies in the whole."""

    def __init__(self, call: Call, layout: Layout) -> None:
        self.call, self.layout = call, layout
        self.placed: dict[str, list[Placed]] = {}

    def local(self) -> tuple[Call, Axis | None]:
        """The call of this rank's parts, and the axis of its exchange."""
        call = self.call
        if call.operands.origin is not None:
            raise ValueError("origin and whole are for plain tensors: DTensors say where they are by their placements")
        query, key, value, bias, mask, *_, sinks = call.operands
        operands = call.operands._replace(
            query=self.part("query", query, ROWS),
            key=self.part("key", key, COLUMNS),
            value=None if value is None else self.part("value", value, COLUMNS),
            bias=self.guest("bias", bias),
            mask=self.guest("mask", mask),
            sinks=None if sinks is None else self.part("sinks", sinks, ("heads",) if sinks.ndim == 1 else STATISTICS),
        )
        if is_spread(operands.dropout_key):
            operands = operands._replace(dropout_key=operands.dropout_key.full_tensor())
        axis, options = self.axis(), call.options
        if axis is not None or self.knows_its_place():
            first, whole = self.origin(query, key)
            operands, options = operands._replace(origin=first), replace(options, whole=whole)
        return Call(backend=call.backend, operands=operands, options=options, restore=self), axis

    def axis(self) -> Axis | None:
        """The mesh dimension along which keys are exchanged."""
        layout, number = self.layout, self.layout.exchange
        if number is None:
            return None
        group, rank = layout.mesh.get_group(number), layout.mesh.get_local_rank(number)
        size, name = layout.mesh.size(number), layout.name(number)
        for what, x in (("q_length", self.call.operands.query), ("kv_length", self.call.operands.key)):
            if x.shape[LENGTH] % size and not (layout.whole_queries and what == "q_length"):
                raise ValueError(
                    f"{what} {x.shape[LENGTH]} does not divide by the {size} ranks of {name}: pad to "
                    f"{-(-x.shape[LENGTH] // size) * size} and hide the rest with masks.LengthMask"
                )
        return Axis(group, size, name, rank, local=True, whole_queries=layout.whole_queries)

    def knows_its_place(self) -> bool:
        """Whether something of the call depends on which part of the whole it is of."""
        cuts = [x for x in self.layout.cuts if x is not None]
        bias, mask, dropout = self.call.operands.bias, self.call.operands.mask, self.call.options.dropout
        if dropout is not None and (not dropout.broadcast or "rows" in cuts):
            return True
        ruled = isinstance(bias, ByRule) or isinstance(mask, ByRule)
        return ruled and ("rows" in cuts or ("heads" in cuts and bool(getattr(bias, "functions", ()))))

    def origin(self, query: Any, key: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The position of the part in the whole, and the sizes of that: of batch axes, heads, queries and keys."""
        *batch, row, head, _ = _start(query)
        *sizes, rows, heads, _ = query.shape
        column = _start(key)[LENGTH]
        return (*batch, head, row, column), (*sizes, heads, rows, key.shape[LENGTH])

    def part(self, name: str, x: Any, axes: Sequence[str]) -> Tensor:
        """The part that this rank has of an array whose axes mean this; its place is noted under the name."""
        from torch.distributed.tensor import DTensor

        layout = self.layout
        given = tuple(x.placements) if is_spread(x) else None
        if given is None:
            x = DTensor.from_local(x, layout.mesh, [_replicate()] * layout.mesh.ndim, run_check=False)
        elif x.device_mesh != layout.mesh:
            raise ValueError(f"query is on {layout.mesh}, {name} on {x.device_mesh}: distribute both on one mesh")
        target = given if name in ("query", "key", "value") and given else layout.where(axes, x.shape)
        if tuple(x.placements) != target:
            x = x.redistribute(layout.mesh, target)
        gradient = layout.gradient(target)
        self.placed.setdefault(name, []).append(Placed(tuple(x.shape), given, gradient))
        own = x.to_local(grad_placements=gradient)
        return own[..., self._key_head(), :] if layout.one_key_head and name in ("key", "value") else own

    def _key_head(self) -> slice:
        """The one key head that this rank needs of all."""
        query, key = self.call.operands[:2]
        first = _start(query)[-2] // (query.shape[-2] // key.shape[-2])
        return slice(first, first + 1)

    def guest(self, name: str, x: Any) -> Any:
        """The part that this rank has of a bias or mask."""
        if isinstance(x, ByRule):
            return x.part(lambda array, axes: self.part(name, array, axes))
        return self.part(name, x, PAIRS) if isinstance(x, Tensor) else x

    def __call__(self, found: Tensor) -> Any:
        """The result as a DTensor: the output, or weights where these are wanted."""
        return self.whole(found, PAIRS if self.call.options.weights_only else ROWS)

    def whole(self, x: Tensor, axes: Sequence[str]) -> Any:
        """The DTensor of parts whose axes mean this; a bias or mask may have given them more axes than query has."""
        from torch.distributed.tensor import Shard

        query, rank = self.call.operands.query, x.ndim
        sizes = {meaning(ROWS, query.ndim, axis): size for axis, size in enumerate(query.shape[:-1])}
        sizes["columns"] = self.call.operands.key.shape[LENGTH]
        shape = []
        for axis in range(rank):
            size = sizes.get(mean := meaning(axes, rank, axis), 1)
            shape.append(size if size != 1 or mean in self.layout.cuts else x.shape[axis])
        if axes is not ROWS:
            return self.dtensor(x, shape, self.layout.where(axes, shape))
        placements, more = self.layout.placements, rank - query.ndim
        if more:  # dynamo does not trace what makes new placements
            placements = tuple([Shard(y.dim + more) if y.is_shard() else y for y in placements])
        return self.dtensor(x, shape, placements)

    def partial(self, output: Tensor, *statistics: Tensor) -> tuple[Any, ...]:
        """The same of the results of a partial."""
        return self.whole(output, ROWS), *(self.whole(x, STATISTICS) for x in statistics)

    def dtensor(self, x: Tensor, shape: Sequence[int], placements: Sequence[Any]) -> Any:
        """The DTensor of this shape, of which `x` is this rank's part."""
        from torch.distributed.tensor import DTensor

        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= max(size, 1)
        options = {"run_check": False, "shape": torch.Size(shape), "stride": tuple(reversed(stride))}
        return DTensor.from_local(x.contiguous(), self.layout.mesh, placements, **options)

    def pullback(self, function: Callable[[Tensor], tuple[Any, ...]]) -> Callable[[Any], tuple[Any, ...]]:
        """From the pullback of the parts that of the DTensors."""

        def pulled(doutput: Any) -> tuple[Any, ...]:
            dquery, dkey, dvalue, dbias, *dsinks = function(self.gradient_of(doutput))
            if self.layout.one_key_head:
                dkey, dvalue = (self._of_all_heads(x) for x in (dkey, dvalue))
            names, found = ("query", "key", "value", "bias", "sinks"), (dquery, dkey, dvalue, dbias, *dsinks)
            return tuple(self._given(name, x) for name, x in zip(names, found, strict=False))

        return pulled

    def _of_all_heads(self, x: Tensor) -> Tensor:
        """The gradient of all key heads, from that of the one that this rank needs."""
        whole = x.new_zeros((*x.shape[:-2], self.call.operands.key.shape[-2], x.shape[-1]))
        whole[..., self._key_head(), :] = x
        return whole

    def gradient_of(self, doutput: Any) -> Tensor:
        """The part that this rank has of the gradient of the output."""
        mesh = self.layout.mesh
        if not is_spread(doutput):
            doutput = self.dtensor(doutput, doutput.shape, [_replicate()] * mesh.ndim)
        return doutput.redistribute(mesh, self.layout.placements).to_local()

    def _given(self, name: str, x: Any) -> Any:
        """A gradient, or those of a bias by rule, as the array was given."""
        if isinstance(x, tuple):
            return tuple(None if y is None else self._as(self.placed[name][n], y) for n, y in enumerate(x))
        return None if x is None else self._as(self.placed[name][0], x)

    def _as(self, placed: Placed, x: Tensor) -> Any:
        spread = self.dtensor(x, placed.shape, placed.gradient)
        return spread.full_tensor() if placed.given is None else spread.redistribute(self.layout.mesh, placed.given)


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _start(x: Any) -> tuple[int, ...]:
    """The position of this rank's part in the whole: of each dimension in turn, parts as `torch.chunk` cuts them."""
    starts, sizes = [0] * x.ndim, list(x.shape)
    for number, placement in enumerate(x.placements):
        if placement.is_shard():
            axis, rank = placement.dim, x.device_mesh.get_local_rank(number)
            part = -(-sizes[axis] // x.device_mesh.size(number))
            first = min(rank * part, sizes[axis])
            starts[axis], sizes[axis] = starts[axis] + first, min(part, sizes[axis] - first)
    return tuple(starts)
