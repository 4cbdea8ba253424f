"""The command line, as a user calls it: in a process of its own."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anyattention
from anyattention_conformance import words
from anyattention_conformance.case import BEYOND

SAMPLES = Path(__file__).with_name("samples.py")
PACKAGES = ("anyattention", "anyattention_backends", "anyattention_conformance")
PLAIN = ["--unsupported", "dropout,force_fp32_for_softmax,dtype"]


def conform(*arguments, cwd=None, without=()):
    """The command; `without` some packages, as on a machine that does not have them."""
    command = [sys.executable, "-m", "anyattention_conformance", *map(str, arguments)]
    if without:
        code = f"import sys; sys.modules |= dict.fromkeys({without!r}); from anyattention_conformance.cli import main"
        command[1:3] = ["-c", f"{code}\nif __name__ == '__main__': sys.exit(main())"]
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
    assert "selection of 25 cases passes" in done.stdout
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
    ("arguments", "without", "message"),
    [
        (["--oracle", "live"], ("jax", "flax"), "Flax cannot be called live"),
        (["--contract", "C1"], ("flax",), "Flax cannot be called live"),
        (["--html", "x.html"], ("jinja2",), 'the HTML report needs jinja2: pip install "anyattention[conform]"'),
        (["--json", "no/such/folder.json"], (), "no/such/folder.json"),
        (["--write-claims", SAMPLES], (), "is not written over: name another file, or remove it"),
        (["--write-claims", "x.toml", "--only", "mask"], (), "leave out --only and --dtype"),
    ],
)
def test_what_cannot_run_is_said_in_one_sentence(arguments, without, message, tmp_path):
    done = conform("conform", f"{SAMPLES}:right", *arguments, without=without, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (sentence,) = done.stderr.splitlines()
    assert message in sentence
    assert not list(tmp_path.iterdir())


def test_a_framework_that_cannot_be_inferred_has_to_be_named():
    done = conform("conform", f"{SAMPLES}:unclear")
    assert done.returncode == 0 or "numpy" in done.stdout  # the file imports NumPy
    done = conform("conform", "operator:matmul")
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert "pass --framework" in sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claims", "absent.toml"], "absent.toml"),
        (["--unsupported", "drop out"], "'drop out' is not something to support (did you mean 'dropout'"),
        (["--only", "no such case"], "no case is chosen"),
        (["--only", "msak"], "no case is chosen (did you mean 'mask'"),
        (["--supports", "sink"], "'sink' is nothing that Flax lacks and cases ask for (did you mean 'sinks'"),
        (["--unsupported", "sinks"], "'sinks' is beyond Flax, and asked only where it is declared as supported"),
        (["--only", "soft-cap"], "these cases need what Flax lacks (soft cap): declare with --supports what there is"),
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


@pytest.mark.parametrize("arguments", [["--only", "mask"], ["--dtype", "float32", "--unsupported", "dropout,bias"]])
def test_a_selection_never_conforms(arguments, tmp_path):
    """In no output, and the tier that ran is named."""
    where, page = tmp_path / "x.json", tmp_path / "x.html"
    done = conform("conform", f"{SAMPLES}:takes_no_bias", *arguments, "--json", where, "--html", page)
    data = json.loads(where.read_text())
    selected = f"selection of {len({x['case'] for x in data['results']})} cases"
    assert selected in " ".join(done.stdout.split())
    assert selected in data["verdict"]["sentence"]
    assert data["selection"] == [x for x in arguments[:2] if not x.startswith("--")]
    assert data["tier"] == ("full" if "--only" in arguments else "smoke")
    for text in (done.stdout, where.read_text(), page.read_text()):
        assert "conforms to C" not in text
        assert "conform to C" not in text


def test_a_right_port_of_ordinary_scope_reads_as_right():
    arguments = ("conform", f"{SAMPLES}:zero_rows", *PLAIN)
    done = conform(*arguments)
    assert done.returncode == 0
    assert "ordinary calls conform to C3; corners: " in done.stdout
    assert "corner hidden rows" in done.stdout
    assert "BUG hidden rows" not in done.stdout
    done = conform(*arguments, "--strict")
    assert done.returncode == 1
    assert "does not conform to C3: ordinary calls conform; corners: " in done.stdout


def test_the_diagnosis_comes_first(tmp_path):
    where = tmp_path / "x.json"
    done = conform("conform", f"{SAMPLES}:inverted", *PLAIN, "--json", where)
    assert done.returncode == 1
    before, _, _ = done.stdout.partition("float32")
    assert "✗ It hides the keys where the mask is true." in before
    assert "use ~mask" in before
    (diagnosis,) = json.loads(where.read_text())["diagnosis"]
    assert diagnosis["probe"] == "mask inverted"
    # What is ordinary is told before corners, and one group of it at first.
    assert done.stdout.index("BUG mask") < done.stdout.index("corner ")


def test_parameters_that_are_neither_taken_nor_declared():
    done = conform("conform", f"{SAMPLES}:takes_no_bias")
    assert done.returncode == 1
    assert "It has no parameter for bias and dropout" in done.stdout
    assert "--unsupported bias,dropout" in done.stdout
    done = conform("conform", f"{SAMPLES}:takes_no_bias", "--unsupported", "bias,dropout")
    assert done.returncode == 0
    assert "has no parameter" not in done.stdout


def test_written_claims_make_it_pass(tmp_path):
    where = tmp_path / "claims.toml"
    assert conform("conform", f"{SAMPLES}:zero_rows", "--write-claims", where).returncode == 1
    assert "# check: " in where.read_text()
    done = conform("conform", f"{SAMPLES}:zero_rows", "--claims", where)
    assert done.returncode == 0, done.stdout
    assert "conforms to C3" in done.stdout
    assert "conforms to C3" not in conform("conform", f"{SAMPLES}:plain", "--claims", where).stdout
    before = where.read_text()
    assert conform("conform", f"{SAMPLES}:plain", "--write-claims", where).returncode == 2
    assert where.read_text() == before


def test_a_wrong_answer_is_not_unsupported(tmp_path):
    arguments = ("--only", "mask", "--unsupported", "mask")
    done = conform("conform", f"{SAMPLES}:inverted", *arguments)
    assert done.returncode == 1
    text = " ".join(done.stdout.split())
    assert "mask is declared unsupported, so it should raise: declare another answer under [[differs]]" in text
    assert "declared, but did not occur: mask (the target does not raise" in text


@pytest.mark.parametrize(
    ("name", "message"), [("misspelt", "NameError"), ("refuses_all", "with shapes that fit it raises as well")]
)
def test_an_exception_for_another_reason_is_no_refusal(name, message):
    arguments = ("--only", "depths-differ", "--only", "heads-differ", "--unsupported", "bias,mask")
    done = conform("conform", f"{SAMPLES}:{name}", *arguments)
    assert done.returncode == 1
    text = " ".join(done.stdout.split())
    assert message in text
    assert "this is no refusal of the shapes" in text
    assert conform("conform", f"{SAMPLES}:right", *arguments[:4]).returncode == 0


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_a_file_named_like_a_library_does_not_take_its_place(name, tmp_path):
    code = "import numpy, torch\ndef attention(query, key, value):\n    return torch.softmax(query, -1)\n"
    (tmp_path / f"{name}.py").write_text(code)
    done = conform("conform", tmp_path / f"{name}.py:attention".replace("\\", "/"), "--only", "plain", cwd="/")
    assert done.returncode == 1, done.stderr
    assert "inferred: it uses torch" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", [(), ("conform",), ("report",), ("cases",), ("mutants",), ("doctor",)])
def test_help(command):
    """In one style: small letters and no full stop, with an example; what the exit status means."""
    text = conform(*command, "--help").stdout
    assert "example" in text
    options = re.findall(r"^  (?:-\S+|[a-z]\w*)[^\n]*?(?:  +|\n +)(\S.*(?:\n {10,}\S.*)*)", text, re.MULTILINE)
    descriptions = [x for x in options if not x.startswith("-")]
    assert descriptions
    assert not [x for x in descriptions if x.rstrip().endswith(".") and "see below" not in x]
    if command in ((), ("conform",)):
        assert all(f"  {status}  " in text for status in range(3))
    if command == ("conform",):
        assert all(name in text for name in ("C1  ", "C2  ", "C3  ", "guarantees.md", "ordinary  ", "[[differs]]"))


def test_the_version():
    assert conform("--version").stdout == f"anyattention {anyattention.__version__}\n"


def test_what_flax_lacks_is_asked_where_it_is_declared(tmp_path):
    """And under the names that a parameter has; what is not declared is offered."""
    where = tmp_path / "x.json"
    arguments = ("conform", f"{SAMPLES}:scaled", "--dtype", "float32", "--unsupported", "bias,mask,dropout")
    done = conform(*arguments)
    assert done.returncode == 0, done.stdout
    assert "not asked: scale, sinks, which --supports asks for" in " ".join(done.stdout.split())
    done = conform(*arguments, "--supports", "scale, sinks", "--json", where)
    assert done.returncode == 1
    text = " ".join(done.stdout.split())
    assert "beyond Flax: scale, sinks" in text
    assert "BUG sinks sinks" in text
    assert "the reference's" in text
    report = json.loads(where.read_text())
    assert report["supports"] == report["offers"] == ["scale", "sinks"]
    assert {x["verdict"] for x in report["results"] if x["group"] == "scale"} == {"conforms", "unsupported"}


def test_words_have_meanings():
    lines = conform("cases", "--words").stdout.splitlines()
    assert len(lines) == len(words.USED)
    assert "the parameter mask" in next(x for x in lines if x.startswith("mask "))
    assert set(words.WORDS) == words.USED
    assert sum("beyond Flax, for --supports: " in x for x in lines) == len(BEYOND)


def test_lists():
    header, *lines = conform("cases").stdout.splitlines()
    assert header.split()[:3] == ["case", "group", "tier"]
    assert any("mask-hidden-row" in line and "leaves each query a key" in line for line in lines)


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
