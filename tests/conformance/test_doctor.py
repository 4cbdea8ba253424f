"""The doctor: what it says of this machine, and that it sees wrong numbers, missing engines and broken libraries."""

import re
import shutil
import subprocess
import sys
from html import escape
from itertools import pairwise

import jax
import numpy as np
import pytest

import anyattention
from anyattention_conformance import costs, doctor, doctor_html, examination
from anyattention_conformance.costs import Cost, Curve
from anyattention_conformance.doctor import NOT_RUN, RIGHT, WRONG, advice, status, table, verdict
from anyattention_conformance.doctor_html import Measured
from anyattention_conformance.examination import Cell, Library, examine
from anyattention_conformance.machine import ENGINES, Machine, Served
from anyattention_conformance.usual import DTYPES, USUAL, Judge, flax_errors, of, recorded

CALLS = {call.name: call for call in USUAL}


@pytest.mark.parametrize("call", USUAL, ids=lambda call: call.name)
def test_the_recorded_errors_are_those_of_flax(call):
    for dtype in DTYPES:
        found = recorded()["errors"][f"{call.name} {dtype}"]
        live = flax_errors(call, dtype)
        assert set(found) == set(live)
        for name, errors in live.items():
            # XLA sums in another order on other processors.
            np.testing.assert_allclose(found[name], errors, rtol=0.5, err_msg=f"{dtype} {name}")


def answers(call, dtype="float32", gradient=True):
    return Machine("numpy").run("answer", call, dtype, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", USUAL, ids=lambda call: call.name)
def test_right_numbers_are_right_and_a_change_of_any_is_not(call, dtype):
    judge, found = Judge(call, dtype), answers(call, dtype)
    assert judge.wrong(found) == ("", 0)
    assert set(found) == {"output", *(name for name in call.arrays if name != "cotangent")}
    for name, x in found.items():
        assert judge.wrong(found | {name: np.zeros_like(x)})[0].startswith(f"{of(name)}: ")
        changed = x.copy()
        changed[0, 0, 0, 0] += np.abs(x).max()
        assert judge.wrong(found | {name: changed})[0].startswith(f"{of(name)}: ")
        changed = x.copy()
        changed[(0, 3, 0, 0) if name == "bias" else (0, 0, 3, 0)] = np.nan  # of a head that is not compared
        assert judge.wrong(found | {name: changed}) == (f"{of(name)} is not finite", np.inf)


@pytest.mark.parametrize("left_out", ["is_causal", "mask", "bias", "dropout_rate"])
def test_an_argument_that_is_ignored_is_found(left_out, monkeypatch):
    right = anyattention.dot_product_attention
    kind = {"is_causal": "causal", "mask": "padding", "bias": "bias", "dropout_rate": "dropout"}[left_out]
    monkeypatch.setattr(
        anyattention,
        "dot_product_attention",
        lambda **arguments: right(**{name: x for name, x in arguments.items() if name != left_out}),
    )
    judge = Judge(CALLS[kind], "float32")
    assert judge.wrong(answers(CALLS[kind], gradient=False))[0].startswith("output: ")
    assert judge.wrong(answers(CALLS[kind], gradient=True))[0] == ""  # `dot_product_attention_vjp` is as it was


def test_numpy_on_this_machine():
    (library,) = examine(["numpy"])
    assert (library.version, library.device) == (np.__version__, "CPU")
    assert len(library.cells) == len(USUAL) * 4
    assert {cell.mark for cell in library.cells.values()} == {"✓"}
    assert library.cells[CALLS["decoding"], "float32", False].served.name == "exact"
    assert library.cells[CALLS["causal"], "float32", False].served.name == "tiled"
    assert status([library]) == RIGHT
    assert verdict([library]) == "✓ 24 of 24 calls have the right numbers"


def test_a_difference_that_is_known_is_so_only_as_far_as_is_known():
    call = CALLS["causal"]
    found, eps = answers(call, gradient=False), 2.0**-23
    unit = np.abs(call.arrays["value"][0, 0, 0]).max()  # the first query sees one key alone
    allowed = 2 * recorded()["errors"]["causal float32"]["output"][0] + 4 * eps

    def off(beyond, known):
        changed = found["output"].copy()
        changed[0, 0, 0] += (allowed + beyond * eps) * unit
        return examination._judged(served(), {"output": changed}, call, "float32", known).mark

    assert [off(beyond, (0, "")) for beyond in (-2, 8, 20)] == ["✓", "✗", "✗"]
    assert [off(beyond, (16, "because")) for beyond in (-2, 8, 20)] == ["✓", "≠", "✗"]


def test_a_library_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise OSError('libbroken.so: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    (library,) = examine(["broken"])
    assert list(table(library)) == ["✗ broken: it cannot be started: OSError: libbroken.so: not found"]
    assert status([library]) == NOT_RUN
    assert verdict([library]) == "✗ broken could not be examined"


def served(name="tiled", **engines):
    return Served(name, "", (), engines)


def test_the_exit_status_and_the_last_line():
    def of(*cells):
        places = [(call, dtype, False) for call in USUAL for dtype in DTYPES]
        library = Library("numpy", "2", "CPU", cells=dict(zip(places, cells, strict=False)))
        return status([library]), verdict([library])

    right, wrong, lost = Cell(served()), Cell(served(), "off"), Cell(served(), "it died", ran=False)
    known = Cell(served(), "off", known=True)
    assert of(right, right) == (RIGHT, "✓ 2 of 2 calls have the right numbers")
    assert of(right, known) == (RIGHT, "✓ 1 of 2 calls have the right numbers, 1 of 2 are wrong as known")
    assert of(right, wrong, lost) == (WRONG, "✗ 1 of 3 calls have wrong numbers; 1 of 3 calls could not be run")
    assert of(right, lost) == (NOT_RUN, "✗ 1 of 2 calls could not be run")


def test_what_is_wrong_is_below_the_table():
    cells = {(CALLS["bias"], "float32", True): Cell(served(), "the gradient of key: maximum error 0.3, Flax's 1e-07")}
    lines = list(table(Library("jax", "0.10", "CPU", cells=cells)))
    assert lines[0] == "JAX 0.10 on the CPU, within jax.jit"
    assert "  ✗ bias, float32, gradient, tiled: the gradient of key: maximum error 0.3, Flax's 1e-07" in lines


@pytest.fixture
def on_gpu(gpu_with_cudnn):
    """JAX on it, as far as choosing goes."""
    machine, found = Machine("jax"), Library("jax", jax.__version__, "NVIDIA H100")
    for call in USUAL:
        for dtype in DTYPES:
            for gradient in (False, True):
                found.cells[call, dtype, gradient] = Cell(machine.run("served", call, dtype, gradient))
    return found


def test_engines_on_a_gpu(on_gpu):
    names = {
        dtype: [on_gpu.cells[call, dtype, False].served.name for call in USUAL] for dtype in ("float32", "bfloat16")
    }
    assert names["float32"] == ["exact"] * 6
    assert names["bfloat16"] == ["cudnn"] * 4 + ["exact", "cudnn"]
    lines = [" ".join(x.split()) for x in table(on_gpu)]
    assert "not splash it runs on tpu, not on gpu" in lines
    assert "not cudnn, tokamax dropout: it has no dropout of Flax's bits" not in lines  # tokamax lacks more
    assert any(x.startswith("not cudnn dropout in bfloat16: it has no dropout of Flax's bits") for x in lines)
    assert any(x.startswith("not tokamax") and "tokamax is not installed" in x for x in lines)


def test_what_is_missing_and_how_to_get_it(on_gpu, monkeypatch):
    def wanted(*found, gpus=()):
        monkeypatch.setattr(doctor, "nvidia", lambda: gpus)
        return list(dict.fromkeys(advice(list(found))))

    cpu = [Library(name, "1", "CPU") for name in ("numpy", "jax", "torch")]
    assert wanted(*cpu) == []
    said = wanted(cpu[0])
    assert 'JAX is not installed: pip install "anyattention[jax]"' in said
    assert 'PyTorch is not installed: pip install "anyattention[torch]"' in said
    said = wanted(*cpu, gpus=("NVIDIA H100, driver 570.86, 81559 MiB",))
    assert 'JAX does not use the GPU: pip install "jax[cuda12]"' in said
    assert any(x.startswith("PyTorch does not use the GPU") for x in said)
    assert 'JAX does not use the GPU: pip install "jax[cuda13]"' in wanted(*cpu, gpus=("H100, driver 580.1, 1 MiB",))
    said = wanted(cpu[0], on_gpu, cpu[2])
    assert said == ["JAX: tokamax is not installed: pip install 'anyattention[tokamax]'"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100, 580.86, 81559 MiB'", ("NVIDIA H100, driver 580.86, 81559 MiB",)),
        ("echo 'no driver'; exit 9", ()),
    ],
)
def test_gpus_are_those_that_the_driver_names(script, expected, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    doctor.nvidia.cache_clear()
    assert doctor.nvidia() == expected
    doctor.nvidia.cache_clear()


def test_every_engine_is_asked():
    """An engine that the library has and the doctor does not know would be missing from what it says."""
    with pytest.raises(ValueError, match="there is no engine") as raised, anyattention.config(engines=["none"]):
        pass
    assert {name for names in ENGINES.values() for name in names} == set(
        str(raised.value).partition("pass some of ")[2].split(", ")
    )


def test_the_output_in_ascii(tmp_path):
    with (tmp_path / "file").open("w", encoding="ascii") as file:
        doctor.say(["✓ right", "≠ λ"], file)
    assert (tmp_path / "file").read_text() == "ok right\n!= \\u03bb\n"


@pytest.mark.slow
def test_the_command():
    """All libraries of this machine, as a user sees them."""
    command = [sys.executable, "-m", "anyattention_conformance", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "calls have the right numbers" in done.stdout.splitlines()[-1]
    for title in ("NumPy", "JAX", "PyTorch", "MLX"):
        assert f"\n{title} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 160


# Time and memory against length


def test_costs_of_numpy(monkeypatch):
    monkeypatch.setattr(costs, "ON_CPU", ("float32", (256, 1024)))
    ours, exact = costs.measure("numpy", "CPU")
    assert [ours.line, exact.line] == ["anyattention", "Flax's steps, exact"]
    assert not ours.gaps
    assert not exact.gaps
    assert {x.served for x in ours.costs.values()} == {"tiled"}
    for length in (256, 1024):
        assert 1e-5 < ours.costs[length].seconds < 60
    logits = 8 * 1024**2 * 4
    assert 2 * logits * 0.9 < exact.costs[1024].bytes < 4 * logits  # logits and weights, and what the library needs
    assert ours.costs[1024].bytes < logits


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux")
def test_memory_that_was_freed_before_a_call_is_no_room_for_it():
    def call():
        return [bytearray(60_000) for _ in range(500)]

    kept = call()[::100]  # and the rest is freed
    before = costs._resident(reset=True)
    kept += call()
    assert costs._resident(reset=False) - before > 25e6


def test_a_curve_that_would_be_drawn_twice_is_drawn_once(monkeypatch):
    monkeypatch.setattr(costs, "ON_CPU", ("float32", (8, 16)))
    (only,) = costs.measure("numpy", "CPU")
    assert {x.served for x in only.costs.values()} == {"exact"}


def test_a_point_that_cannot_be_had_is_a_gap(monkeypatch):
    monkeypatch.setattr(costs, "ON_CPU", ("float32", (256, 1024)))
    monkeypatch.setattr(costs, "_free", lambda: 4 * 8 * 256**2 * 4)
    _, exact = costs.measure("numpy", "CPU")
    assert list(exact.costs) == [256]
    assert exact.gaps == {1024: "it may take 0.1 GiB, of 0.0 GiB free"}
    monkeypatch.setattr(costs, "ON_CPU", ("no such dtype", (256,)))
    (curve,) = costs.measure("numpy", "CPU")
    assert not curve.costs
    assert "no such dtype" in curve.gaps[256]


def test_numbers_have_three_digits_and_a_unit():
    assert [costs.seconds(x) for x in (2.5, 0.99999, 0.0123, 4.5e-5)] == ["2.5 s", "1 s", "12.3 ms", "45 us"]
    assert [costs.size(x) for x in (None, 12, 1536, 9.6e6, 1.08e9)] == ["", "12 B", "1.54 kB", "9.6 MB", "1.08 GB"]


def curves():
    ours = {n: Cost(n**1.5 / 1e6, n * 1000, "tiled") for n in (256, 512, 1024)}
    exact = {n: Cost(n**2 / 1e6, n * n * 64, "exact") for n in (256, 512)}
    return [
        Curve("numpy", "anyattention", "float32", ours, {}),
        Curve("numpy", "exact", "float32", exact, {1024: "it may take 9 GiB, of 2 GiB free"}),
    ]


def test_points_lie_where_their_numbers_say():
    for panel, value in zip(costs.panels(curves()), (lambda x: x.seconds, lambda x: x.bytes), strict=True):
        places = {tick.text: tick.y for tick in panel.up}
        assert [tick.text for tick in panel.across] == ["256", "512", "1024"]
        scale = [(places[text], float(number)) for text, number in zip(places, range(len(places)), strict=True)]
        assert len(scale) >= 2
        per_decade = scale[0][0] - scale[1][0]
        for (_, points), curve in zip(panel.lines, curves(), strict=True):
            numbers = [value(x) for x in curve.costs.values()]
            for (a, b), (y, z) in zip(pairwise(points), pairwise(numbers), strict=True):
                assert a.y - b.y == pytest.approx(per_decade * np.log10(z / y), abs=0.25)
                assert b.x - a.x == pytest.approx((costs.WIDTH - costs.LEFT - costs.RIGHT) / 2, abs=0.2)


def test_the_page_has_the_numbers_the_gaps_and_what_was_said():
    page = doctor_html.to_html([Measured("NumPy", "2.4", "CPU", curves())], ["Linux"], "all <that>", "✓ right")
    for part in ("4.1 ms", "256 kB", "it may take 9 GiB, of 2 GiB free", "all &lt;that&gt;", "✓ right", "Linux"):
        assert part in page
    assert page.count("<polyline") == 4
    assert not re.search(r"https?:|url\(|<link|<img", page)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.slow
def test_the_page_on_a_phone(tmp_path):
    measured = [Measured("NumPy", "2.4", "CPU", curves())]
    page = re.sub(r"<meta http-equiv.*?>", "", doctor_html.to_html(measured, ["Linux"], "x" * 200, "✓ right"))
    tell = "<script>parent.document.title = [innerWidth, document.documentElement.scrollWidth].join()</script>"
    page = escape(page.replace("</body>", tell))
    frame = f'<title></title><iframe width="400" height="900" srcdoc="{page}"></iframe>'
    (tmp_path / "page.html").write_text(frame)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    command = [BROWSER, *flags, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>400,400</title>" in done.stdout
