"""Threads for NumPy: each worker computes tiles of its own, with the BLAS library held to one thread.

The BLAS limit is of the process, so it is taken once for all calls that overlap, and given back by the last of them.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController


class _Guard:
    """Counts the calls under way; while there are any, BLAS has one thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self.controller: Any = None
        self.limit: Any = None
        self.pool: Any = None
        self.workers = 1

    @contextmanager
    def __call__(self) -> Iterator[tuple[Any, int]]:
        with self.lock:
            if not self.calls:
                self.controller = self.controller or ThreadpoolController().select(user_api="blas")
                threads = max((library.get_num_threads() for library in self.controller.lib_controllers), default=1)
                self.workers = min(threads, len(os.sched_getaffinity(0)))
                self.limit = self.controller.limit(limits=1)
            self.calls += 1
            if self.pool is None:
                self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="anyattention")
        try:
            yield self.pool, self.workers
        finally:
            with self.lock:
                self.calls -= 1
                if not self.calls:
                    self.limit.restore_original_limits()


_guard = _Guard()


def for_each(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call `work` with every item, on as many threads as BLAS would use; the first error is raised."""
    with _guard() as (pool, workers):
        remaining = iter(items)
        lock = threading.Lock()

        def run() -> None:
            while True:
                with lock:
                    item = next(remaining, None)
                if item is None:
                    return
                work(item)

        futures = [pool.submit(run) for _ in range(min(workers, len(items)) - 1)]
        run()
        for future in futures:
            future.result()


def _after_fork() -> None:
    """In a forked child no worker is left: start anew, with the limits that BLAS had."""
    limit = _guard.limit if _guard.calls else None
    _guard.__init__()  # type: ignore[misc]
    if limit is not None:
        limit.restore_original_limits()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
