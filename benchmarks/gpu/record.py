"""The results, in one JSON file that every call of the program adds to."""

import json
import time
from datetime import date
from pathlib import Path
from typing import Any

SAVE_SECONDS = 5.0


class OtherMachineError(Exception):
    """The file holds results of another machine."""


class Record:
    """What has been found so far: by framework, then by engine, or by case and contestant."""

    def __init__(self, path: Path, about: dict[str, Any], pretend: bool) -> None:
        self.path, self.saved = path, 0.0
        self.data: dict[str, Any] = {
            "date": date.today().isoformat(),
            "pretend": pretend,
            "frameworks": {},
            "peak_tflops": {},
            "correctness": {},
            "choosing_us": {},
            "speed": {},
        }
        if path.exists():
            self.data = json.loads(path.read_text())
        known = self.data["frameworks"]
        same = all(known.get(name, mine) == mine for name, mine in about.items())
        if self.data["pretend"] != pretend or not same:
            raise OtherMachineError(
                f"{path} holds results of another machine or other versions: pass another --results"
            )
        known |= about

    def save(self, at_once: bool = True) -> None:
        """Write the file whole; unless at once, only if it was not just written."""
        if not at_once and time.monotonic() < self.saved + SAVE_SECONDS:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        draft.replace(self.path)
        self.saved = time.monotonic()

    def verdicts(self, framework: str, name: str) -> dict[str, dict[str, str]]:
        """Of an engine or implementation, by case and dtype."""
        return self.data["correctness"].setdefault(framework, {}).setdefault(name, {})

    def figures(self, case: str) -> dict[str, dict[str, Any]]:
        """Of a case, by framework, then by contestant."""
        return self.data["speed"].setdefault(case, {})

    @property
    def peak(self) -> float:
        """The card's matrix product in bfloat16, the best that any framework gave, in TFLOP/s; 0 if not measured."""
        return max(self.data["peak_tflops"].values(), default=0.0)
