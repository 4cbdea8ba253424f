"""A sequence over several devices: which exchange between them serves a call, and what of it travels.

Ring: queries stay, and keys go once around all devices. In zigzag a device holds one half shard from the start of the
sequence and one from its end, so that a causal mask leaves each as much to do. Gather: every device gets all keys.
Reduce: every device has all queries, which are few, and the results over its own keys are joined.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

from anyattention._src.call import Call
from anyattention._src.interfaces import Axis

Array = Any
FEW = 64  # queries, of which every device may as well have all
SHORT = 2**22  # bytes of keys and values, which every device may as well have all of
_BYTES = {"float64": 8, "float32": 4}


class Spread(NamedTuple):
    """How a call is computed on several devices; hashable."""

    axis: Any  # as the library knows it
    size: int  # devices
    name: str  # as messages say it
    local: bool  # whether operands are this device's parts
    exchange: str  # "ring", "gather" or "reduce"
    zigzag: bool
    skip: bool  # leave out shards of keys that the mask's rule hides
    asked: bool = True  # whether the caller named the axis; else whole arrays say it
    kernel: bool = False  # whether `Tiles.kernel` computes parts of which every query sees every key

    @property
    def whole_queries(self) -> bool:
        """Whether every device has all queries."""
        return self.exchange == "reduce"


def spread(call: Call, axis: Axis, asked: str | None = None) -> Call:
    """The call with what says how it is spread, by the exchange that is `asked` for, if any.

    Where arrays say that they are sharded, but a call like theirs cannot be spread, it stays what it is.

    Raises:
        ValueError: lengths that do not divide by the devices, or an exchange that does not serve the call.
    """
    q_length, kv_length = call.lengths
    if axis.local and asked == "reduce" and asked in axis.exchanges:  # which plain tensors cannot say
        axis = axis._replace(whole_queries=True)
    if axis.local:
        q_length, kv_length = q_length * (1 if axis.whole_queries else axis.size), kv_length * axis.size
    exchange = _exchange(call, axis, q_length, kv_length, asked)
    lengths = (("q_length", q_length), ("kv_length", kv_length))[exchange == "reduce" :]
    if not axis.asked and any(length % axis.size or length == axis.size for _, length in lengths):
        return call
    for name, length in lengths:
        if length % axis.size:
            raise ValueError(
                f"{name} {length} does not divide by the {axis.size} devices of {axis.name}: pad to "
                f"{-(-length // axis.size) * axis.size} and hide the rest with masks.LengthMask"
            )
        if length == axis.size and exchange == "ring":
            raise ValueError(
                f"{name} {length} is one for each device of {axis.name}: a ring needs two or more. Gather the arrays, "
                "which are small, and leave sequence_axis out"
            )
    dropout = call.options.dropout
    if dropout is not None and not dropout.broadcast and axis.others:
        raise NotImplementedError(
            f"dropout of each head, of parts along {', '.join(axis.others)} too: its bits are those of a batch entry "
            "and head of the whole, which parts do not tell. Let the sequence axis alone be manual, as in "
            "jax.shard_map(axis_names=...), or pass broadcast_dropout=True"
        )
    halves = exchange == "ring" and q_length == kv_length and not kv_length % (2 * axis.size)
    mask = call.structure
    # Dropout has no closed form of hidden keys, which then must have no weight.
    sure = not mask.rest and mask.kv_lengths is mask.kv_ids is None and mask.band_shows(q_length, kv_length)
    skip = call.operands.mask is not None and (dropout is None or (sure and call.operands.bias is None))
    zigzag = halves and skip and mask.right is not None and mask.left is None
    found = Spread(axis.axis, axis.size, axis.name, axis.local, exchange, zigzag, skip, axis.asked)
    operands, options = call.operands, replace(call.options, spread=found)
    if axis.local and operands.origin is None:
        first = 0 if exchange == "reduce" else axis.index * call.lengths[0]
        operands = operands._replace(origin=(first, axis.index * call.lengths[1]))
        options = replace(options, whole=(q_length, kv_length))
    return replace(call, operands=operands, options=options)


def remark(call: Call) -> str:
    """As `explain` says it."""
    way, size = call.options.spread, call.options.spread.size
    if way.exchange == "reduce":
        return f"reduce over {way.name}, {size} devices: all have all queries, and the results over their keys travel"
    share = _size(_columns(call) // (1 if way.local else size))
    if way.exchange == "gather":
        return f"gather over {way.name}, {size} devices: {share} of keys and values go from each to all"
    kind, turns = "zigzag ring" if way.zigzag else "ring", "1 turn" if size == 2 else f"each of {size - 1} turns"
    return f"{kind} over {way.name}, {size} devices: {share} of keys and values go on in {turns}"


def _exchange(call: Call, axis: Axis, q_length: int, kv_length: int, asked: str | None) -> str:
    """How keys meet queries."""
    if axis.whole_queries:
        return "reduce"
    if asked is not None:
        if asked not in axis.exchanges:
            raise ValueError(
                f"config(exchange={asked!r}): {call.backend.name} has {' and '.join(axis.exchanges)} over {axis.name}"
            )
        return asked
    few = q_length <= FEW and (q_length % axis.size or 8 * q_length <= kv_length)
    if few and not axis.local:
        return "reduce"
    short = _columns(call) * (axis.size if axis.local else 1) <= SHORT
    return "gather" if short and axis.exchanges[0] == "gather" else "ring"


def _columns(call: Call) -> int:
    """Bytes of keys and values as they travel."""
    numbers = sum(math.prod(x.shape) for x in call.operands[1:3] if x is not None)
    return numbers * _BYTES.get(call.options.dtype, 2)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
