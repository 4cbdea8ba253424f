"""Reports as a page: what it says, that it is safe and needs nothing, and what a browser makes of it."""

import base64
import colorsys
import hashlib
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from html import escape
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from anyattention_conformance.report_html import to_html
from anyattention_conformance.results import (
    BUG,
    CONFORMS,
    DECLARED,
    NOT_RUN,
    UNSUPPORTED,
    Diagnosis,
    Report,
    Result,
    Rows,
)

pytest.importorskip("jinja2")
NAN, INF = math.nan, math.inf
INLINE = {"a", "b", "code", "i", "span", "sub", "wbr"}
VOID = {"meta", "wbr", "input", "circle", "path", "rect", "polyline"}
EVIL = """'"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}</style><!--\x00\u202e"""


def result(group="layout", verdict=CONFORMS, ratio=None, case="plain", dtype="float32", quantity="output", **fields):
    return Result(case, group, dtype, quantity, verdict, ratio=ratio, **fields)


def report(*results, target="torch SDPA", contract="C3", **fields):
    fields = {
        "tier": "full",
        "oracle": "flax 0.12.4, live",
        "date": "2026-08-30",
        "versions": {"torch": "2.13.0"},
    } | fields
    return Report(target, "torch", contract, results=list(results), **fields)


def measured(ratio, verdict=CONFORMS, flax_error=1e-7, **fields):
    error = ratio * (2 * flax_error + 4 * 2.0**-23)
    return result(verdict=verdict, ratio=ratio, error=error, flax_error=flax_error, **fields)


HIDDEN = result(
    "hidden rows",
    BUG,
    INF,
    case="mask-hidden-row",
    message="NaN in other places than Flax",
    size=64,
    seed=17,
    rows=Rows((0, 1, 0), (0.5, 0.25, INF), (0.5, NAN, -INF)),
    error=INF,
    flax_error=0.0,
)
FAILS = report(
    measured(0.31),
    measured(0.05, case="no-batch"),
    measured(0.9, dtype="bfloat16"),
    HIDDEN,
    measured(3.2, BUG, group="hidden rows", case="larger", size=4096, message="maximum error 0.2"),
    result("hidden rows", DECLARED, dtype="bfloat16", message="zeros"),
    result("dropout", UNSUPPORTED),
    result("dropout", NOT_RUN, dtype="bfloat16"),
    result("errors", quantity="error"),
    result("errors", BUG, quantity="error", dtype="bfloat16", message="no error", size=1),
    result("errors", quantity="error", dtype="bfloat16", case="other"),
    claims=["rows that see nothing are zero"],
    problems=["dropout was declared, and is Flax's"],
)
CONFORMING = report(measured(0.2), measured(0.7, group="mask"), target="numpy", contract="C2")


def seven():
    """Seven targets with all dtypes and many groups, among them the worst of everything."""
    dtypes, steps = ("float32", "bfloat16", "float16", "float64"), (0.05, 0.2, 0.4, 0.7, 0.95, 1.5, 5.0, 1e9)
    found = [
        measured(r, BUG if r > 1 else CONFORMS, group=f"a group of cases {i}", dtype=x, case=f"{x}-{i}")
        for x in dtypes
        for i, r in enumerate(steps * 2)
    ]
    names = ["numpy", "keras.ops.dot_product_attention", "x" * 70, "jax", "mlx", "torch SDPA"]
    return [*(report(*found, *FAILS.results, target=x) for x in names), CONFORMING]


def without_script(html):
    """The page without the one script that is its own."""
    before, script, after = re.split("(<script>.*</script>)", html, flags=re.DOTALL)
    assert "button.copy" in script
    return before + after


class Page(HTMLParser):
    """The elements of a page: tag, attributes, and the text inside."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.starts = [], [], []
        self.feed(html)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        if tag not in INLINE:
            self.handle_data(" ")
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, having=""):
        return [(x, " ".join(text.split())) for t, x, text in self.elements if t == tag and having in str(x)]

    def texts(self, tag, having=""):
        return [text for _, text in self.all(tag, having)]


def cells(*reports):
    """The cells of the table, by case group: class and text."""
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>\n<td.*?</tr>', html := to_html(list(reports)), re.DOTALL)
    bodies = re.findall(r'<tr><th scope="row">[^<]*</th>\n(<td.*?)</tr>', html, re.DOTALL)
    found = [[(x["class"].split()[0], text) for x, text in Page(body).all("td")] for body in bodies]
    return dict(zip(rows, found, strict=True))


def headline(*reports):
    (found,) = Page(to_html(list(reports))).texts("h1")
    return found


def test_the_headline_says_what_takes_from_the_verdict():
    assert headline(CONFORMING) == "✓ numpy conforms to C2"
    lacks = [result(verdict=UNSUPPORTED, case=f"{i}") for i in range(60)]
    found = report(measured(0.2), *lacks, claims=["unsupported: bias", "fill: minus infinity"])
    assert headline(found) == "✓ torch SDPA conforms to C3 with 60 of 61 results unsupported, 1 declared difference"
    assert headline(FAILS).startswith("✗ torch SDPA does not conform to C3 with 1 of 11 results unsupported")
    corner = result("depth", BUG, corner="no model has this", case="depth-0")
    found = report(measured(0.2), corner, scope="ordinary")
    assert headline(found) == "✓ torch SDPA: ordinary calls conform to C3 with 1 of 1 corners differing"
    assert headline(FAILS, CONFORMING) == "1 of 2 targets conforms"


def test_a_selection_never_reads_as_conforming():
    chosen = report(measured(0.2), selection=["mask"])
    assert headline(chosen) == "◐ torch SDPA: selection of 1 case passes"
    assert headline(chosen, CONFORMING) == "1 of 1 targets conforms, beside 1 selection of cases"
    page = Page(to_html([chosen]))
    assert "conforms to" not in "".join(page.texts("header"))
    assert page.all("b", "part")
    assert "--ok" not in next(x["style"] for x, _ in page.all("span", "ring"))
    assert not page.all("b", "good")


def test_the_shares_of_verdicts_are_said_and_drawn():
    page = Page(to_html([FAILS]))
    (parts,) = page.texts("dl", "parts")
    assert parts == "ordinary calls 5 conform 1 differ as declared 1 unsupported 3 fail 1 not run"
    assert [x["style"] for x, _ in page.all("i", "flex")] == ["flex:5", "flex:1", "flex:1", "flex:3", "flex:1"]
    ring = next(x["style"] for x, _ in page.all("span", "ring"))
    assert re.findall(r"--(\w+)\) ([\d.]+)% ([\d.]+)%", ring) == [
        ("ok", "0.0", "45.5"),
        ("declared", "45.5", "54.5"),
        ("unsupported", "54.5", "63.6"),
        ("notrun", "63.6", "72.7"),
        ("bug", "72.7", "100.0"),
    ]


def test_of_many_targets_the_one_that_fails_most_comes_first():
    little = report(measured(3.0, BUG), *[measured(0.1, case=f"{i}") for i in range(5)], target="little")
    names = Page(to_html([CONFORMING, little, FAILS])).texts("h2")[:3]
    assert names == ["torch SDPA", "little", "numpy"]


def test_a_contract_is_explained_where_it_is_named():
    for reports, names in (([FAILS], ["C3"]), ([FAILS, CONFORMING], ["C2", "C3"])):
        page = Page(to_html(reports))
        assert [x.partition(":")[0] for x in page.texts("p", "lead")] == names
        assert "twice Flax's own, plus 4 eps" in page.texts("p", "lead")[-1]


def test_a_cell_says_its_verdict_in_more_than_a_colour():
    assert cells(FAILS) == {
        "layout": [("s0", "conforms 0.31"), ("s1", "conforms 0.90")],
        "hidden rows": [("bug", "BUG ✗"), ("declared", "differs as declared ≠")],
        "dropout": [("unsupported", "unsupported –"), ("notrun", "not run ○")],
        "errors": [("ok", "conforms ✓"), ("bug", "BUG ✗")],
    }


def test_the_scale_has_its_steps_on_either_side_of_the_budget():
    def shade(ratio, verdict):
        return cells(report(measured(ratio, verdict)))["layout"][0]

    within = [(0.0, "s0"), (0.1, "s0"), (0.5, "s0"), (0.51, "s1"), (1.0, "s1")]
    over = [(1.004, "s2"), (2.0, "s2"), (10.0, "s3"), (11.0, "s4")]
    assert [shade(x, CONFORMS)[0] for x, _ in within] == [x for _, x in within]
    assert [shade(x, BUG)[0] for x, _ in over] == [x for _, x in over]
    # Within a budget and yet a failure, as where equal bits were asked for: not the colour of what conforms.
    assert shade(0.3, BUG) == ("bug", "BUG ✗")
    assert shade(NAN, BUG) == ("bug", "BUG ✗")
    assert shade(INF, BUG) == ("bug", "BUG ✗")
    assert shade(31.4, BUG) == ("s4", "BUG 31×")
    assert shade(3e18, BUG) == ("s4", "BUG >1000×")


def test_a_column_has_numbers_below_a_thousand_and_marks_and_nothing_else():
    table = cells(*seven())
    texts = {
        re.sub(r"^(conforms|BUG|differs as declared|unsupported|not run) ", "", x) for y in table.values() for _, x in y
    }
    assert texts
    assert all(re.fullmatch(r"|>1000×|\d+(\.\d+)?×?|<\.01|[✓✗≠–○](\d| .*)?", x.split(" ")[0]) for x in texts), texts


def test_other_verdicts_in_a_cell_are_counted_and_the_legend_has_every_mark():
    mixed = report(measured(0.2), result(verdict=DECLARED), result(verdict=UNSUPPORTED), result(verdict=UNSUPPORTED))
    assert cells(mixed)["layout"] == [("s0", "conforms 0.20 ≠1 –2")]
    legend = " ".join(Page(to_html([mixed])).texts("ul", "legend"))
    for mark in ("≤ 0.5", "0.5–1", "1–2×", "2–10×", "> 10×", "✓", "✗", "≠", "–", "○", "–2"):
        assert f" {mark} " in f" {legend} ", mark


def test_the_table_has_a_place_for_every_group_and_dtype():
    other = report(result("mask", dtype="odd"), result("layout", dtype="float64"), target="other")
    table = cells(CONFORMING, other)
    assert list(table) == ["layout", "mask"]
    assert [[x for x, _ in row] for row in table.values()] == [["s0", "ok", "empty"], ["s1", "empty", "ok"]]
    page = Page(to_html([CONFORMING, other]))
    assert page.texts("th", "dtype") == ["float32", "float64", "odd"]
    assert [x["colspan"] for x, _ in page.all("th", "target")] == ["1", "2"]


def test_a_cell_leads_to_the_numbers_and_the_case_behind_it_needs_no_hovering():
    page = Page(to_html([FAILS]))
    assert not page.all("td", "'title'")
    targets = [x["href"] for x, _ in page.all("a")]
    assert len(targets) >= 2
    assert {f"#{x['id']}" for _, x, _ in page.elements if "id" in x} >= set(targets)
    (behind,) = [x for x in page.texts("table") if x.startswith("group dtype results worst")]
    assert "hidden rows float32 2 fail mask-hidden-row output ∞ × budget" in behind
    assert "layout float32 2 conform plain output 0.31 × budget" in behind


def test_failures_in_order_of_weight_the_first_is_open():
    page = Page(to_html([FAILS]))
    found = [(x, text) for x, text in page.all("details", "failure")]
    first, second = (text for _, text in found)
    assert ["open" in x for x, _ in found] == [True, False]
    assert first.startswith("hidden rows mask-hidden-row float32 output NaN in other places than Flax and 1 more")
    assert "row [0, 1, 0, :] expected 0.5 0.25 inf actual 0.5 NaN -inf seed 17, 64 elements" in first
    line = 'reproduce("torch SDPA", "mask-hidden-row", "float32", framework="torch")'
    assert f"from anyattention_conformance import reproduce; {line}" in page.texts("code")
    assert "1 more in this group" in first
    assert "larger" in first
    assert second.startswith("errors plain bfloat16 error no error")
    assert "seed 0, 1 element;" in second


def test_only_what_stands_out_is_marked():
    def marked(expected, actual):
        found = result(verdict=BUG, ratio=5.0, rows=Rows((0,), expected, actual), error=1.0, flax_error=0.0)
        return Page(to_html([report(found)])).texts("td", "'class': 'differs'")

    assert marked((0.5, 0.25, 1.0, 2.0), (0.5001, 0.25, 1.5, 2.001)) == ["1.5"]
    assert marked((0.5, 0.25, 1.0), (0.5, NAN, 1.0)) == ["NaN"]
    assert marked((0.5, 0.25, 1.0), (NAN, NAN, NAN)) == []
    assert marked((0.5, 0.25, 1.0), (1.5, 1.25, 2.0)) == []


def test_ordinary_calls_come_before_corners_and_a_diagnosis_before_all():
    found = report(
        result("depth", BUG, case="depth-0", corner="no model has this", message="NaN"),
        measured(3.0, BUG, group="bias", case="bias-heads"),
        diagnosis=[Diagnosis("inverted", "The mask is inverted.", "mask = ~mask")],
    )
    text = Page(to_html([found])).texts("section", "Findings")[0]
    places = [
        text.index(x) for x in ("The mask is inverted.", "mask = ~mask", "bias-heads", "Corners that differ", "depth-0")
    ]
    assert places == sorted(places)
    assert "A corner: no model has this" in text


def test_claims_and_problems():
    page = Page(to_html([FAILS]))
    items = page.texts("li", "{}")
    assert "✗ dropout was declared, and is Flax's" in items
    assert "≠ rows that see nothing are zero" in items


def test_copying_needs_the_script_and_nothing_else_does():
    html = to_html([FAILS])
    page = Page(html)
    buttons = page.all("button")
    assert len(buttons) == len(page.all("pre")) == 2
    assert all("hidden" in x for x, _ in buttons)  # until the script shows them
    assert len(page.all("script")) == 1
    (policy,) = page.all("meta", "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(re.search("<script>(.*?)</script>", html, re.DOTALL)[1].encode()).digest())
    assert policy[0]["content"].endswith(f"script-src 'sha256-{digest.decode()}'")


def test_each_result_is_a_point_and_the_lines_are_where_they_should_be():
    zero, tiny, large = (result(error=x, flax_error=x) for x in (0.0, 1e-30, NAN))
    on_budget = [measured(1.0, flax_error=x) for x in (1e-8, 1e-7, 1e-6)]
    same = [result(error=x, flax_error=x) for x in (1e-7, 1e-6)]
    page = Page(to_html([report(zero, tiny, large, *on_budget, *same, measured(9.0, DECLARED), measured(4.0, BUG))]))
    points = [(float(x["cx"]), float(x["cy"])) for x, _ in page.all("circle") if x["cx"] != "13"]  # of the legend
    assert len(points) == 7  # two are both on the edge
    low, high, *inside = points
    assert low == (74.0, 400.0)
    assert high == (458.0, 16.0)

    def above(line, x):
        """The height of a line at x, between the places that it is drawn through."""
        places = [tuple(map(float, p.split(","))) for p in line.split()]
        for (x0, y0), (x1, y1) in pairwise(places):
            if x0 <= x <= x1:
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return None

    lines = {x["class"]: x["points"] for x, _ in page.all("polyline")}
    assert all(above(lines["budget"], x) == pytest.approx(y, abs=0.3) for x, y in inside[:3])
    assert all(above(lines["same"], x) == pytest.approx(y, abs=0.3) for x, y in inside[3:])
    groups = [x["class"].split()[1] for x, _ in page.all("g") if "t0" in x["class"]]
    assert groups == ["ok", "declared", "bug"]
    titles = page.texts("title")[1:]
    assert "and 1 more here" in titles[0]
    assert "torch SDPA · float32 · plain, output BUG, 4.0 × budget error 2.7e-06, Flax's 1e-07" in titles
    (note,) = page.texts("p", "clipped")
    assert "zero" in note
    assert "not finite" in note


def test_without_errors_there_is_no_plot():
    html = to_html([report(result(), result("layout", UNSUPPORTED))])
    assert "<svg" not in html
    assert "Flax's own</h2>" not in html


@pytest.mark.parametrize("reports", [[], [report()], [report(), report()], [report(), FAILS], [report(problems=["p"])]])
def test_empty_reports(reports):
    page = Page(to_html(reports))
    (headline,) = page.texts("h1")
    assert "conforms to" not in headline
    if reports == [report()]:
        assert headline == "○ torch SDPA was not compared with anything"


def hostile():
    failed = [
        result(EVIL, BUG, 3.0, EVIL, x, EVIL, message=f"{EVIL}\n{EVIL}", error=1.0, flax_error=1.0, rows=HIDDEN.rows)
        for x in (EVIL, "float32", "float32")
    ]
    said = {"title": EVIL, "oracle": EVIL, "tier": EVIL, "date": EVIL, "versions": {EVIL: EVIL}}
    return [report(*failed, target=EVIL, contract=EVIL, claims=[EVIL], problems=[EVIL], **said)]


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_target_says_is_text(count):
    reports = hostile() * count
    html = without_script(to_html(reports))
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, *_ in page.elements}
    assert not [x for _, x, _ in page.elements if any(name.startswith("on") for name in x)]
    assert html.count("&lt;script&gt;") == html.lower().replace("script-src", "").count("script") / 2 > 20
    assert not set(html) & {"\x00", "\u202e"}
    shown = EVIL.replace("\x00", r"\x00").replace("\u202e", r"\u202e")
    assert set(page.texts("p", "message")) == {f"{shown} {shown}"}
    names = [x for x in page.texts("h1" if count == 1 else "h2") if "{{" in x]
    assert len(names) == (1 if count == 1 else 4)
    assert all(shown in x for x in names)


@pytest.mark.parametrize("make", [seven, hostile])
def test_the_page_refers_to_nothing_outside(make):
    html = without_script(to_html(make()))
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<base|<iframe|<object|<script", html)
    assert not [x for _, x, _ in page.elements if {"src", "srcset", "action", "data"} & set(x)]
    assert all(x["href"].startswith("#t") for _, x, _ in page.elements if "href" in x)
    (policy,) = page.all("meta", "Content-Security-Policy")
    assert "default-src 'none'" in policy[0]["content"]


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RuntimeError, match=r'needs jinja2: pip install "anyattention\[conform\]"'):
        to_html([FAILS])


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
MEASURE = """<script>
const box = x => document.querySelector(x).getBoundingClientRect(), scroll = document.querySelector('.scroll');
const left = box('tbody th').left, first = document.querySelector('.diagnosis, .failure, .card');
const wide = [...document.body.querySelectorAll('*')].filter(x => !x.closest('.scroll, .numbers, .rest, .hidden') &&
  x.getBoundingClientRect().right > innerWidth + 1).length;
const fold = first ? first.getBoundingClientRect().bottom : 0;
scroll.scrollLeft = 500;
const bad = [...document.querySelectorAll('.heat td')].filter(x => x.scrollWidth > x.clientWidth + 1).length;
parent.document.title = [innerWidth, document.documentElement.scrollWidth, scroll.scrollWidth > scroll.clientWidth + 1,
  scroll.scrollLeft > 0, box('tbody th').left - left, bad, document.querySelectorAll('.heat td[class]').length,
  wide, fold, getComputedStyle(document.querySelector('.sideways')).display].join();
</script>"""


def browse(folder, html, *flags):
    """What Chromium prints, given a page and flags; nothing of an earlier run is left over."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, (folder / "page.html").as_uri()]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def colours(html, *, dark):
    """The colours of the style sheet, by name."""
    light, after = html.split("@media (prefers-color-scheme: dark)", 1)
    found = re.findall(r"--([\w-]+): (#\w+);", after.split("</style>")[0] if dark else light)
    return {name: tuple(bytes.fromhex(x[1:] if len(x) == 7 else x[1] * 2 + x[2] * 2 + x[3] * 2)) for name, x in found}


def contrast(one, other):
    """Of two colours, as WCAG has it."""

    def luminance(colour):
        parts = [x / 255 for x in colour]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_worse_is_more_intense_and_all_can_be_read(dark):
    named = colours(to_html([FAILS]), dark=dark)
    steps = [contrast(named[f"s{i}"], named["page"]) for i in range(5)]
    assert steps == sorted(steps)
    assert all(b > 1.15 * a for a, b in pairwise(steps))
    assert all(colorsys.rgb_to_hsv(*named[f"s{i}"])[1] > 0.6 for i in (2, 3, 4))  # not paler instead
    assert all(contrast(named[f"s{i}"], named[f"on-s{i}"]) >= 4.5 for i in range(5))
    assert min(contrast(named[x], named["on-hatch"]) for x in ("hatch", "hatch-2")) >= 4.5
    for text in ("ink", "muted", "ok", "declared", "bug"):
        for ground in ("page", "panel", "soft"):
            assert contrast(named[text], named[ground]) >= 4.5, (text, ground)
    assert contrast(named["bug"], named["bad-soft"]) >= 4.5


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_table_in_its_colours(tmp_path, dark):
    image = pytest.importorskip("PIL.Image")
    html = to_html(seven())
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    browse(tmp_path, html, scheme, "--window-size=1400,2400", f"--screenshot={tmp_path / 'page.png'}")
    with image.open(tmp_path / "page.png") as file:
        assert file.size == (1400, 2400)
        pixels = Counter({colour: n for n, colour in file.convert("RGB").getcolors(maxcolors=2**24)})
    named = colours(html, dark=dark)
    assert pixels.most_common(2)[0][0] in (named["page"], named["panel"])
    for step in range(5):  # twelve cells and more of each in sight, of some 35 by 25 pixels less what is written there
        assert pixels[named[f"s{step}"]] > 12 * 500, f"step {step}"
    for name in ("hatch", "hatch-2", "declared", "ok", "bug", "unsupported", "ink", "soft"):
        assert pixels[named[name]] > 100, name


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 400, 1300])
@pytest.mark.parametrize("make", [seven, lambda: [FAILS]], ids=["seven", "one"])
def test_the_page_is_as_wide_as_the_window_and_the_table_scrolls_within(tmp_path, make, width):
    html = re.sub(r"<meta http-equiv.*?>", "", to_html(make())).replace("</body>", f"{MEASURE}</body>")
    # In a frame, since a window cannot be as narrow as a phone.
    frame = f'<title></title><iframe width="{width}" height="900" style="border:0" srcdoc="{escape(html)}"></iframe>'
    dom = browse(tmp_path, frame, "--window-size=1600,1000", "--dump-dom")
    found = re.search("<title>(.*?)</title>", dom)[1].split(",")
    window, page, wide, scrolled, moved, overflowing, count, wider, fold, sign = found
    assert (window, page) == (str(width), str(width))
    many = len(make()) > 1
    assert (wide, scrolled) == (("true", "true") if many else ("false", "false"))
    assert sign == ("block" if many else "none")  # that the table scrolls
    assert abs(float(moved)) <= 2  # the names of the groups stay where they are
    assert overflowing == "0"
    assert int(count) == (21 * 25 + 1 if many else 4 * 2 + 1)  # with the corner
    assert wider == "0"  # nothing but the table is wider than the screen
    assert 0 < float(fold) <= 900  # the first finding is on the first screen


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.slow
def test_nothing_that_a_target_says_runs(tmp_path):
    marked = to_html(hostile()).replace("alert(1)", "document.title=1")
    dom = browse(tmp_path, marked, "--dump-dom")
    assert "<script" not in without_script(dom)
    assert "<img" not in dom
    assert "<title>1</title>" not in dom
    run = marked.replace("</body>", "<script>document.body.innerHTML = ''</script></body>")
    assert "does not conform" in browse(tmp_path, run, "--dump-dom")  # the policy forbids even what got in


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.slow
def test_the_script_shows_the_buttons_and_the_page_is_whole_without_it(tmp_path):
    html = to_html([FAILS])
    hidden = '<button type="button" class="copy" hidden="">'
    assert hidden not in browse(tmp_path, html, "--dump-dom")
    dom = browse(tmp_path, re.sub("sha256-[^']*", "sha256-none", html), "--dump-dom")
    assert hidden in dom
    assert 'reproduce("torch SDPA", "mask-hidden-row"' in dom
