"""The page about the kit: its files, its commands, and what they print."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "certify.md").read_text()
FILES = dict(re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```$', PAGE, flags=re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^```sh\n(.*?)\n```\n(?:\n```text\n(.*?)^```$)?", PAGE, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = {"anyattention": ["-m", "anyattention_conformance"], "python": []}


@pytest.fixture
def run(tmp_path):
    """Runs a command of the page where its files are."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)

    def run(command):
        program, *arguments = shlex.split(command.replace("\\\n", ""))
        line = [sys.executable, *PROGRAMS[program], *arguments]
        environment = os.environ | {"COLUMNS": "80"}
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_the_page_has_commands():
    assert len(COMMANDS) >= 4
    assert len(FILES) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("command", "printed"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_command_prints_what_the_page_says(run, command, printed):
    """A line of dots stands for lines that the page leaves out."""
    done = run(command)
    fails = command.startswith("anyattention") and "✗" in printed
    assert done.returncode == fails, done.stdout + done.stderr
    parts = re.split(r"^\.\.\.\n", printed, flags=re.MULTILINE)
    found, place = done.stdout, 0
    for part in parts:
        assert part in found[place:], done.stdout
        place = found.index(part, place) + len(part)
