"""The benchmark past one device, on tiny lengths: what it counts, and that a wrong answer gets no time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.needs("jax")
ROOT = Path(__file__).parents[1]
LAZY = "--xla_backend_optimization_level=0"  # as XLA is to compile, where speed is not the matter


def run(*arguments):
    """The program, in a process of its own."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "backends", "conformance"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": LAZY},
        timeout=200,
    )
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What it prints, what it records, and where."""
    path = tmp_path_factory.mktemp("scale") / "results.json"
    return run("--quick", "--turns", "1", "--only", "jax", "--results", str(path)), json.loads(path.read_text()), path


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale import cases

    return cases


def test_programs(quick):
    """Of a ring with its gradient: permutations alone, and in a turn keys and values; backward their gradients too."""
    _, data, _ = quick
    found = {(row["exchange"], row["kind"]): row for row in data["jax"]["programs"]}
    assert set(found) == {("ring", "full"), ("ring", "causal"), ("gather", "full"), ("", "full")}
    for kind, most in (("full", 10), ("causal", 40)):
        ring = found["ring", kind]
        assert set(ring["collectives"]) == {"collective-permute"}
        assert ring["collectives"]["collective-permute"] <= most
        least = 2 * 512 // 4 * 2 * 64 * 4
        positions = 512 // 4 * 4 if kind == "causal" else 0
        assert ring["least_a_turn"] == least
        assert sorted(ring["sent_a_turn"]) == [least + positions, 2 * least + positions]
    assert "all-gather" in found["gather", "full"]["collectives"]
    memory = [found[exchange, "full"]["temporaries_mib"] for exchange in ("ring", "gather")]
    assert 0 < memory[0] < memory[1]


def test_counted_logits(quick):
    """In zigzag each of 4 devices computes 9 of its 16 quarters; in order the last has all to do, the first a part."""
    _, data, _ = quick
    found = {row["kind"]: row for row in data["jax"]["counted"]}
    part = 256 * 256 // 4
    assert found["full"]["logits"] == [part] * 4
    assert found["causal"]["way"].startswith("zigzag ring over mesh axis 'seq', 4 devices")
    assert found["causal"]["logits"] == [part * 9 // 16] * 4
    assert found["causal, in order"]["way"].startswith("ring over")
    assert found["causal, in order"]["logits"] == [part // 4, part // 2, part * 3 // 4, part]
    assert found["full"]["one"] == 256 * 256


def test_times(quick):
    _, data, _ = quick
    assert len(data["jax"]["times"]) == 4
    for row in data["jax"]["times"]:
        for which in ("sharded", "one"):
            assert row[which]["seconds"] > 0
            assert row[which]["error"] < 2e-5


def test_report(quick):
    printed, data, path = quick
    assert data["quick"] is True
    assert len(data["jax"]["load"]) == 2
    assert "The devices are virtual" in printed
    assert run("--report", str(path)) in printed
    with pytest.raises(AssertionError, match="other lengths"):
        run("--only", "", "--results", str(path))


@pytest.mark.slow
@pytest.mark.needs("torch")
def test_ranks(tmp_path):
    """Two ranks compute as much as one process does, in zigzag half of it each."""
    path = tmp_path / "results.json"
    printed = run("--quick", "--turns", "1", "--only", "torch", "--results", str(path))
    rows = json.loads(path.read_text())["torch"]["times"]
    assert [(row["kind"], row["gradient"]) for row in rows] == [
        *(("full", False), ("full", True), ("causal", False), ("causal", True))
    ]
    for row in rows:
        for which in ("sharded", "tiled", "sdpa"):
            assert row[which]["seconds"] > 0
            assert row[which]["error"] < 2e-5
        ranks = row["sharded"]
        assert len(ranks["memory_mib"]) == len(ranks["processor_seconds"]) == 2
        # With its gradient each logit is computed twice; a causal mask leaves 5 of 8 quarters of 64 rows.
        part = 128 * 128 * 4 // 2 * (2 if row["gradient"] else 1)
        assert ranks["logits"] == ([part] * 2 if row["kind"] == "full" else [part * 5 // 8] * 2)
    assert "| 128 on 2, causal, with gradient |" in printed


def test_wrong_answer_gets_no_time(cases, monkeypatch):
    from benchmarks.scale import measure

    case = cases.Case(64, 2, "causal", gradient=True)
    right = [x for x, _ in cases.expected(case)]
    column = np.ones((1, 6, 4, 64))

    class Pretended:
        def __init__(self, rows, columns):
            self.answer = rows, columns

        def ask(self, job, *_):
            return [{"prepare": self.answer, "seconds": 1.0, "clear": None}[job]]

    spoiled = [right[0], right[1] * np.where(np.arange(6) == 3, 1.001, 1.0)[:, None, None]]
    contestants = {
        "one": (right, [column]),
        "off in a row of a gradient": (spoiled, [column]),
        "off in a column": (right, [column + 0.001 * (np.arange(64) == 5)]),
        "not finite": ([right[0] * np.nan, right[1]], [column]),
    }
    asked = {name: (Pretended(*answer), replace(case)) for name, answer in contestants.items()}
    found = measure._turns(case, asked, 2, lambda parts: parts[0])
    assert found.pop("one")["seconds"] == 1.0
    for name, figures in found.items():
        assert "wrong" in figures, name
        assert "seconds" not in figures
        assert json.dumps(figures, allow_nan=False)


def test_what_fails_is_said(cases):
    """A process that dies takes its case alone; after the time is up no case begins. Each row is kept at once."""
    from benchmarks.scale import measure, report

    from anyattention_conformance.workers import DiedError

    kept, rows = [], []
    budget = measure.Budget(60.0, 1, lambda: kept.append(len(rows)))

    def figures(case):
        if case.kind == "full":
            raise DiedError("its process ended with status -9", "Killed")
        budget.end = 0.0
        return {"sharded": {"seconds": 0.5}, "one": {"seconds": 0.25}}

    measure._each(rows, [cases.Case(64, 2, kind) for kind in ("full", "causal", "full")], budget, figures)
    assert kept == [1, 2, 3]
    assert [row.get("failed") for row in rows] == [
        *("its process ended with status -9: Killed", None, "not run: the time was up")
    ]
    assert [report.ratio(row, "one") for row in rows] == ["–", "2.00", "–"]


def test_report_of_dask(cases):
    from benchmarks.scale import report

    row = {"case": "full", "gradient": True, "q_length": 64, "kv_length": 128, "tasks": 9, "build_seconds": 0.1}
    row |= {"seconds": 3.0, "one_process_seconds": 2.0, "peak_mib": 99.0, "pauses": 0, "spilled_bytes": 0}
    few = row | {"case": "few queries", "gradient": False, "one_process_seconds": None}
    *_, first, second = report.dask({"rows": [row, few]}, 2)
    assert first == "| full, with gradient, 64 x 128 | 9 | 0.10 | 3.0 | 2.0 | 1.50 | 99 | 0 | 0 |"
    assert second == "| few queries, 64 x 128 | 9 | 0.10 | 3.0 | – | – | 99 | 0 | 0 |"


def test_report_of_a_single_device(cases):
    from benchmarks.scale import report

    about = {"platform": "gpu", "device": "card", "count": 1, "virtual": False}
    lines = [*report.jax({"about": about, "programs": [], "counted": [], "times": []}, 8)]
    assert lines[-1] == "None: one device."
    assert not any("virtual" in line for line in lines)
    assert [*report.torch({"about": about, "times": []}, 8)][-1] == "None: one device."


def test_collectives_of_a_text(cases):
    from benchmarks.scale import programs

    text = """
%body.1 (x: f32[4,8]) -> f32[4,8] {
  %a = bf16[4,8]{1,0} collective-permute(%x), channel_id=1
  %b = (f32[2,8]{1,0}, f32[2,8]{1,0}) collective-permute-start(%x), channel_id=2
}
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %c = f32[4]{0} all-gather(%x), dimensions={0}
  %d = f32[4,8]{1,0} while(%x), condition=%cond, body=%body.1
}
"""
    assert programs.collectives(text) == {"collective-permute": 2, "all-gather": 1}
    assert programs.turns(text) == [4 * 8 * 2 + 2 * 8 * 4]
