"""The README's example and its commands."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np

from anyattention_conformance.claims import parse

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_gives_one_answer_on_three_libraries(capsys):
    code, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 10
    exec(code, {})
    kinds, sums = zip(*(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines()), strict=True)
    assert [re.search(r"'(\w+)", kind)[1] for kind in kinds] == ["numpy", "jaxlib", "torch"]
    np.testing.assert_allclose(np.asarray(sums, dtype=float), float(sums[0]), atol=1e-4)


def test_two_commands_and_no_more():
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()
    ]
    assert len(commands) == 2
    assert "examples/semantic_search.py" in commands[0]
    assert "pytest" in commands[1]


def test_a_newcomer_certifies_an_attention(tmp_path):
    """As the README says it: the function in a file, and the command; it is right, and where it differs is said."""
    _, code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (command,) = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    run = [sys.executable, "-m", "anyattention_conformance", *command.split()[1:]]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ordinary calls conform to C3" in done.stdout
    assert "corner hidden rows" in done.stdout
    assert "BUG layout" not in done.stdout
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_the_claims_of_the_readme_can_be_read():
    (claims,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert parse(tomllib.loads(claims)).meaning.empty == 0.0
