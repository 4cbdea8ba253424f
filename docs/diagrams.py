"""Draws the pictures of the documentation: run ``python docs/diagrams.py`` after a change.

All text stands on boxes that are filled, so that it can be read in a light and in a dark page.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

RUN = Path(__file__).parents[1] / "benchmarks" / "results" / "2026-11-24.json"
FOLDER = Path(__file__).parent / "pictures"
INK, LINE = "#1f2937", "#8a94a6"
BLUE, GREEN, AMBER, ROSE, GRAY = "#cfe0ff", "#cdeed8", "#ffe6b8", "#ffd5d5", "#e3e7ee"


def box(x: float, y: float, width: float, height: float, fill: str, *lines: str, size: float = 14) -> str:
    """A filled box with lines of text in its middle, the first one bold."""
    text = ""
    top = y + height / 2 - (len(lines) - 1) * size * 0.65 + size * 0.35
    for i, line in enumerate(lines):
        weight = ' font-weight="bold"' if i == 0 else ""
        text += f'<text x="{x + width / 2}" y="{top + i * size * 1.3:.1f}" font-size="{size}"{weight}>{line}</text>\n'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{LINE}"/>\n{text}'


def arrow(*points: tuple[float, float]) -> str:
    """A line along the points, with a head at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>\n'


def picture(title: str, width: int, height: int, parts: Iterable[str]) -> str:
    """The SVG."""
    head = f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif" text-anchor="middle" fill="{INK}">\n<title>{title}</title>\n'
        f'<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto" '
        f'markerUnits="userSpaceOnUse">{head}</marker></defs>\n{"".join(parts)}</svg>\n'
    )


def flow() -> str:
    """From the arguments to the result."""
    parts = [
        box(10, 95, 150, 84, GRAY, "arguments", "query, key, value,", "bias, mask, ..."),
        box(200, 95, 150, 84, BLUE, "Call", "checked arrays,", "one dtype, options"),
        box(390, 95, 150, 84, BLUE, "plan", "what explain prints", "no look at values"),
        box(600, 10, 200, 74, GREEN, "exact", "Flax's steps,", "all logits at once"),
        box(600, 100, 200, 74, GREEN, "tiled", "a tile at a time,", "memory as the length"),
        box(600, 190, 200, 74, GREEN, "fused", "a vendor's kernel,", "mended to mean Flax's"),
        box(860, 95, 130, 84, GRAY, "result", "library, device", "of the arguments"),
        arrow((160, 137), (198, 137)),
        arrow((350, 137), (388, 137)),
    ]
    for y in (47, 137, 227):
        parts += [arrow((540, 137), (570, 137), (570, y), (598, y)), arrow((800, y), (830, y), (830, 137), (858, 137))]
    return picture("From a call to its result", 1000, 275, parts)


def tiles() -> str:
    """The tiles of a causal call, and the partial of a row of tiles."""
    size, left, top = 70, 120, 40
    parts = [box(left, 5, 5 * size - 6, 26, GRAY, "keys", size=13)]
    for i in range(4):
        parts.append(box(10, top + i * size, 100, size - 6, GRAY, f"queries {i + 1}", size=13))
        for j in range(5):
            kind = "computed" if j < i else "masked" if j == i else "skipped"
            fill = {"computed": GREEN, "masked": AMBER, "skipped": ROSE}[kind]
            parts.append(box(left + j * size, top + i * size, size - 6, size - 6, fill, kind, size=10))
    row, right = top + 3 * size, left + 5 * size
    parts += [
        arrow((right - 4, row + 32), (right + 36, row + 32)),
        box(right + 40, row - 12, 200, 82, BLUE, "partial", "largest logit, sum,", "weighted values", size=13),
        arrow((right + 240, row + 32), (right + 276, row + 32)),
        box(right + 280, row - 12, 190, 82, GRAY, "rows of the output", "weighted values / sum", size=13),
        box(right + 40, top, 430, 64, GREEN, "computed", "the mask shows every key: it is not applied", size=13),
        box(right + 40, top + 70, 430, 52, AMBER, "masked: each pair is compared", size=13),
        box(right + 40, top + 128, 430, 52, ROSE, "skipped: the mask hides every key", size=13),
    ]
    return picture("The tiles of a causal call", 950, 325, parts)


def zigzag() -> str:
    """Which rows of a causal call are at which of four devices, and what each computes of them: in halves of shards."""
    size, top, fills = 40, 62, (BLUE, GREEN, AMBER, ROSE)
    orders = {"as the sequence lies": [0, 0, 1, 1, 2, 2, 3, 3], "zigzag": [0, 1, 2, 3, 3, 2, 1, 0]}
    parts = []
    for n, (title, devices) in enumerate(orders.items()):
        left, counts = 10 + n * 510, [0] * 4
        parts.append(box(left, 4, 130 + 8 * size, 26, GRAY, title, size=13))
        parts.append(box(left + 130, 33, 8 * size, 24, GRAY, "keys", size=12))
        for i, device in enumerate(devices):
            y = top + i * size
            parts.append(box(left, y, 124, size - 4, fills[device], f"device {device}", size=13))
            for j in range(8):
                # A shard of keys is left out where the mask hides all of it: in zigzag, half a shard.
                computed = j <= i if title == "zigzag" else j // 2 <= i // 2
                counts[device] += computed
                fill = fills[device] if computed else "#ffffff"
                parts.append(box(left + 130 + j * size, y, size - 4, size - 4, fill, "", size=10))
        for device, count in enumerate(counts):
            x = left + device * 113
            parts.append(
                box(x, top + 8 * size + 8, 107, 44, fills[device], f"device {device}", f"{count} blocks", size=12)
            )
    return picture("The rows of a causal call at four devices", 990, 445, parts)


COLOURS = {  # ours are drawn as lines, others as dashes
    "anyattention, NumPy": "#1d4ed8",
    "np.einsum": "#1d4ed8",
    "anyattention, JAX": "#15803d",
    "flax.linen": "#15803d",
    "anyattention, PyTorch": "#b45309",
    "torch SDPA": "#b45309",
}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def curve(points: list[tuple[float, float]], colour: str, dashed: bool) -> str:
    """A line through points, with a dot at each."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>{dots}\n'


def panel(left: float, title: str, kind: str, factor: float, ticks: tuple[float, ...]) -> Iterator[str]:
    """One of two plots, both axes logarithmic."""
    results = json.loads(RUN.read_text())["results"]
    width, top, height = 330, 50, 280
    start, end = left + 60, left + 60 + width
    low, high = math.log(ticks[0]), math.log(ticks[-1])

    def x(length: float) -> float:
        return start + width * math.log(length / LENGTHS[0]) / math.log(LENGTHS[-1] / LENGTHS[0])

    def y(value: float) -> float:
        return top + height * (1 - (math.log(max(value, ticks[0])) - low) / (high - low))

    yield f'<text x="{start + width / 2}" y="30" font-size="15" font-weight="bold">{title}</text>\n'
    for tick in ticks:
        yield f'<line x1="{start}" x2="{end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#dde2ea"/>'
        yield f'<text x="{start - 6}" y="{y(tick) + 4:.1f}" font-size="12" text-anchor="end">{tick:,g}</text>\n'
    for length in LENGTHS:
        yield f'<text x="{x(length):.1f}" y="{top + height + 20}" font-size="12">{length}</text>\n'
    for name, colour in COLOURS.items():
        found = [(n, results[f"length {n}"][name]) for n in LENGTHS]
        points = [(x(n), y(figures[kind] * factor)) for n, figures in found if "seconds" in figures]
        yield curve(points, colour, not name.startswith("anyattention"))


def speed() -> str:
    """Time and memory against length, of the committed run."""
    parts = ['<rect width="1000" height="400" rx="10" fill="#ffffff"/>\n']
    parts += panel(0, "milliseconds", "seconds", 1e3, (1, 10, 100, 1000, 10000))
    parts += panel(400, "peak memory, MiB", "peak_mib", 1, (1, 10, 100, 1000, 10000))
    for i, (name, colour) in enumerate(COLOURS.items()):
        middle = 100 + i * 34
        parts.append(curve([(812, middle), (842, middle)], colour, not name.startswith("anyattention")))
        parts.append(f'<text x="852" y="{middle + 4}" font-size="13" text-anchor="start">{name}</text>\n')
    parts.append('<text x="400" y="385" font-size="13">queries and keys (1 x length x 8 x 64, float32)</text>\n')
    return picture("Time and memory against length", 1000, 400, parts)


PICTURES = {"flow.svg": flow, "tiles.svg": tiles, "zigzag.svg": zigzag, "speed.svg": speed}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
