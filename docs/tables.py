"""Writes the tables of the documentation that come from the code: run ``python docs/tables.py`` after a change.

A page holds a table between two comments, ``<!-- NAME -->`` and ``<!-- end -->``. They are written into the pages
themselves, and not only into the site, for readers of the files; a test compares them with the code.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

TABLES: dict[str, Callable[[], str]] = {}
_PLACE = re.compile(r"(<!-- ([a-z-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def table(make: Callable[[], Iterator[tuple[str, ...]]]) -> Callable[[], str]:
    """Register a table by the name of the function that yields its rows, the head first."""

    def text() -> str:
        head, *rows = make()
        lines = [head, ("---",) * len(head), *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    TABLES[make.__name__.replace("_", "-")] = text
    return text


@table
def rules() -> Iterator[tuple[str, ...]]:
    """What None chooses, by library and platform."""
    from anyattention import RULES

    names = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch", "mlx": "MLX"}
    yield "library", "platform", "the first of these that fits"
    for (library, platform), found in RULES.items():
        yield names[library], platform.upper(), "<br>".join(map(str, found))


def filled(text: str) -> str:
    """The text of a page with its tables made anew."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for path in Path(__file__).parent.rglob("*.md"):
        path.write_text(filled(path.read_text()))
