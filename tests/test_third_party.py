"""A package of somebody else's, made as the docs say, adds an array library and an engine by its entry points."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.needs("hatchling")
SOURCE = Path(__file__).parent / "third_party"
INSTALL = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation"]
OURS = "anyattention_conformance.adapters.ours"
REFUSED = "dropout,float16,empty,depth 0,growth"  # by any engine with dtypes such as this one's
ARRAYS = """
from functools import partial
import numpy as np, tinyarrays, anyattention as aa
from anyattention import masks
random = np.random.default_rng(0)
numbers = [random.standard_normal((2, length, 4, 8), dtype=np.float32) for length in (5, 7, 7)]
libraries = {"numpy": numbers, "tinyarrays": [tinyarrays.asarray(x) for x in numbers]}
tiny = libraries["tinyarrays"]
fused = partial(aa.dot_product_attention, implementation="fused")
exact = partial(aa.dot_product_attention, implementation="exact")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([*INSTALL, "--target", str(folder), str(SOURCE)], check=True, capture_output=True)
    return folder


def python(site, *arguments, **variables):
    environment = {name: x for name, x in os.environ.items() if not name.startswith("ANYATTENTION_")}
    environment |= {"PYTHONPATH": str(site)} | variables
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def output(site, code, **variables):
    """What a program prints, line by line, that has the `ARRAYS`."""
    done = python(site, "-W", "error", "-c", ARRAYS + code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def conforms(site, *arguments):
    done = python(site, "-m", "anyattention_conformance", "conform", *arguments, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr


def installed(folder, entry_points):
    """A package called lost with these entry points."""
    about = folder / "lost-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lost\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)


def test_the_recipes_are_what_is_installed():
    """Every line of their examples is one of the package's, but for imports, of which each example has its own."""
    recipes = "".join((ROOT / "docs" / f"add-{what}.md").read_text() for what in ("a-library", "an-engine"))
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", recipes, flags=re.DOTALL)
    written = {line for path in SOURCE.iterdir() if path.is_file() for line in path.read_text().splitlines()}
    assert len(blocks) == 4
    assert {x for block in blocks for x in block.splitlines() if not x.startswith("from anyattention")} <= written
    assert len((SOURCE / "tinyarrays.py").read_text().splitlines()) <= 80


def test_the_library_has_flax_numbers(site):
    conforms(site, "--library", "tinyarrays")


@pytest.mark.parametrize(("name", "refused"), [("tiled", "dropout rate 1"), ("fused", f"dropout rate 1,{REFUSED}")])
def test_tiled_and_fused_have_flax_numbers(site, name, refused):
    conforms(site, f"{OURS}:{name}", "--framework", "tinyarrays", "--unsupported", refused)


def test_the_library_needs_no_backend():
    """Its folder on the path, without the entry points."""
    conforms(SOURCE, "--library", "tinyarrays")
    code = "print(aa.explain(*tiny, implementation='fused').reasons)\nassert type(exact(*tiny)) is tinyarrays.Array"
    assert output(SOURCE, code) == ["('there is no engine for tinyarrays',)"]


def test_the_backend_is_the_one_of_the_entry_point(site):
    code = "from anyattention._src.registry import backend_of\nprint(backend_of(tiny[0]) is tinyarrays.backend)"
    assert output(site, code) == ["True"]


def test_the_engine_equals_exact(site):
    """Fully masked rows, low biases and the parts of a mask that it lacks among the calls."""
    code = """
hidden = random.random((2, 1, 5, 7)) > 0.5
hidden[1, 0, 2] = hidden[0, 0, 0] = False
bias = random.standard_normal((4, 5, 7), dtype=np.float32)
low = bias.copy()
low[1, 3] = np.finfo("f4").min
calls = [{}, {"is_causal": True}, {"mask": hidden}, {"bias": bias}, {"bias": low}, {"bias": low, "mask": hidden}]
calls += [{"mask": masks.LocalMask(1, 1)}, {"mask": masks.LengthMask(np.array([3, 0]))}]
for name, arrays in libraries.items():
    for options in calls:
        plan = aa.explain(*arrays, implementation="fused", **options)
        assert (plan.library, plan.engine) == (name, "plain"), plan
        found, expected = (np.asarray(f(*arrays, **options)) for f in (fused, exact))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(np.asarray(fused(*arrays, mask=hidden))[1, 2], numbers[2][1].mean(axis=0), atol=1e-6)
    print(aa.explain(*arrays, is_causal=True, implementation="fused").reasons[1])
"""
    assert output(site, code) == ["the mask is an array of 70 elements: it has no band"] * 2


def test_settings_know_the_engine(site):
    code = """
print(aa.explain(*tiny, implementation="fused").engine)
with aa.config(engines=("plain",)):
    print(aa.explain(*tiny, implementation="fused").engine)
with aa.config(engines=("-plain",)):
    print(aa.explain(*tiny, implementation="fused").reasons)
try:
    aa.config(engines=("plane",)).__enter__()
except ValueError as error:
    print(error)
"""
    *names, off, error = output(site, code)
    assert names == ["plain", "plain"]
    assert off == "('plain: it is switched off',)"
    assert error == "there is no engine 'plane': pass some of cudnn, tokamax, splash, sdpa, flex, mlx, onnx, plain"


@pytest.mark.parametrize(("engines", "expected"), [("plain", "plain"), ("-plain", "None"), ("sdpa", "None")])
def test_the_environment_knows_the_engine(site, engines, expected):
    code = "print(aa.explain(*tiny, implementation='fused').engine)"
    assert output(site, code, ANYATTENTION_ENGINES=engines) == [expected]


def test_an_engine_that_does_not_import(site, tmp_path):
    """It refuses with the reason; all else works, the engine beside it too."""
    installed(tmp_path, "[anyattention.implementations]\nnumpy.lost = lost:Lost\ntinyarrays.lost = lost:Lost\n")
    code = """
for arrays in libraries.values():
    np.testing.assert_allclose(np.asarray(fused(*arrays)), np.asarray(exact(*arrays)), rtol=2e-5, atol=2e-6)
    with aa.config(engines=("lost",)):
        print(aa.explain(*arrays, implementation="fused").reasons[0])
        assert type(aa.dot_product_attention(*arrays)) is type(arrays[0])
        try:
            fused(*arrays)
        except NotImplementedError as error:
            print(error)
"""
    reason = "lost: lost:Lost cannot be imported: ModuleNotFoundError: No module named 'lost'"
    explained, raised, *others = output(f"{site}{os.pathsep}{tmp_path}", code)
    assert explained == reason
    assert raised.startswith(f"implementation='fused' cannot serve this call: {reason};")
    assert others == [explained, raised]


def test_an_engine_of_no_library(site, tmp_path):
    """Its entry point has no dot: no library would ever look for it, and nobody would hear of it."""
    installed(tmp_path, "[anyattention.implementations]\nsolo = tinyarrays:Plain\n")
    code = """
with aa.config(engines=("solo",)):
    print(aa.explain(*tiny, implementation="fused").reasons[0])
print(aa.explain(*tiny, implementation="fused").engine)
"""
    refusal = "solo: its entry point, 'solo', names no library: call it 'library.solo'"
    assert output(f"{site}{os.pathsep}{tmp_path}", code) == [refusal, "plain"]


def test_a_backend_that_does_not_import(tmp_path):
    installed(tmp_path, "[anyattention.backends]\ntinyarrays = lost:backend\n")
    code = """
for _ in range(2):
    try:
        aa.dot_product_attention(*tiny)
    except ImportError as error:
        print(error)
"""
    said = output(f"{SOURCE}{os.pathsep}{tmp_path}", code)
    assert said[0] == said[1]
    assert re.match(
        "the package lost makes lost:backend the backend of tinyarrays.*No module named 'lost'.*mend", said[0]
    )


def test_the_engine_refuses_what_it_does_not_know(site):
    code = """
from dataclasses import dataclass
from anyattention.extend import Call, Operands, Options

@dataclass(frozen=True, kw_only=True)
class Later(Options):
    colour: str | None = None

for colour in (None, "red"):
    options = Later(dtype="float32", colour=colour)
    call = Call(backend=tinyarrays.backend, operands=Operands(*tiny), options=options)
    print(list(tinyarrays.Plain().refusals(call)))
for options in ({"module": print}, {"dropout_rng": aa.random.key(0), "dropout_rate": 0.5}, {"precision": "highest"}):
    try:
        fused(*tiny, **options)
    except NotImplementedError as error:
        print(error)
"""
    served, unknown, *refused = output(site, code)
    assert (served, unknown) == ("[]", """["it does not know 'colour'"]""")
    for line, reason in zip(refused, ("module", "dropout", "precision"), strict=True):
        assert re.search(f"plain: .*{reason}", line)
