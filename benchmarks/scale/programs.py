"""What the text of a compiled program says: its collectives, and what they move."""

import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8, "s64": 8}
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, int]:
    """How many of each kind there are."""
    return dict(Counter(kind for _, kind in _CALL.findall(text)))


def turns(text: str) -> list[int]:
    """For each loop that permutes, the bytes that a device sends in a turn."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found = []
    for name, lines in _computations(text):
        calls = [_CALL.search(line) for line in lines if "collective-permute" in line]
        sent = sum(_bytes(call[1], "(" in call[1]) for call in calls if call)
        if name in bodies and sent:
            found.append(sent)
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The names and lines of the functions of a program."""
    name, lines = "", []
    for line in text.splitlines():
        if (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)) is not None:
            name, lines = head[1], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _bytes(shapes: str, pair: bool) -> int:
    """Of an array; of the start of a permutation, which returns what is sent and what comes, the first."""
    sizes = [BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in _SHAPE.findall(shapes)]
    return sizes[0] if pair else sum(sizes)
