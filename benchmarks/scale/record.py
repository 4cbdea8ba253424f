"""The results, in one JSON file."""

import json
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.worker import cores

PACKAGES = ("numpy", "jax", "jaxlib", "torch", "dask", "distributed")


class Record:
    """What has been found so far, by framework."""

    def __init__(self, path: Path, processor: str, quick: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "date": date.today().isoformat(),
            "quick": quick,
            "processor": processor,
            "cores": cores(),
            "python": platform.python_version(),
            "versions": {name: found for name in PACKAGES if (found := _version(name))},
            "load": [load()],  # of the machine, at the start and after each part: other programs in the times
        }

    def add(self, name: str, found: Any) -> None:
        """What a framework has given, kept at once."""
        self.data[name] = found
        self.data["load"].append(load())
        self.save()

    def save(self) -> None:
        """Write the file whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        draft.replace(self.path)


def load() -> float:
    """How many programs ran, or waited to, over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
