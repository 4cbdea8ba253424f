"""Threads for NumPy: each worker computes tiles of its own, with the BLAS library held to one thread."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController


class _Limits:
    """One thread for BLAS while calls are under way, unseen by others, whose own limits stay theirs.

    OpenBLAS has one number of threads for the process. While we hold it at 1, threadpoolctl reads and writes in its
    place what is set when the last call ends: a limit that somebody enters during a call and leaves after it would
    otherwise bring our 1 back, for good. MKL, and OpenMP beneath OpenBLAS, have a number for each thread.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wanted: dict[str, int] = {}  # by file, while calls are under way
        self.methods: dict[type, tuple[Any, Any]] = {}  # what really writes and reads the number
        self.shared: list[Any] = []
        self.local: list[Any] = []
        for library in ThreadpoolController().select(user_api="blas").lib_controllers:
            by_thread = library.internal_api == "mkl" or getattr(library, "threading_layer", "") == "openmp"
            (self.local if by_thread else self.shared).append(library)
            if not by_thread and type(library) not in self.methods:
                self.stand_between(type(library))

    def stand_between(self, kind: Any) -> None:
        """Let a class of threadpoolctl's read and write the number that others see."""
        # From threadpoolctl 3.8 on the public one heeds a single thread, and calls the other (seen on 3.1 to 3.8).
        name = "_real_set_num_threads" if hasattr(kind, "_real_set_num_threads") else "set_num_threads"
        write, read = self.methods[kind] = getattr(kind, name), kind.get_num_threads

        def written(library: Any, threads: int) -> Any:
            with self.lock:
                if library.filepath not in self.wanted:
                    return write(library, threads)
                self.wanted[library.filepath] = threads

        def seen(library: Any) -> Any:
            with self.lock:
                return self.wanted.get(library.filepath) or read(library)

        setattr(kind, name, written)
        kind.get_num_threads = seen

    def threads(self) -> int:
        """How many threads BLAS would use by the limits in force."""
        return max((library.get_num_threads() or 1 for library in (*self.shared, *self.local)), default=1)

    def take(self) -> None:
        """Hold BLAS to one thread."""
        with self.lock:
            for library in self.shared:
                write, read = self.methods[type(library)]
                self.wanted[library.filepath] = read(library)
                write(library, 1)

    def give_back(self) -> None:
        """Set the number that others see, but where BLAS was told another by other means."""
        with self.lock:
            for library in self.shared:
                write, read = self.methods[type(library)]
                if read(library) == 1:
                    write(library, self.wanted[library.filepath])
            self.wanted.clear()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The same for the numbers that this thread has of its own."""
        before = [library.get_num_threads() for library in self.local]
        for library in self.local:
            library.set_num_threads(1)
        try:
            yield
        finally:
            for library, threads in zip(self.local, before, strict=True):
                library.set_num_threads(threads)


class _Guard:
    """Counts the calls under way: the limit of BLAS is the first's to take, the last's to give back."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0
        self.limits: Any = None
        self.pool: Any = None

    @contextmanager
    def __call__(self) -> Iterator[int]:
        with self.lock:
            self.limits = self.limits or _Limits()
            threads = self.limits.threads()
            if not self.calls:
                self.limits.take()
            self.calls += 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            yield min(threads, cores)
        finally:
            with self.lock:
                self.calls -= 1
                if not self.calls:
                    self.limits.give_back()

    def start(self, run: Callable[[], None], count: int) -> None:
        """Let so many workers run it; none while the interpreter exits, when there are no new threads."""
        if count < 1:
            return
        try:
            with self.lock:
                if self.pool is None:
                    from concurrent.futures import ThreadPoolExecutor  # which late in an exit cannot be imported

                    self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="anyattention")
            for _ in range(count):
                self.pool.submit(run)
        except RuntimeError:
            pass


_guard = _Guard()


class _Work:
    """Items that the caller and some workers take; workers may be late, or never come."""

    def __init__(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        self.work, self.remaining = work, deque(items)
        self.changed, self.helping, self.ended = threading.Condition(), 0, False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Take items until none is left."""
        with _guard.limits.alone():
            while True:
                with self.changed:
                    if not self.remaining:
                        return
                    item = self.remaining.popleft()
                self.work(item)

    def help(self) -> None:
        """The same on a worker."""
        with self.changed:
            if self.ended:
                return
            self.helping += 1
        try:
            self.run()
        except BaseException as error:
            self.error = error
            self.remaining.clear()
        finally:
            with self.changed:
                self.helping -= 1
                self.changed.notify_all()

    def end(self) -> None:
        """Take no more items, and wait for the workers."""
        with self.changed:
            self.remaining.clear()
            self.ended = True
            self.changed.wait_for(lambda: not self.helping)


def for_each(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call `work` with every item, on as many threads as BLAS would use; the first error is raised."""
    with _guard() as workers:
        shared = _Work(work, items)
        try:
            _guard.start(shared.help, min(workers, len(items)) - 1)
            shared.run()
        finally:
            shared.end()
        if shared.error is not None:
            raise shared.error


def _after_fork() -> None:
    """In a forked child no worker is left: start anew, with the limits that BLAS had."""
    if _guard.limits is not None:
        _guard.limits.lock = threading.Lock()
        if _guard.calls:
            _guard.limits.give_back()
    _guard.lock, _guard.calls, _guard.pool = threading.Lock(), 0, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
