"""The processes that measure: one for each framework, started again where it dies."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS, STEP_SECONDS = 180.0, 150.0  # that imports, and one step of a job, may take


class DiedError(Exception):
    """A process ended or was silent for too long; the message says which."""


class Process:
    """One framework's worker. `about` is what it says of itself."""

    def __init__(self, framework: str, pretend: bool) -> None:
        self.command = [sys.executable, "-m", "benchmarks.gpu.worker", framework, *(["--pretend"] if pretend else [])]
        self.start()

    def start(self) -> None:
        """Begin, or begin again."""
        path = os.pathsep.join(os.path.abspath(x) for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.about = self._message(START_SECONDS)
        except DiedError:
            self.stop()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed
            for line in self.process.stdout:
                self.lines.put(line)
        self.lines.put("")

    def _message(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            raise DiedError(f"no answer within {seconds:g} seconds") from None
        if not line:
            raise DiedError(f"its process ended with status {self.process.wait()}: {self.last_words()}")
        return json.loads(line)

    def ask(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The messages in answer to a job."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        while "done" not in (message := self._message(STEP_SECONDS)):
            yield message

    def last_words(self) -> str:
        """The last line that was printed."""
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


def measure(process: Process, case: dict[str, Any]) -> dict[str, Any]:
    """The figures of every contestant of a case; one that brings the process down is left out and the rest repeated."""
    without: dict[str, Any] = {}
    while True:
        found: dict[str, Any] = {}
        at = ""
        try:
            for message in process.ask({"job": "case", "case": case, "without": list(without)}):
                at = message.get("at", at)
                if "row" in message:
                    found[message["row"]] = message["figures"]
        except DiedError as error:
            process.stop()
            process.start()
            rest = [name for name in process.about["rows"] if name not in found and name not in without]
            without |= {name: {"failed": str(error)} for name in ([at] if at else rest)}
            if at:
                continue
        return {name: (found | without)[name] for name in process.about["rows"]}
