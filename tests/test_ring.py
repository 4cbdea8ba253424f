"""The turns of a ring without any framework: devices are threads here, arrays are NumPy's."""

import itertools
import queue
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from anyattention import biases, config, dot_product_attention_vjp, masks, random
from anyattention._src import ring
from anyattention._src import spread as spreads
from anyattention._src.api import call_of
from anyattention._src.blocks import tree_map
from anyattention._src.implementations.tiled import prepare
from anyattention._src.interfaces import Axis, Exchange
from anyattention._src.registry import load
from anyattention._src.tiles import passes

SHAPE = 2, 96, 4, 8
LENGTH = SHAPE[1]
draw = np.random.default_rng(0)
QKV = [draw.standard_normal(SHAPE) for _ in range(3)]
BIAS = draw.standard_normal((1, 4, LENGTH, LENGTH))
IDS = np.sort(draw.integers(0, 5, (2, LENGTH)), axis=-1)
PER_HEAD = {"dropout_rng": random.key(7), "dropout_rate": 0.25, "broadcast_dropout": False}
CALLS = {
    "none": {},
    "causal": {"is_causal": True},
    "rows without keys": {"mask": masks.CausalMask(-40)},
    "lengths": {"mask": masks.LengthMask(np.array([77, 0]))},
    "segments, causal": {"mask": masks.SegmentMask(np.where(IDS == 1, 77, IDS), IDS), "is_causal": True},
    "bias, causal": {"bias": BIAS, "is_causal": True},
    "row of a bias": {"bias": BIAS[:, :, :1], "is_causal": True},
    "column of a bias": {"bias": BIAS[..., :1], "mask": BIAS > 0},
    "slopes": {"bias": biases.Alibi(np.array([0.1, 0.2, 0.3, 0.5])), "is_causal": True},
    "sinks": {"sinks": BIAS[0, :, 0, 0], "is_causal": True},
    "dropout": PER_HEAD,
    "dropout, causal": {**PER_HEAD, "is_causal": True},
}
REST = {
    **dict.fromkeys(("bias", "mask", "dropout_rng", "dtype", "scale", "logits_soft_cap", "sinks")),
    **{
        "sequence_axis": None,
        "dropout_rate": 0.0,
        "broadcast_dropout": True,
        "deterministic": False,
        "is_causal": False,
    },
}


class Threads(Exchange):
    """Devices that are threads of this process."""

    def __init__(self, size, index, world):
        super().__init__(size, index)
        self.world = world

    def send(self, arrays):
        self.world.boxes[(self.index + 1) % self.size].put([x.copy() for x in arrays])

    def receive(self, pending):
        return self.world.boxes[self.index].get(timeout=20) if pending is None else pending

    def arrived(self, arrays):
        return arrays

    def permuted(self, x, pairs):
        return self._together(x)[dict(map(reversed, pairs))[self.index]]

    def sum(self, x):
        return sum(self._together(x))

    def maximum(self, x):
        return np.max(self._together(x), axis=0)

    def add(self, x, part, start, axis):
        x = x.copy()
        x[..., start : start + part.shape[-1]] += part
        return x

    def _together(self, x):
        """The arrays of all devices."""
        self.world.seen[self.index] = x
        self.world.barrier.wait(20)
        found = list(self.world.seen)
        self.world.barrier.wait(20)
        return found


class World:
    def __init__(self, size):
        self.boxes, self.seen = [queue.Queue() for _ in range(size)], [None] * size
        self.barrier = threading.Barrier(size)


def on_devices(size, function, kind=Threads):
    """``function(exchange)`` on so many devices."""
    world = World(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda n: function(kind(size, n, world)), range(size)))


def cut(x, axis, size, index):
    """A device's part along one of the last axes, of so many."""
    n = x.shape[axis] // size
    return np.take(x, range(index * n, (index + 1) * n), axis=axis)


def of_whole(name, size, index, exchange):
    """A device's part of the block of the whole."""
    given = {**REST, **CALLS[name], **dict(zip(("query", "key", "value"), QKV, strict=True))}
    tiling, block = prepare(spreads.spread(call_of(**given), Axis("", size, ""), exchange))
    return tiling, *part_of(tiling, block, size, index)


def part_of(tiling, block, size, index):
    kinds, few = ring.kinds(tiling, block), tiling.options.spread.whole_queries

    def pair(x, kind):
        x = cut(x, -2, size, index) if kind.rows and not few else x
        return cut(x, -1, size, index) if kind.travels else x

    rows = block.rows if few else tuple(cut(x, -2, size, index) for x in block.rows)
    columns = tuple(cut(x, -2, size, index) for x in block.columns)
    return block._replace(rows=rows, columns=columns, pairs=tree_map(pair, block.pairs, kinds)), kinds


def of_parts(name, size, index, exchange):
    """The block of a device's part."""
    given, few = {**REST, **CALLS[name]}, exchange == "reduce"
    for key, x in zip(("query", "key", "value"), QKV, strict=True):
        given[key] = x if few and key == "query" else cut(x, 1, size, index)
    for key in ("bias", "mask"):
        if isinstance(x := given[key], np.ndarray) and x.shape[-2] != 1 and not few:
            given[key] = cut(x, -2, size, index)
    mask = given["mask"]
    if isinstance(mask, masks.SegmentMask):
        ids = mask.query_ids if few else cut(mask.query_ids, -1, size, index)
        given["mask"] = masks.SegmentMask(ids, cut(mask.kv_ids, -1, size, index))
    axis = Axis("", size, "", index, local=True, whole_queries=few)
    with pytest.MonkeyPatch.context() as patch, config(exchange=exchange):
        patch.setattr(load("numpy"), "axis", lambda *_: axis)
        tiling, block = prepare(call_of(**given))
    return tiling, block, ring.kinds(tiling, block)


def check(name, size, exchange, of_device, ring=ring):
    """Output and all gradients on so many devices are those of the whole, in float64."""
    output, pullback = dot_product_attention_vjp(*QKV, **CALLS[name])
    doutput = np.random.default_rng(1).standard_normal(output.shape)
    expected, few = pullback(doutput), exchange == "reduce"
    forward, backward = (ring.reduced, ring.pulled_of_reduced) if few else (ring.forward, ring.backward)
    prepared = [of_device(name, size, index, exchange) for index in range(size)]

    def compute(devices):
        tiling, block, kinds = prepared[devices.index]
        with np.errstate(all="ignore"):
            results = forward(tiling, devices, block, kinds)
            own = np.moveaxis(doutput, -2, -3)
            own = own if few else cut(own, -2, size, devices.index)
            return results[0], backward(tiling, devices, block, kinds, results, own)

    found = on_devices(size, compute)
    gradients = [x for _, x in found]

    def same(parts, right, axis=-2, heads_first=True):
        x = parts[0] if axis is None else np.concatenate(parts, axis=axis)
        right = np.moveaxis(right, -2, -3) if heads_first else right
        np.testing.assert_allclose(x.reshape(-1), right.reshape(-1), rtol=1e-7, atol=1e-9)

    same([x for x, _ in found], output, None if few else -2)
    for n in range(3):
        same([x[n] for x in gradients], expected[n], None if few and n == 0 else -2)
    if name == "slopes":
        same([x[4][0] for x in gradients], expected[3][0], None, False)
    elif "bias" in CALLS[name]:
        kind = prepared[0][2].bias[0]
        axis = -2 if kind.rows and not few else -1 if kind.travels else None
        same([x[3][0] for x in gradients], expected[3], axis, False)
    if "sinks" in CALLS[name]:
        same([x[5] for x in gradients], expected[4], None, False)


@pytest.mark.parametrize("of_device", [of_whole, of_parts])
@pytest.mark.parametrize("exchange", ["ring", "reduce"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CALLS)
def test_output_and_gradients(name, size, exchange, of_device):
    check(name, size, exchange, of_device)


MUTANTS = {  # by what is wrong: the module, and what stands there instead
    "positions of rows": ("spread", '0 if exchange == "reduce" else axis.index * call.lengths[0]', "0"),
    "positions of columns": ("spread", "(first, axis.index * call.lengths[1])", "(first, 0)"),
    "counts": ("spread", "whole=(q_length, kv_length))", "whole=call.lengths)"),
    "hidden keys": (
        "ring",
        "if self.whole.options.dropout is not None:\n            return nothing",
        "if True: return nothing",
    ),
    "gradients of hidden keys": ("ring", "dvalue = dvalue + sum_to", "sum_to"),
    "gradients one device away": ("ring", "home = exchange.receive(exchange.send(", "home = list(("),
    "columns of a bias": ("ring", "self.exchange.cut(x, start, size, -1)", "self.exchange.cut(x, 0, size, -1)"),
    "order of zigzag": ("ring", "return ring.swapped(output, -2, True)", "return output"),
    "a missing base": (
        "ring",
        "shards.joined(states[row], ring.partial(part))",
        "baseless(states[row], ring.partial(part))",
    ),
}
BASELESS = """
def baseless(one, two):
    return Partial(two.base, one.total + two.total, one.output + two.output)
"""


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_seen(name, monkeypatch):
    """Each of them makes some call above fail."""
    where, right, wrong = MUTANTS[name]
    module = {"spread": spreads, "ring": ring}[where]
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(right, wrong) + BASELESS * (where == "ring"), "mutant", "exec"), vars(mutant))
    if where == "spread":
        monkeypatch.setattr("anyattention._src.api.spread", mutant.spread)

    def passes(call, exchange, of_device):
        try:
            check(call, 4, exchange, of_device, mutant if where == "ring" else ring)
        except AssertionError:
            return False
        return True

    assert not all(passes(*each) for each in itertools.product(CALLS, ("ring", "reduce"), (of_parts, of_whole)))


@pytest.mark.parametrize("differentiated", [False, True])
def test_sends_go_on_during_the_work(differentiated, monkeypatch):
    """In each turn keys are sent before, and those of the next turn received after the work with them."""
    told = {}

    class Telling(Threads):
        def send(self, arrays):
            told.setdefault(threading.get_ident(), []).append("send")
            return super().send(arrays)

        def receive(self, pending):
            told[threading.get_ident()].append("receive")
            return super().receive(pending)

    def telling(function):
        def work(*args):
            told[threading.get_ident()].append("work")
            return function(*args)

        return work

    for name in ("seen", "pulled"):
        monkeypatch.setattr(ring.shards, name, telling(getattr(ring.shards, name)))

    def compute(devices):
        block, kinds = part_of(tiling, whole, 3, devices.index)
        results = ring.forward(tiling, devices, block, kinds)
        if differentiated:
            told[threading.get_ident()].clear()
            ring.backward(tiling, devices, block, kinds, results, results[0])
        return told[threading.get_ident()]

    given = {**REST, **dict(zip(("query", "key", "value"), QKV, strict=True))}
    tiling, whole = prepare(spreads.spread(call_of(**given), Axis("", 3, ""), "ring"))
    turn = ["send", "work", "receive"]
    if differentiated:  # gradients go on too, a turn behind
        turn = ["send", "work", "receive", "send", "receive"]
        expected = [*turn, *turn, "work", "receive", "send", "receive"]
    else:
        expected = [*turn, *turn, "work"]
    assert on_devices(3, compute, Telling) == [expected] * 3


@pytest.mark.parametrize("size", [4, 8])
def test_causal_work_is_balanced(size, monkeypatch):
    """Counted in logits: in zigzag the busiest device has at most 1.1 times the mean, together little more than one."""
    shape = 1, 4096, 1, 4
    arrays = [np.random.default_rng(n).standard_normal(shape, dtype=np.float32) for n in range(3)]
    given = {**REST, "query": arrays[0], "key": arrays[1], "value": arrays[2], "is_causal": True}
    call = call_of(**given)
    kind, counted = type(call.backend.tiles), Counter()
    logits = kind.logits

    def counting(self, query, key, *args):
        counted[threading.get_ident()] += query.shape[-2] * key.shape[-2]
        return logits(self, query, key, *args)

    monkeypatch.setattr(kind, "logits", counting)
    with threadpool_limits(1):  # or tiles would be computed on other threads
        passes.forward(*prepare(call))
    one = sum(counted.values())
    assert one < 0.7 * 4096**2
    found = {}
    for zigzag in (True, False):
        on_several = spreads.spread(call, Axis("", size, ""), "ring")
        assert on_several.options.spread.zigzag
        way = on_several.options.spread._replace(zigzag=zigzag)
        on_several.options = replace(on_several.options, spread=way)
        tiling, block = prepare(on_several)

        def compute(devices, tiling=tiling, block=block):
            counted[threading.get_ident()] = 0
            ring.forward(tiling, devices, *part_of(tiling, block, size, devices.index))
            return counted[threading.get_ident()]

        counted.clear()
        with threadpool_limits(1):
            found[zigzag] = on_devices(size, compute)
    assert max(found[True]) <= 1.1 * np.mean(found[True])
    assert sum(found[True]) <= 1.15 * one
    assert max(found[False]) > 1.5 * np.mean(found[False])
