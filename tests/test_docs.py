"""The documentation: every example of every page runs and prints what the page says, and its tables are the code's."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def names(path):
    return path.relative_to(ROOT / "docs").with_suffix("").as_posix()


def script(name):
    """A script of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = script("tables")
DIAGRAMS = script("diagrams")


@pytest.mark.parametrize("page", [page for page in PAGES if "```python\n" in page.read_text()], ids=names)
def test_examples(page, run_examples):
    run_examples(page)


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- end -->" in page.read_text()], ids=names)
def test_tables_are_those_of_the_code(page):
    text = page.read_text()
    assert TABLES.filled(text) == text, "run `python docs/tables.py`"


def test_every_table_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert set(TABLES.TABLES) == set(re.findall(r"<!-- ([a-z-]+) -->", text)) - {"end"}


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ *- .*?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(f"{names(page)}.md" for page in PAGES)


@pytest.mark.parametrize("name", DIAGRAMS.PICTURES)
def test_pictures_are_those_of_their_script(name):
    picture = (ROOT / "docs" / "pictures" / name).read_text()
    assert DIAGRAMS.PICTURES[name]() == picture, "run `python docs/diagrams.py`"
    assert any(f"(pictures/{name})" in page.read_text() for page in PAGES)


@pytest.mark.parametrize(
    "module",
    [
        *("anyattention", "anyattention.masks", "anyattention.biases", "anyattention.random", "anyattention.partials"),
        *("anyattention.extend", "anyattention.integrations.huggingface", "anyattention_conformance"),
    ],
)
def test_the_reference_has_every_public_name(module):
    """Once each: a name that several modules have stands with one of them."""
    documented = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)]
    assert len(documented) == len(set(documented))
    objects = [id(find(name)) for name in documented]
    public = importlib.import_module(module)
    for name in public.__all__:
        x = getattr(public, name)
        assert id(x) in objects or (isinstance(x, type(re)) and any(y.startswith(x.__name__) for y in documented)), name


def find(name):
    """What a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
