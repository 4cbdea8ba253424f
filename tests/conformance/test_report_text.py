"""Reports as text: what the table says, how a failure is shown, and that a target cannot steer the terminal."""

import ast
import io
import math
import re
import subprocess
import sys

import pytest

from anyattention_conformance.report_terminal import print_report, to_text
from anyattention_conformance.report_text import clean, excerpt, reproduce_line, short, summarize, to_markdown
from anyattention_conformance.results import BUG, CONFORMS, DECLARED, NOT_RUN, UNSUPPORTED, Report, Result, Rows

NAN, INF = math.nan, math.inf


def result(group="layout", verdict=CONFORMS, ratio=None, case="plain", dtype="float32", quantity="output", **fields):
    return Result(case, group, dtype, quantity, verdict, ratio=ratio, **fields)


def report(*results, target="torch SDPA", **fields):
    versions = {"torch": "2.13.0"}
    return Report(target, "t", "C3", "full", "flax 0.12.4", "2026-08-30", versions, results=list(results), **fields)


HIDDEN = result(
    "hidden rows",
    BUG,
    INF,
    case="mask-hidden-row",
    message="NaN in other places than Flax",
    size=64,
    seed=17,
    rows=Rows((0, 1, 0), (0.5, 0.25, INF), (0.5, NAN, -INF)),
)
SAMPLE = report(
    result(ratio=0.31),
    result(ratio=0.2, case="no-batch"),
    result(ratio=0.004, dtype="bfloat16"),
    HIDDEN,
    result("hidden rows", BUG, 3.2, case="large", size=4096, message="maximum error 0.2, Flax's 0.001"),
    result("hidden rows", DECLARED, case="declared", dtype="bfloat16", message="zeros"),
    result("dropout", UNSUPPORTED),
    result("dropout", NOT_RUN, dtype="bfloat16"),
    result("errors", CONFORMS, quantity="error"),
    result("errors", DECLARED, quantity="error", case="other"),
    claims=["hidden rows are zero"],
    problems=["dropout was declared, and is Flax's"],
)
TEXT = """\
torch SDPA
full tier · contract C3 · against flax 0.12.4 · 2026-08-30 · torch 2.13.0

              float32       bfloat16
layout        ✓ 0.31        ✓ <.01
hidden rows   BUG 2 of 2    declared
dropout       unsupported   not run
errors        ✓
              1 declared

✓ every result is within its budget, with the worst error over budget; BUG n of m: n of m results are not; declared:
differs as the target says it does.

BUG hidden rows  mask-hidden-row · float32 · output · ∞ × budget
  NaN in other places than Flax
  row [0, 1, 0, :]
  expected   0.5  0.25   inf
  actual     0.5   NaN  -inf
                   ^^^  ^^^^
  seed 17, 64 elements
  from anyattention_conformance import reproduce; reproduce("torch SDPA", "mask-hidden-row", "float32", framework="t")
  and 1 more in this group

✗ dropout was declared, and is Flax's
≠ declared: hidden rows are zero

✗ torch SDPA does not conform to C3: ordinary calls: 2 of 10 results fail; 1 claim did not come true
  4 of 10 results conform, 2 fail, 2 differ as declared, 1 unsupported, 1 not run, 1 problem
"""


def printed(report, monkeypatch=None, encoding="utf-8", **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, newline="\n") as file:
        print_report(report, file)
        file.flush()
        return raw.getvalue().decode(encoding)


def trimmed(text):
    return [line.rstrip() for line in text.splitlines()]


def test_the_whole_text():
    assert to_text(SAMPLE, width=120) == TEXT


@pytest.mark.parametrize("module", ["rich", None])
def test_printed_is_the_same_text_with_rich_and_without(monkeypatch, module):
    if module:
        pytest.importorskip(module)
    else:
        for name in ("rich", "rich.console", "rich.table", "rich.text"):
            monkeypatch.setitem(sys.modules, name, None)
    text = printed(SAMPLE, monkeypatch, COLUMNS="120")
    assert trimmed(text) == trimmed(TEXT)
    assert "\x1b" not in text


def test_rich_colours_the_verdicts_and_the_numbers_that_differ(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = printed(SAMPLE, monkeypatch, FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="120")
    assert re.search(r"\x1b\[1;31mBUG 2 of 2", text)
    assert re.search(r"\x1b\[32m✓ 0\.31", text)
    assert re.search(r"\x1b\[1;31m +NaN", text)
    assert trimmed(re.sub(r"\x1b\[[\d;]*m", "", text)) == trimmed(TEXT)


@pytest.mark.parametrize("width", [20, 60])
def test_a_narrow_terminal_cuts_nothing_off(monkeypatch, width):
    wide = report(*(result(f"group {i}", BUG, 2.0, dtype=x) for i in range(3) for x in ("float32", "float16", "odd")))
    for text in (to_text(wide, width=width), printed(wide, monkeypatch, COLUMNS=str(width))):
        assert len(re.findall(r"BUG 1 of 1", text)) == 9
        assert text.count(', framework="t")\n') == 3
    assert "n" * 99 in printed(report(target="n" * 99), monkeypatch, COLUMNS=str(width))
    rows = Rows((0,), tuple(map(float, range(16))), (0.0,) * 16)
    narrow = to_text(report(result(verdict=BUG, rows=rows)), width=width)
    assert max(len(x) for x in narrow.splitlines() if x.startswith(("  expected", "  actual"))) <= width


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_the_marks_gets_others(monkeypatch, encoding):
    named = report(*SAMPLE.results, target="Ω")
    text = printed(named, monkeypatch, encoding=encoding, COLUMNS="120")
    assert "ok 0.31" in text
    assert "x \\u03a9 does not conform" in text


def test_an_empty_report_conforms_to_nothing():
    text = to_text(report())
    assert text.endswith("○ torch SDPA was not compared with anything\n  0 of 0 results conform\n")
    assert "BUG" not in text
    assert trimmed(printed(report()))[-2:] == text.splitlines()[-2:]
    assert "was not compared" in to_text(report(result(verdict=UNSUPPORTED), result(verdict=NOT_RUN)))


def test_a_problem_alone_fails():
    text = to_text(report(result(), problems=["two\nlines"]))
    assert "✗ torch SDPA does not conform to C3: ordinary calls conform; 1 claim did not come true" in text
    assert "✗ two\n  lines\n" in to_text(report(problems=["two\nlines"]))


def test_what_a_target_says_cannot_steer_the_terminal(monkeypatch):
    evil = "\x1b[2J\x07[bold red]x[/bold red]\u202e\udc80"
    failed = result(verdict=BUG, message=f"{evil}\n{evil}", case=evil, group=evil, dtype=evil, quantity=evil)
    hostile = report(failed, target=evil, claims=[evil], problems=[evil])
    plain = to_text(hostile, width=1000)
    for text in (plain, printed(hostile, monkeypatch, COLUMNS="1000")):
        assert set(re.findall(r"[^\n -~]", text)) <= set("✗≠✓·")
        assert text.count("[bold red]x[/bold red]") == plain.count("[bold red]x") >= 9
        assert r" \x1b[2J\x07[bold red]x[/bold red]\u202e\udc80" in text
    to_markdown([hostile]).encode()


def test_the_smallest_case_of_each_group_is_shown():
    failures = [result("mask", BUG, case=f"case-{n}", size=n) for n in (900, 12, 400)]
    text = to_text(report(*failures, result("bias", BUG, case="other", size=5)))
    assert re.findall(r"^BUG (.*?)  (\S+)", text, re.MULTILINE) == [("mask", "case-12"), ("bias", "other")]
    assert text.count("and 2 more in this group") == 1


def test_what_reproduces_a_failure_is_python_that_names_it():
    names = ['a "b" \\ c\n', "☃ 😀 \u202e\x7f", "float32", "it's"]
    failed = result(verdict=BUG, case=names[1], dtype=names[2])
    line = reproduce_line(Report(names[0], names[3], "C1", "", "", "", {}, results=[failed]), failed)
    imported, called = ast.parse(line).body
    assert (imported.module, imported.names[0].name) == ("anyattention_conformance", called.value.func.id)
    assert [ast.literal_eval(x) for x in called.value.args] == names[:3]
    keywords = {x.arg: ast.literal_eval(x.value) for x in called.value.keywords}
    assert keywords == {"framework": names[3], "contract": "C1"}


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        *[(0.0, "0.00"), (0.0049, "<.01"), (0.005, "0.01"), (0.314, "0.31"), (0.994, "0.99"), (0.995, "1.0")],
        *[(1.04, "1.0"), (9.94, "9.9"), (9.96, "10"), (31.4, "31"), (9999.0, "9999"), (12345.0, "1e4"), (INF, "∞")],
    ],
)
def test_a_ratio_has_two_digits(ratio, expected):
    assert short(ratio) == expected


def test_numbers_have_as_many_digits_as_it_takes():
    def shown(a, b):
        return [tuple(x) for x in excerpt(Rows((), a, b), 16).entries]

    assert shown((1.0, 2.0), (1.0, 2.5)) == [("1", "1", False), ("2", "2.5", True)]
    assert shown((0.1,), (0.1 + 1e-7,)) == [("0.1", "0.1000001", True)]
    assert shown((0.1,), (math.nextafter(0.1, 1),))[0][2]
    assert shown((NAN, INF), (NAN, INF)) == [("NaN", "NaN", False), ("inf", "inf", False)]
    assert shown((1.0, 2.0), (1.0,)) == [("1", "1", False), ("2", "", True)]
    assert shown((), ()) == []


def test_a_long_row_is_shown_around_its_worst_number():
    expected = tuple(float(i) for i in range(200))
    for at, first in ((0, 0), (120, 112), (199, 184)):
        actual = list(expected)
        actual[at] = NAN
        actual[50] += 5
        label, entries = excerpt(Rows((3, 1), expected, tuple(actual)), 16)
        assert label == f"[3, 1, :], entries {first} to {first + 15} of 200"
        assert [x.expected for x in entries if x.differs] == [str(at)]


def test_a_cell_is_named_after_the_verdict_that_counts():
    def cell(*verdicts):
        return summarize(result(verdict=x, ratio=r) for x, r in verdicts)

    assert cell().text == ""
    assert cell((CONFORMS, NAN), (CONFORMS, 0.2), (CONFORMS, 0.7)).text == "✓ 0.70"
    assert cell((CONFORMS, NAN)).text == "✓"
    assert cell((CONFORMS, 0.2), (DECLARED, 9.0), (UNSUPPORTED, None)).text == "✓ 0.20\n1 declared\n1 unsupported"
    assert cell((CONFORMS, 0.2), (BUG, 0.4), (BUG, None), (DECLARED, 9.0)).text == "BUG 2 of 4\n1 declared"
    assert cell((CONFORMS, 0.9), (BUG, 0.4)).ratio == 0.4
    assert cell((NOT_RUN, None), (UNSUPPORTED, None)).text == "unsupported\n1 not run"


def test_markdown():
    second = report(result(ratio=0.1), result("dropout", DECLARED), result("errors"), target="a|b_c <i>")
    assert to_markdown([SAMPLE, second]) == (
        "|  | torch SDPA | a\\|b\\_c \\<i\\> |\n"
        "| --- | --- | --- |\n"
        "| layout | ✓ | ✓ |\n"
        "| hidden rows | ✗ 0 of 3 |  |\n"
        "| dropout | – | differs |\n"
        "| errors | 1 of 2, 1 differ | ✓ |\n"
        "\n"
        "✓: every result has Flax's numbers; n of m: so many have, the rest is unsupported or not run unless marked; "
        "differ: unlike Flax, as the target declares; ✗: at least one fails; –: unsupported or not run.\n"
    )
    assert to_markdown([second, second]).splitlines()[-1].startswith("✓: every result has Flax's numbers; differ: ")
    partly = report(result(), result(verdict=UNSUPPORTED))
    assert "| layout | 1 of 2 |" in to_markdown([partly])
    assert to_markdown([report()]) == "|  | torch SDPA |\n| --- | --- |\n"


def test_clean_leaves_text_as_it_is():
    assert clean("naïve ☃ 漢字 a\tb\u2028") == "naïve ☃ 漢字 a\\tb\\u2028"


def test_only_numpy_is_needed():
    code = "import sys; sys.modules |= dict.fromkeys(('rich', 'jinja2', 'jax', 'flax', 'torch', 'ml_dtypes'))\n"
    code += "from anyattention_conformance.report_terminal import print_report\n"
    code += "from anyattention_conformance.report_text import to_markdown\n"
    code += "from anyattention_conformance.results import Report, Result\n"
    code += "report = Report('t', 'f', 'C2', '', '', '', {}, results=[Result('c', 'g', 'd', 'q', 'BUG')])\n"
    code += "print_report(report); print(to_markdown([report]))"
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert "BUG 1 of 1" in done.stdout
    assert "| g | ✗ 0 of 1 |" in done.stdout
    assert "\x1b" not in done.stdout
