"""Processes that talk by gloo: each runs all cases of a test module once, and the tests read what came of them.

Also the kinds of call that a sequence over several ranks is tested with.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import anyattention as aa
from anyattention import biases, masks

PAIRS = ("batch", "heads", "rows", "columns")


def outcomes(module, size, folder, case="", survivors=None, timeout=150.0):
    """What came of each case, by name, on each rank: "ok", or the text of an error; of one `case`, if it is named.

    `survivors` are the ranks that live to tell.
    """
    command = [sys.executable, "-W", "error", "-m", module, str(size), str(folder), case]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank)], **quiet) for rank in range(size)]
    end = time.monotonic() + timeout
    texts = []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=max(end - time.monotonic(), 0.1))[1])
    finally:
        for process in processes:
            process.kill()
    found = [folder / f"{rank}.json" for rank in (range(size) if survivors is None else survivors)]
    assert all(path.exists() for path in found), "\n".join(text[-2000:] for text in texts)
    ranks = [json.loads(path.read_text()) for path in found]
    return {name: [rank.get(name, "not run") for rank in ranks] for name in ranks[0]}


def once(tmp_path_factory, name, make):
    """What ``make(folder)`` returns, in JSON: made once, for all the processes of a run of tests."""
    home = tmp_path_factory.getbasetemp()
    home = (home.parent if "PYTEST_XDIST_WORKER" in os.environ else home) / name
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = home / "found.json"
        if not kept.exists():
            kept.write_text(json.dumps(make(home)))
    return json.loads(kept.read_text())


def main(cases, alone=None):
    """Run the cases, each a function of a group of its own; called in each of the processes.

    Those `alone` run only if they are named.
    """
    size, folder, only, rank = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found = {}
    some = {only: ((alone or {}) | cases)[only]} if only else cases
    for name, case in some.items():
        try:
            case(dist.new_group(timeout=timedelta(seconds=40)))
            found[name] = "ok"
        except Exception as error:  # of any kind, to be read by the test
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            found[name] = f"{traceback.format_exc(limit=-3)}{notes}"
        with open(f"{folder}/{rank}.json", "w") as file:
            json.dump(found, file)
    sys.stderr.flush()
    os._exit(0)  # without a word to ranks that are gone


class Kind:
    """A kind of call: query, key and value of the whole, and what else is passed."""

    def __init__(self, shape=(2, 88, 4, 16), kv_length=None, kv_heads=None, dtype=torch.float32, **options):
        batch, length, heads, depth = shape
        draw = torch.Generator().manual_seed(0)
        shapes = shape, *[(batch, kv_length or length, kv_heads or heads, depth)] * 2
        self.arrays = [torch.randn(x, generator=draw).to(dtype) for x in shapes]
        self.weights = torch.randn(shape, generator=draw)
        self.options = options

    @property
    def tolerance(self):
        """Of what is relative to the largest number."""
        return {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(self.arrays[0].dtype, 2e-5)

    def mapped(self, cut):
        """The same of the parts that `cut` makes of each array, which it is told the axes of."""
        found = object.__new__(Kind)
        query, *others = self.arrays
        of_rows, of_columns = (("batch", name, "heads", "depth") for name in ("rows", "columns"))
        found.arrays = [cut(query, of_rows), *(cut(x, of_columns) for x in others)]
        found.weights, found.options = cut(self.weights, of_rows), dict(self.options)
        for name, x in self.options.items():
            if name == "sinks":
                found.options[name] = cut(x, ("heads",) if x.ndim == 1 else ("batch", "heads", "rows"))
            elif hasattr(x, "part"):
                found.options[name] = x.part(cut)
            elif name in ("bias", "mask") and hasattr(x, "shape"):
                found.options[name] = cut(x, PAIRS)
        return found

    @property
    def differentiated(self):
        """The arrays that have a gradient."""
        found = list(self.arrays)
        for name in ("bias", "sinks"):
            x = self.options.get(name)
            guests = x.arrays() if hasattr(x, "arrays") else [x]
            found += [x for x in guests if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return found

    def results(self, **more):
        """The output and the gradients."""
        wanted = [x.requires_grad_() for x in self.differentiated]
        output = aa.dot_product_attention(*self.arrays, **self.options, **more)
        return [output, *torch.autograd.grad((output.float() * self.weights).sum(), wanted)]

    def axes(self):
        """What the axes of the results mean."""
        found = []

        def note(x, axes):
            found.append((x, axes))
            return x

        self.mapped(note)
        by_id = {id(x): axes for x, axes in found}
        return [("batch", "rows", "heads", "depth"), *(by_id[id(x)] for x in self.differentiated)]

    def truth(self):
        """Of the whole, by Flax's steps in float32."""
        if self.arrays[0].dtype is torch.float32:
            return self.results(implementation="exact")
        wide = object.__new__(Kind)
        wide.arrays, wide.weights, wide.options = [x.float() for x in self.arrays], self.weights, self.options
        return wide.results(implementation="exact")


def compare(found, expected, tolerance):
    """Hold the largest difference of each array, in ratio to the largest number; what is rounding alone, absolutely."""
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.shape == y.shape, (number, x.shape, y.shape)
        most = y.abs().max().item()
        error = (x.float() - y.float()).abs().max().item()
        assert error <= max(tolerance * most, 1e-5 if most < 1e-5 else 0.0), (number, error, most)


def dropout(broadcast):
    return {"dropout_rng": aa.random.key(7), "dropout_rate": 0.2, "broadcast_dropout": broadcast}


def identity(length, heads=3, **options):
    """A kind whose output shows which weights dropout keeps, and, beside zeros as logits, no more."""
    found = Kind((2, length, heads, 8), **options)
    query, key, _ = (0.0 * x for x in found.arrays)
    found.arrays = [query, key, torch.eye(length).reshape(1, length, 1, length).repeat(2, 1, heads, 1)]
    return found


def same_bits(found, expected):
    """Whether the same weights are kept."""
    kept = expected != 0.0
    assert 0.5 < kept.float().mean() < 0.9
    assert torch.equal(found != 0.0, kept)


def error_of(function, *args, **options):
    """The error that a function raises, with its notes."""
    try:
        function(*args, **options)
    except Exception as error:
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return "no error"


def kinds(length=88):
    """By name."""
    draw = torch.Generator().manual_seed(1)
    n, shape = length, (2, length, 4, 16)
    ids = torch.arange(n)[None] * torch.tensor([[5], [3]]) // n
    lonely = ids.clone()
    lonely[:, 3] = 9  # which no key has
    dense = torch.rand(2, 1, n, n, generator=draw) < 0.6
    dense[:, :, [2, n - 1]] = False

    def normal(*sizes):
        return torch.randn(sizes, generator=draw)

    def near(i, j, a, b):
        return (abs(i - j) < 9) & (a[..., :] + b > -1.0)

    made = {
        "none": {},
        "causal": {"is_causal": True},
        "causal, one query sees no key": {"mask": masks.CausalMask(-100 if n > 100 else -n // 2)},
        "causal, no query sees a key": {"mask": masks.CausalMask(-n - 5)},
        "causal by batch entry": {"mask": masks.CausalMask(torch.tensor([-7, 30]))},
        "window": {"mask": masks.LocalMask(9, 4)},
        "causal window": {"mask": masks.LocalMask(20, 0)},
        "lengths": {"mask": masks.LengthMask(torch.tensor([n // 3, n - 1]))},
        "lengths, of which one is 0": {"mask": masks.LengthMask(torch.tensor([0, n // 2]), torch.tensor([n // 2, 5]))},
        "lengths, causal": {"mask": masks.LengthMask(torch.tensor([0, n // 2])), "is_causal": True},
        "segments": {"mask": masks.SegmentMask(ids, ids)},
        "segments, causal": {"mask": masks.SegmentMask(ids, ids), "is_causal": True},
        "segments of NumPy, an id of no key": {"mask": masks.SegmentMask(lonely.numpy(), ids.numpy())},
        "not segments": {"mask": ~masks.SegmentMask(ids, ids) | masks.LocalMask(1, 1)},
        "dense": {"mask": dense},
        "dense, of NumPy": {"mask": np.tri(n)[None, None] > 0},
        "dense, one row": {"mask": torch.rand(2, 1, 1, n, generator=draw) < 0.7},
        "dense, causal": {"mask": dense, "is_causal": True},
        "a rule": {"mask": masks.Rule(near, (normal(2, n),), (normal(2, n),))},
        "bias": {"bias": normal(2, 4, n, n)},
        "bias of a head for all, causal": {"bias": normal(1, 1, n, n), "is_causal": True},
        "bias of one row": {"bias": normal(2, 4, 1, n)},
        "bias of one column": {"bias": normal(2, 4, n, 1)},
        "bias of two axes": {"bias": normal(n, n)},
        "bias of an element": {"bias": normal(1, 4, 1, 1)},
        "bias, lengths": {"bias": normal(1, 4, n, n), "mask": masks.LengthMask(torch.tensor([n // 3, n]))},
        "a scalar bias": {"bias": 0.5},
        "ALiBi": {"bias": biases.Alibi(normal(4).abs()), "is_causal": True},
        "relative": {"bias": biases.Relative(normal(8, 4), max_distance=32)},
        "a bias by rule": {
            "bias": biases.Rule(lambda i, j, a, b: a * b + 0.01 * (j - i), (normal(2, n),), (normal(2, n),))
        },
        "a bias by rule for each head": {
            "bias": biases.Rule(lambda i, j: torch.arange(4.0)[:, None, None] * 0.01 * (j - i)) + normal(4, n, 1)
        },
        "scale and cap": {"scale": 0.7, "logits_soft_cap": 2.0, "is_causal": True},
        "sinks": {"sinks": normal(4), "is_causal": True},
        "sinks of queries": {"sinks": normal(2, 4, n), "mask": masks.LengthMask(torch.tensor([0, n]))},
        "sinks of queries, causal": {"sinks": normal(2, 4, n), "is_causal": True},
        "dropout": dropout(True),
        "dropout per head": dropout(False),
        "dropout, causal": dropout(True) | {"is_causal": True},
        "dropout per head, causal": dropout(False) | {"is_causal": True},
        "dropout, segments": dropout(False) | {"mask": masks.SegmentMask(ids, ids)},
        "dropout, lengths": dropout(False) | {"mask": masks.LengthMask(torch.tensor([0, n // 3]))},
        "large logits": {"scale": 8.0},
    }
    found = {name: Kind(shape, **options) for name, options in made.items()}
    for name, more in {"grouped": {"kv_heads": 2}, "one key head": {"kv_heads": 1}}.items():
        found[f"{name}, causal"] = Kind(shape, **more, is_causal=True)
        found[f"{name}, dropout per head"] = Kind(shape, **more, **dropout(False))
    found["grouped, bias"] = Kind(shape, kv_heads=2, bias=normal(2, 4, n, n), sinks=normal(4))
    for dtype in (torch.float16, torch.bfloat16):
        found[f"{dtype}, causal".removeprefix("torch.")] = Kind(shape, dtype=dtype, is_causal=True)
    other = 2 * n + n // 2
    found["other lengths"] = Kind(shape, kv_length=other)
    found["other lengths, causal"] = Kind(shape, kv_length=other, mask=masks.CausalMask(other - n))
    found["other lengths, bias, dropout"] = Kind(shape, kv_length=other, bias=normal(4, n, other), **dropout(False))
    return found
