"""Threads for NumPy: each worker computes tiles of its own, with the BLAS library held to one thread."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController


class _Guard:
    """Counts the calls under way: the limit of BLAS, the process's, is the first's to take, the last's to give back."""

    def __init__(self) -> None:
        self.lock, self.calls, self.workers = threading.Lock(), 0, 1
        self.controller: Any = None
        self.limit: Any = None
        self.pool: Any = None

    @contextmanager
    def __call__(self) -> Iterator[tuple[Any, int]]:
        with self.lock:
            if not self.calls:
                self.controller = self.controller or ThreadpoolController().select(user_api="blas")
                threads = max((library.get_num_threads() for library in self.controller.lib_controllers), default=1)
                cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
                self.workers = min(threads, cores)
                self.disown()
                self.limit = self.controller.limit(limits=1)
                self.disown()
            self.calls += 1
            if self.pool is None:
                self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="anyattention")
        try:
            yield self.pool, self.workers
        finally:
            with self.lock:
                self.calls -= 1
                if not self.calls:
                    self.disown()
                    self.limit.restore_original_limits()
                    self.disown()

    def disown(self) -> None:
        """The limit is set by one thread and given back by another, where threadpoolctl lets one thread own it."""
        for library in self.controller.lib_controllers:
            getattr(library, "clear_controlling_thread", lambda force: None)(force=True)


_guard = _Guard()


def for_each(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call `work` with every item, on as many threads as BLAS would use; the first error is raised."""
    with _guard() as (pool, workers):
        remaining, lock = deque(items), threading.Lock()

        def run() -> None:
            try:
                while True:
                    with lock:
                        if not remaining:
                            return
                        item = remaining.popleft()
                    work(item)
            except BaseException:
                with lock:
                    remaining.clear()
                raise

        futures = [pool.submit(run) for _ in range(min(workers, len(items)) - 1)]
        try:
            run()
        finally:
            futures = [future for future in futures if not future.cancel()]
            wait(futures)
        for future in futures:
            future.result()


def _after_fork() -> None:
    """In a forked child no worker is left: start anew, with the limits that BLAS had."""
    if _guard.calls:
        _guard.disown()
        _guard.limit.restore_original_limits()
        _guard.disown()
    _guard.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
