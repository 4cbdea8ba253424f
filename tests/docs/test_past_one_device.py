"""The page about several devices: its programs print what it says, and its table of choices is the code's."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "past-one-device.md").read_text()
PROGRAMS = re.findall(r'```python title="(.*?)"\n(.*?)```\n\n```console\n\$ (.*?)\n(.*?)```', PAGE, re.DOTALL)


def of(program):
    """The parameters of a program, which needs the libraries that it imports."""
    libraries = re.findall(r"^(?:import|from) (jax|torch|dask)\b", program[1], re.MULTILINE)
    return pytest.param(*program, id=program[0], marks=pytest.mark.needs(*sorted({*libraries})))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "command", "printed"), [of(program) for program in PROGRAMS])
def test_programs(name, code, command, printed, tmp_path):
    """In processes of their own: JAX has to be told of virtual devices before it is imported, and ranks are several."""
    (tmp_path / name).write_text(code)
    python, torchrun = shlex.quote(sys.executable), "-m torch.distributed.run"
    command = re.sub(r"\bpython\b", f"{python} -W error", command).replace("torchrun", f"{python} {torchrun}")
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), *(str(ROOT / x) for x in ("src", "backends")))))
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not done.returncode, done.stderr[-2000:]
    assert done.stdout == printed


def test_every_program_is_run():
    assert len(PROGRAMS) == PAGE.count("title=") == 5


def test_memory_is_that_of_the_committed_run():
    (committed,) = (ROOT / "benchmarks" / "results").glob("scale-*.json")
    programs = json.loads(committed.read_text())["jax"]["programs"]
    found = {}
    for row in programs:
        found.setdefault((row["length"], row["devices"]), []).append(str(round(row["temporaries_mib"])))
    lines = re.findall(r"^\| (\d+) on (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert {(int(length), int(n)): cells.split(" | ") for length, n, cells in lines} == found


@pytest.mark.needs("jax")
def test_choice_of_an_exchange(on_four_devices):
    """As the page's table has it: 4 MiB of keys and values, 64 queries, twice the devices, an eighth of the keys."""
    script = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType
from anyattention import explain, masks

found = {}
with jax.set_mesh(jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))):
    def say(name, rows, columns, **options):
        shapes = ((1, rows, 1, 128), *[(1, columns, 1, 128)] * 2)
        arrays = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
        found[name] = explain(*arrays, **options, sequence_axis="seq").reasons[-1].partition(" over")[0]
    say("4 MiB", 4096, 4096)
    say("more", 4104, 4104)
    say("causal", 8192, 8192, is_causal=True)
    say("causal, odd halves", 8196, 8196, is_causal=True)
    say("window", 8192, 8192, mask=masks.LocalMask(99, 0))
    say("more keys", 4096, 8192, is_causal=True)
    say("few queries", 64, 512)
    say("few queries, few keys", 64, 508)
    say("few queries that do not divide", 63, 128)
    say("queries", 68, 4096)
print(json.dumps(found))
"""
    assert on_four_devices(script) == {
        "4 MiB": "gather",
        "more": "ring",
        "causal": "zigzag ring",
        "causal, odd halves": "ring",
        "window": "ring",
        "more keys": "ring",
        "few queries": "reduce",
        "few queries, few keys": "gather",
        "few queries that do not divide": "reduce",
        "queries": "gather",
    }
