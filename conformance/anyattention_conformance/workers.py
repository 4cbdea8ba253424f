"""Processes of their own for the target: one that hangs or dies takes its case with it, not the run."""

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

from anyattention_conformance.targets import Outcome, Target, TargetError

START_SECONDS = 300.0  # for imports
DEATHS = 5  # of processes, after which the target is given up


@dataclass(frozen=True)
class Recipe:
    """How a process makes the target: a function that can be pickled, and its arguments."""

    make: Callable[..., Target]
    arguments: tuple[Any, ...]


class Worker:
    """One process, and the run that it is at."""

    def __init__(self, recipe: Recipe) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.log = Path(tempfile.mkstemp(prefix="anyattention-", suffix=".log")[1])
        self.process = context.Process(target=_serve, args=(theirs, recipe, str(self.log)), daemon=True)
        self.process.start()
        theirs.close()
        self.run: Any = None
        self.deadline = monotonic() + START_SECONDS

    def give(self, run: Any, seconds: float) -> None:
        """Start a run."""
        self.run, self.deadline = run, monotonic() + seconds
        self.connection.send(run)

    def stop(self) -> str:
        """End the process; what it last printed."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        self.log.unlink(missing_ok=True)
        return lines[-1][:300] if lines else ""


class Workers:
    """Runs cases in processes of their own, each with a limit in seconds. TargetError if there is no target."""

    def __init__(self, recipe: Recipe, seconds: float = 60.0, jobs: int = 2) -> None:
        self.recipe, self.seconds, self.jobs = recipe, seconds, jobs
        self.versions: dict[str, str] = {}

    def __call__(self, chosen: list[Any]) -> Iterator[tuple[Any, Outcome]]:
        """The outcomes, as they come.

        Runs of one shape lie together, and one process takes them from the front, the other from the back: libraries
        that compile do it once.
        """
        waiting = deque(sorted(chosen, key=lambda run: (run.case.query, run.case.key, run.dtype)))
        workers: list[Worker] = [Worker(self.recipe) for _ in range(min(self.jobs, max(1, len(chosen) // 8)))]
        deaths = 0
        try:
            while workers:
                wait(
                    [worker.connection for worker in workers], max(0.0, min(x.deadline for x in workers) - monotonic())
                )
                for place, worker in enumerate(workers):
                    if worker.connection.poll():
                        message = self._receive(worker)
                    elif monotonic() < worker.deadline:
                        continue
                    else:
                        message = Outcome("died", f"no answer within {self.seconds:g} seconds")
                    if worker.run is not None:
                        yield worker.run, message
                    if isinstance(message, Outcome) and message.kind == "died":
                        self._bury(worker, message)
                        deaths += 1
                        worker = workers[place] = Worker(self.recipe)
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

    def _receive(self, worker: Worker) -> Any:
        """What a process sent: the outcome of its run, or that it is ready. TargetError if it has no target."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode
            return Outcome("died", f"its process ended with status {code}" if code else "its process ended")
        if isinstance(message, TargetError):
            raise message
        if isinstance(message, dict):
            self.versions = message
        return message

    def _bury(self, worker: Worker, outcome: Outcome) -> None:
        """Stop a process; TargetError if it died before its first run."""
        said = worker.stop()
        if worker.run is None:
            raise TargetError(f"the target cannot be started: {outcome.message}" + (f": {said}" if said else ""))


def _serve(connection: Connection, recipe: Recipe, log: str) -> None:
    """The life of a worker process: make the target, say so, and answer run after run."""
    with open(log, "a", buffering=1) as file:
        for stream in (1, 2):  # what a target prints must not mix with the report
            os.dup2(file.fileno(), stream)
    _die_with_parent()
    try:
        target = recipe.make(*recipe.arguments)
    except TargetError as error:
        connection.send(error)
        return
    connection.send(dict(target.framework.versions))
    with contextlib.suppress(EOFError):
        while True:
            run = connection.recv()
            try:
                connection.send(target.run(*run))
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
