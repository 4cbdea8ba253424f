"""PyTorch over ranks, each a process: on CPUs with gloo and a thread each, on GPUs with NCCL and a card each."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.scale.cases import ONE, Case, asked, inputs, rows
from benchmarks.scale.memory import forget, now_mib, peak_mib

Array = Any


class Rank:
    """A process, with its part of the sequence; alone it has all of it."""

    def __init__(self, rank: int, size: int, store: str, threads: int) -> None:
        import torch

        self.torch, self.rank, self.size = torch, rank, size
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", rank) if self.cuda else torch.device("cpu")
        torch.set_num_threads(threads)
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.group: Any = None
        if size > 1:
            import torch.distributed as dist

            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            backend = "nccl" if self.cuda else "gloo"
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
            self.group = dist.group.WORLD
        self.calls: dict[Any, Callable[[], list[Array]]] = {}
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.about = {"device": name, "count": torch.cuda.device_count() if self.cuda else 0}
        self.about["version"] = torch.__version__

    def run(self, job: str, *arguments: Any) -> Any:
        """The answer to a job, which is the name of a method."""
        return getattr(self, job)(*arguments)

    def start(self) -> float:
        """What this process, or its card, holds now, in MiB; its peak starts anew."""
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
            return self.torch.cuda.memory_allocated() / 2**20
        forget()
        return now_mib()

    def peak(self) -> float:
        """The most that it has held since."""
        return self.torch.cuda.max_memory_allocated() / 2**20 if self.cuda else peak_mib()

    def clear(self) -> None:
        """Forget the cases that were prepared."""
        self.calls = {}

    def function(self, case: Case) -> Callable[..., Array]:
        """What is called with query, key and value."""
        from anyattention import dot_product_attention

        options = asked(case)
        if case.implementation == "sdpa":

            def sdpa(*arrays: Array) -> Array:
                views = [x.transpose(1, 2) for x in arrays]
                attention = self.torch.nn.functional.scaled_dot_product_attention
                return attention(*views, **options).transpose(1, 2)

            return sdpa
        options |= {"implementation": case.implementation} if case.exchange == ONE else {"sequence_axis": self.group}
        return lambda *arrays: dot_product_attention(*arrays, **options)

    def call(self, case: Case) -> Callable[[], list[Array]]:
        """What computes the output of this rank's part, and the gradients if they are asked for."""
        torch, each = self.torch, case.length // self.size
        mine = slice(self.rank * each, (self.rank + 1) * each)
        parts = [torch.tensor(x[:, mine]).to(self.device, getattr(torch, case.dtype)) for x in inputs(case)]
        parts = [x.requires_grad_(case.gradient) for x in parts]
        function = self.function(case)

        def call() -> list[Array]:
            output = function(*parts)
            if not case.gradient:
                return [output]
            return [output, *torch.autograd.grad((output.float() ** 2).sum(), parts)]

        return call

    def prepare(self, case: Case) -> dict[str, Any]:
        """Those of the rows that are checked that this rank has, by number; memory; logits computed.

        Memory is the most that the first call had, beyond what the process and its part of the arrays have.
        """
        self.call(replace(case, length=16 * self.size))()  # loads code
        each, call = case.length // self.size, self.call(case)
        chosen = [(n, row - self.rank * each) for n, row in enumerate(rows(case)) if row // each == self.rank]
        before = self.start()
        with Counted() as counted:
            found = call()
        memory = self.peak() - before
        self.calls[case] = call
        get = {n: [x[:, row].detach().float().cpu().numpy() for x in found] for n, row in chosen}
        return {"rows": get, "memory_mib": memory, "logits": counted.logits}

    def seconds(self, case: Case) -> tuple[float, float]:
        """Of one call: on the clock, and of this process's processor."""
        if self.size > 1:
            self.torch.distributed.barrier()
        start, of_processor = time.perf_counter(), time.process_time()
        self.calls[case]()
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - of_processor


class Counted:
    """Counts the logits that tiles, and kernels in their place, compute in this process and all of its threads."""

    def __enter__(self) -> "Counted":
        from anyattention._src.tiles import passes
        from anyattention_backends.torch import backend

        self.logits, self.real = 0, ExitStack()
        kernel = backend.tiles.kernel
        self._count(passes, "tile_logits", lambda found, *_: int(np.prod(found[0].shape)))
        for name in ("forward", "backward") if kernel else ():
            self._count(kernel, name, lambda _, tiling, block, *rest: int(np.prod((*block.lead, *block.lengths))))
        return self

    def _count(self, owner: Any, name: str, size: Callable[..., int]) -> None:
        """Call a function as before, and add what it computes."""
        real = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            found = real(*arguments, **named)
            self.logits += size(found, *arguments)
            return found

        setattr(owner, name, counted)
        self.real.callback(setattr, owner, name, real)

    def __exit__(self, *_: object) -> None:
        self.real.close()


def joined(parts: list[dict[str, Any]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What all ranks have of the rows that are checked, as `cases.expected` has it; then of keys and values."""
    by_row = {n: x for part in parts for n, x in part["rows"].items()}
    each = zip(*(by_row[n] for n in sorted(by_row)), strict=True)
    found = [np.stack(x, axis=1) for x in each]
    return found[:2], found[2:]
