"""The memory of this process."""

import gc
import resource
import sys
from pathlib import Path


def forget() -> None:
    """Let its peak start anew, where the system can."""
    gc.collect()
    if (path := Path("/proc/self/clear_refs")).exists():
        path.write_text("5")


def now_mib() -> float:
    """What it has."""
    return _status("VmRSS") or peak_mib()


def peak_mib() -> float:
    """The most that it had, since it was forgotten if it can be."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status(name: str) -> float:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:")), 0.0)
