"""The README: its code, its commands, its figures, its links."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE, OUTPUT = (re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL) for kind in ("python", "text"))


def test_it_is_short():
    assert len(README.splitlines()) <= 100


def test_the_first_code_prints_what_it_says(capsys):
    exec(CODE[0], {})
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == ["numpy", "jaxlib", "torch"]
    assert numbers(printed) == numbers(OUTPUT[0])


def test_one_argument_of_a_flax_model():
    """As the code makes the modules: the bits of linen, and the numbers of nnx up to rounding."""
    from flax import linen, nnx

    *_, with_linen, with_nnx = CODE[1].strip().splitlines()
    names = {"linen": linen, "nnx": nnx}
    exec(CODE[0].partition("\nx = ")[0], names)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 512), dtype=np.float32))
    ours, default = (eval(code, names) for code in (with_linen, re.sub(", attention_fn=[^,)]*", "", with_linen)))
    params = default.init(jax.random.key(0), x)
    np.testing.assert_array_equal(ours.apply(params, x), default.apply(params, x))
    ours, default = (eval(code, names) for code in (with_nnx, re.sub("attention_fn=[^,)]*, ", "", with_nnx)))
    np.testing.assert_allclose(ours(x), default(x), atol=1e-5)


def test_figures_are_those_of_the_committed_runs():
    """Of each row the case, who was measured, milliseconds and MiB, before and after."""
    cpu = json.loads((ROOT / "benchmarks/results/2026-11-24.json").read_text())["results"]
    gpu = json.loads((ROOT / "benchmarks/results/gpu-2026-11-27-h100.json").read_text())["speed"]
    full, causal = cpu["prefill 4096"], cpu["prefill 4096, causal"]
    on_card = "bfloat16 4x4096x16x128"
    pairs = [
        (full["flax.linen"], full["anyattention, JAX"]),
        (causal["flax.linen"], causal["anyattention, JAX"]),
        (full["np.einsum"], full["anyattention, NumPy"]),
        *((gpu[name]["jax"]["Flax"], gpu[name]["jax"]["ours"]) for name in (f"{on_card} full", f"{on_card} causal")),
        *((x["Flax"], x["ours"]) for x in [gpu["bfloat16 16x1024x16x128 full gradient"]["jax"]]),
        *((x["sdpa"], x["ours"]) for x in [gpu[f"{on_card} full"]["torch"]]),
    ]
    rows = re.findall(r"^\|.*MiB.*\|$", README, flags=re.MULTILINE)
    for row, pair in zip(rows, pairs, strict=True):
        written = re.findall(r"([\d.]+) ms, (\d+) MiB", row)
        for (milliseconds, mib), figures in zip(written, pair, strict=True):
            digits = len(milliseconds.partition(".")[2])
            assert milliseconds == f"{figures['seconds'] * 1e3:.{digits}f}", row
            assert float(mib) == np.ceil(figures["peak_mib"] - 0.5), row


def test_two_commands_and_no_more():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 2
    assert "examples/semantic_search.py" in commands[0]
    assert "pytest" in commands[1]


def test_a_newcomer_certifies_an_attention(tmp_path):
    """As the README says it: the function in a file, and the command; it is right, and where it differs is said."""
    (command,) = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(CODE[2])
    run = [sys.executable, "-m", "anyattention_conformance", *command.split()[1:]]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert OUTPUT[1].strip() in done.stdout
    assert "corner hidden rows" in done.stdout
    assert "BUG layout" not in done.stdout
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_links():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d*", text)]
