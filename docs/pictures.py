"""Draws the pictures of masks.md from the page's own code: ``python docs/pictures.py``.

A picture follows the code that it shows. The last word of its name is the variable: ``causal-mask.svg`` shows `mask`,
and ``packed-causal-mask.svg`` shows `packed_causal_mask` where the code has one.
"""

import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from anyattention.masks import Mask

Array = Any
PAGE = Path(__file__).parent / "masks.md"
FOLDER = PAGE.parent / "pictures"
CELL, GAP, MARGIN = 16, 32, 20
# Blue and grey have a contrast of at least 3 on white and on the dark page alike.
BLUE, GREY = "#4c7fd9", "#808080"
TEXT = f'fill="{GREY}" font-family="sans-serif" font-size="11" text-anchor="middle"'


def pictures() -> dict[str, str]:
    """Every picture of the page, by its name: SVG."""
    names: dict[str, Any] = {}
    found, waiting = {}, []
    for picture, code in re.findall(r"\(pictures/([\w-]+)\.svg\)|```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if picture:
            waiting.append(picture)
            continue
        with redirect_stdout(None):
            exec(code, names)
        for name in waiting:
            variable = name.replace("-", "_")
            kind = name.rpartition("-")[2]
            found[f"{name}.svg"] = draw(shades(names.get(variable, names.get(kind)), kind, names), kind)
        waiting = []
    return found


def shades(shown: Any, kind: str, names: dict[str, Any]) -> Array:
    """How dark each cell is, from 0 to 1: ``[panels, rows, columns]``."""
    if isinstance(shown, Mask):
        shown = shown.to_array(names["y"].shape[1], names["x"].shape[1])
    x = np.asarray(shown, dtype=np.float64)
    x = np.exp(x) if kind == "bias" else x / x.max()
    if x.ndim == 1:
        x = np.broadcast_to(x, (names["x"].shape[1], *x.shape))
    return x.reshape(-1, *x.shape[-2:])


def draw(panels: Array, kind: str) -> str:
    """Panels side by side, each a grid of queries against keys."""
    number, rows, columns = panels.shape
    axes = ("query heads", "key heads") if kind == "reads" else ("queries", "keys")
    width, height = columns * CELL, rows * CELL
    total = (MARGIN + number * (width + GAP), MARGIN + height + 4)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{total[0]}" height="{total[1]}">']
    for i, panel in enumerate(panels):
        left = MARGIN + i * (width + GAP)
        lines.append(f'<text x="{left + width / 2:g}" y="12" {TEXT}>{axes[1]}</text>')
        middle = f"{left - 8} {MARGIN + height / 2:g}"
        lines.append(f'<text transform="translate({middle}) rotate(-90)" {TEXT}>{axes[0]}</text>')
        for shade in sorted({round(float(x), 2) for x in panel.flat} - {0.0}):
            cells = np.argwhere(np.round(panel, 2) == shade)
            path = "".join(f"M{left + c * CELL + 1} {MARGIN + r * CELL + 1}h14v14h-14z" for r, c in cells)
            lines.append(f'<path fill="{BLUE}" fill-opacity="{shade:g}" d="{path}"/>')
        grid = "".join(f"M{left} {MARGIN + r * CELL}h{width}" for r in range(rows + 1))
        grid += "".join(f"M{left + c * CELL} {MARGIN}v{height}" for c in range(columns + 1))
        lines.append(f'<path stroke="{GREY}" stroke-opacity="0.4" d="{grid}"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    for name, picture in pictures().items():
        (FOLDER / name).write_text(picture)
