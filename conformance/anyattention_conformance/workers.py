"""Processes of their own: one that hangs or dies takes what it was at with it, not all the rest."""

import contextlib
import multiprocessing
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

from anyattention_conformance.targets import Outcome, TargetError

START_SECONDS = 300.0  # for imports
DEATHS = 5  # of processes, after which the target is given up


class DiedError(Exception):
    """A process ended, or was silent for too long: `why` says which, the text also what was printed last."""

    def __init__(self, why: str, said: str = "") -> None:
        super().__init__(f"{why}: {said}" if said else why)
        self.why = why


@dataclass(frozen=True)
class Recipe:
    """How a process makes what it serves: a function that can be pickled, and its arguments.

    What is made has `about`, which it says of itself, and `run`, which answers a request, as a `Target` does.
    """

    make: Callable[..., Any]
    arguments: tuple[Any, ...]


class Worker:
    """One process, and the run that it is at. After DiedError it has ended, and can be started again."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.start()

    def start(self) -> None:
        """Begin, or begin again."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        handle, log = tempfile.mkstemp(prefix="anyattention-", suffix=".log")
        os.close(handle)
        self.log = Path(log)
        self.process = context.Process(target=_serve, args=(theirs, self.recipe, log), daemon=True)
        self.process.start()
        theirs.close()
        self.run: Any = None
        self._about: dict[str, Any] | None = None
        self._allow(START_SECONDS)

    def _allow(self, seconds: float) -> None:
        self.seconds, self.deadline = seconds, monotonic() + seconds

    def ready(self) -> dict[str, Any]:
        """What it says of itself, as soon as it is ready. TargetError if it has no target."""
        if self._about is None:
            message = self.receive()
            if isinstance(message, TargetError):
                raise message
            self._about = message
        return self._about

    @property
    def about(self) -> dict[str, Any]:
        """What it says of itself."""
        return self.ready()

    def give(self, run: Any, seconds: float) -> None:
        """Start a run."""
        self.run = run
        self._allow(seconds)
        with contextlib.suppress(OSError):  # it is dead, which `receive` says
            self.connection.send(run)

    def receive(self) -> Any:
        """Its next message. DiedError if there is none until the deadline."""
        why = f"no answer within {self.seconds:g} seconds"
        try:
            if self.connection.poll(max(0.0, self.deadline - monotonic())):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            why = f"its process ended with status {code}" if code else "its process ended"
        raise DiedError(why, self.stop())

    def ask(self, *run: Any, seconds: float) -> Any:
        """The answer to one run, as soon as it is there. DiedError if there is none, or an exception in its place."""
        self.ready()
        self.give(run, seconds)
        answer = self.receive()
        if isinstance(answer, Outcome) and answer.kind == "raised":
            self.stop()
            raise DiedError(answer.message)
        return answer

    def stop(self) -> str:
        """End the process; what it last printed."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines[-1][:300] if lines else ""


class Workers:
    """Runs cases in processes of their own, each with a limit in seconds. TargetError if there is no target."""

    def __init__(self, recipe: Recipe, seconds: float = 60.0, jobs: int = 2) -> None:
        self.recipe, self.seconds, self.jobs = recipe, seconds, jobs
        self.about: dict[str, Any] = {}  # what the target says of itself

    def __call__(self, chosen: list[Any]) -> Iterator[tuple[Any, Outcome]]:
        """The outcomes, as they come.

        Runs of one shape lie together, and one process takes them from the front, the other from the back: libraries
        that compile do it once.
        """
        waiting = deque(sorted(chosen, key=lambda run: (run.case.query, run.case.key, run.dtype)))
        workers = [Worker(self.recipe) for _ in range(min(self.jobs, max(1, len(chosen) // 8)))]
        deaths = 0
        try:
            while workers:
                wait(
                    [worker.connection for worker in workers], max(0.0, min(x.deadline for x in workers) - monotonic())
                )
                for place, worker in enumerate(workers):
                    if not worker.connection.poll() and monotonic() < worker.deadline:
                        continue
                    try:
                        if worker.run is None:
                            self.about = worker.ready()
                        else:
                            yield worker.run, worker.receive()
                    except DiedError as error:
                        if worker.run is None:
                            raise TargetError(f"the target cannot be started: {error}") from None
                        yield worker.run, Outcome("died", error.why)
                        deaths += 1
                        worker.start()
                        continue
                    if deaths >= DEATHS or not waiting:
                        worker.stop()
                        del workers[place]
                        break
                    worker.give(waiting.popleft() if place == 0 else waiting.pop(), self.seconds)
        finally:
            for worker in workers:
                worker.stop()
        for run in waiting:
            yield run, Outcome("died", f"given up after the target brought down {deaths} processes")


def _serve(connection: Connection, recipe: Recipe, log: str) -> None:
    """The life of a worker process: make what it serves, say so, and answer run after run."""
    with open(log, "a", buffering=1) as file:
        for stream in (1, 2):  # what is printed here must not mix with the report
            os.dup2(file.fileno(), stream)
    _die_with_parent()
    try:
        served = recipe.make(*recipe.arguments)
    except TargetError as error:
        connection.send(error)
        return
    connection.send(served.about)
    with contextlib.suppress(EOFError):
        while True:
            run = connection.recv()
            try:
                connection.send(served.run(*run))
            except BaseException as error:
                connection.send(Outcome("raised", f"{type(error).__name__}: {error}", raised=(type(error).__name__,)))


def _die_with_parent() -> None:
    """End this process when its parent is gone, however it went."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
