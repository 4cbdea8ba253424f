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
    """What has been found so far, by framework; a file that is there already is added to."""

    def __init__(self, path: Path, processor: str, quick: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"quick": quick, "processor": processor, "cores": cores()}
        if path.exists():
            found = json.loads(path.read_text())
            if any(found[name] != x for name, x in self.data.items()):
                raise SystemExit(f"{path} holds results of another machine, or other lengths: pass another --results")
            self.data = found

    def part(self, name: str) -> dict[str, Any]:
        """What a framework is to fill: it has when, with what, and at which load of the machine it began."""
        found = {"date": date.today().isoformat(), "python": platform.python_version(), "load": [load()]}
        found["versions"] = {package: x for package in PACKAGES if (x := _version(package))}
        self.data[name] = found
        return found

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
