"""The documentation: every example of every page runs and prints what the page says, and its tables are the code's."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def names(path):
    return path.relative_to(ROOT / "docs").with_suffix("").as_posix()


@pytest.fixture(scope="module")
def tables():
    """The script that writes the tables."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=names)
def test_examples(page, run_examples):
    run_examples(page)


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- end -->" in page.read_text()], ids=names)
def test_tables_are_those_of_the_code(page, tables):
    text = page.read_text()
    assert tables.filled(text) == text, "run `python docs/tables.py`"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ *- .*?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(f"{names(page)}.md" for page in PAGES)
