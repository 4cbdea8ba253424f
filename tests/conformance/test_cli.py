"""The command line, as a user calls it: in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).with_name("samples.py")
PACKAGES = ("anyattention", "anyattention_backends", "anyattention_conformance")
PLAIN = ["--unsupported", "dropout,force_fp32_for_softmax,dtype"]


def conform(*arguments, cwd=None):
    command = [sys.executable, "-m", "anyattention_conformance", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.needs("jinja2", "ml_dtypes")
def test_a_right_attention_conforms(tmp_path):
    where = tmp_path / "report.json"
    done = conform("conform", f"{SAMPLES}:right", "--contract", "C2", "--json", where, "--html", tmp_path / "x.html")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(where.read_text())
    assert report["versions"]["numpy"]
    assert not [x for x in report["results"] if x["verdict"] not in ("conforms", "unsupported")]
    assert len({x["group"] for x in report["results"]}) > 10
    assert "samples.py:right" in (tmp_path / "x.html").read_text()


def test_a_part_of_the_signature_is_enough_if_it_is_declared():
    assert conform("conform", f"{SAMPLES}:plain", *PLAIN).returncode == 0
    done = conform("conform", f"{SAMPLES}:plain", "--only", "dropout")
    assert done.returncode == 1
    assert "takes no dropout_rate" in done.stdout


def test_query_key_and_value_may_have_other_names():
    done = conform("conform", f"{SAMPLES}:other_names", "--only", "layout", "--unsupported", "mask,dropout")
    assert done.returncode == 0, done.stdout


def test_differences_are_found_and_can_be_declared(tmp_path):
    done = conform("conform", f"{SAMPLES}:zero_rows", *PLAIN, "--scope", "all")
    assert done.returncode == 1
    assert "BUG hidden rows" in done.stdout
    assert "0 instead of" in done.stdout or "maximum error" in done.stdout
    claims = tmp_path / "claims.toml"
    claims.write_text('title = "zeros"\n[meaning]\nfill = -inf\nempty = 0.0\n')
    done = conform("conform", f"{SAMPLES}:zero_rows", *PLAIN, "--claims", claims, "--only", "hidden rows")
    assert done.returncode == 0, done.stdout
    assert "declared" in done.stdout
    # Of a target that does not differ, the claim is wrong.
    assert conform("conform", f"{SAMPLES}:plain", "--claims", claims, "--only", "hidden rows").returncode == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("samples", "is no target"),
        ("no_such_module:f", "cannot be imported"),
        ("no_such_file.py:f", "no file"),
        (f"{SAMPLES}:absent", "has no absent"),
        (f"{SAMPLES}:number", "cannot be called"),
    ],
)
def test_what_is_no_target_is_said(target, message):
    done = conform("conform", target)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claims", "absent.toml"], "absent.toml"),
        (["--unsupported", "drop out"], "'drop out' is not something to support"),
        (["--only", "no such case"], "no case is chosen"),
        (["--framework", "no_such_library"], "cannot be imported"),
        (["--library", "no_such_library"], "cannot be imported"),
    ],
)
def test_bad_options_are_said(arguments, message):
    done = conform("conform", f"{SAMPLES}:right", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "RuntimeError: no kernel for you"),
        ("returns_a_list", "returned builtins.list instead of numpy.ndarray"),
        ("exits", "SystemExit"),
        ("changes_its_query", "changed its argument query"),
    ],
)
def test_what_a_target_does_wrong_is_said(name, message):
    done = conform("conform", f"{SAMPLES}:{name}", "--only", "mask", "--only", "plain")
    assert done.returncode == 1
    assert message in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("name", "message"), [("hangs", "no answer within 2 seconds"), ("dies", "its process ended with status -6")]
)
def test_the_run_goes_on_after_a_hang_or_a_death(name, message, tmp_path):
    where = tmp_path / "report.json"
    done = conform(
        *("conform", f"{SAMPLES}:{name}", "--only", "lengths", "--only", "layout", "--dtype", "float32"),
        *("--unsupported", "mask,bias,dropout", "--time-limit", 2, "--json", where),
    )
    assert done.returncode == 1
    results = json.loads(where.read_text())["results"]
    failed = {x["case"] for x in results if x["verdict"] == "BUG"}
    assert failed
    assert all("1x" in x or x == "q-length-1" for x in failed)
    assert {"plain", "kv-length-0"} <= {x["case"] for x in results if x["verdict"] == "conforms"}
    assert message in " ".join(done.stdout.split())


@pytest.mark.needs("array_api_strict")
def test_a_library_in_one_line():
    done = conform("conform", "--library", "array_api_strict", "--dtype", "float32")
    assert done.returncode == 0, done.stdout
    assert "anyattention on array_api_strict" in done.stdout


@pytest.mark.needs("jinja2")
def test_reports_side_by_side(tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for name, file in zip(("right", "zero_rows"), files, strict=True):
        conform("conform", f"{SAMPLES}:{name}", "--only", "hidden rows", "--only", "plain", "--json", file)
    table = conform("report", *files)
    assert table.returncode == 0
    assert "| hidden rows |" in table.stdout
    page = tmp_path / "page.html"
    assert conform("report", *files, "--html", page).returncode == 0
    assert page.read_text().count("samples.py:zero_rows") > 1


def test_lists():
    assert "mask-hidden-row" in conform("cases").stdout


def test_numpy_alone_is_enough(tmp_path):
    """An interpreter without site-packages, given NumPy, what the package requires, and the package."""
    (tmp_path / "site").mkdir()
    packages = ["numpy", "array_api_compat", "threadpoolctl", *PACKAGES]
    for name in packages:
        file = Path(importlib.util.find_spec(name).origin)
        source = file.parent if file.name == "__init__.py" else file
        (tmp_path / "site" / source.name).symlink_to(source)
        if (libraries := source.with_name(f"{name}.libs")).exists():
            (tmp_path / "site" / libraries.name).symlink_to(libraries)
    command = [sys.executable, "-S", "-m", "anyattention_conformance", "conform"]
    command += ["anyattention_conformance.reference:attention", "--json", "report.json"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert {x["verdict"] for x in results if x["dtype"] == "float32"} == {"conforms"}
    assert {x["verdict"] for x in results if x["dtype"] == "bfloat16"} == {"not run"}
