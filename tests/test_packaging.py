"""Each way to install holds all three packages: editable, wheel, and wheel from sdist; and the project's own files."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import anyattention

ROOT = Path(__file__).parents[1]
PACKAGES = ("anyattention", "anyattention_backends", "anyattention_conformance")
BUILD = [sys.executable, "-m", "build", "--no-isolation"]
EDITABLE = [sys.executable, "-c", "import sys, hatchling.build as hatch; hatch.build_editable(sys.argv[2])"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "home"),
    [([*BUILD, "--wheel"], None), (BUILD, None), (EDITABLE, ROOT)],
    ids=["wheel", "wheel from sdist", "editable"],
)
def test_installed(tmp_path, build, home):
    source = [] if build is EDITABLE else [str(ROOT)]
    subprocess.run([*build, "--outdir", str(tmp_path), *source], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    ours = [str(ROOT / name) for name in ("src", "backends", "conformance")]  # where this very environment has them
    code = f"import site, sys; sys.path[:] = [path for path in sys.path if path not in {ours}]\n"
    code += f"site.addsitedir({str(site)!r})\nimport numpy as np, {', '.join(PACKAGES)}\n"
    code += "x = np.ones((2, 1, 4), np.float32)\nprint(anyattention.dot_product_attention(x, x, x).sum())\n"
    code += "from anyattention_conformance import Golden, adapters, claims, report_html\n"
    code += "print(len(Golden().about['runs']) and report_html.to_html([])[:15])\n"
    code += "claims.read(adapters.FOLDER / 'torch-sdpa.toml')\n"
    code += f"for package in ({', '.join(PACKAGES)}): print(package.__file__)"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    total, page, *files = done.stdout.splitlines()
    assert float(total) == 8.0
    assert page.lower() == "<!doctype html>"
    for file in map(Path, files):
        assert file.is_relative_to(home or site)
        assert (file.parent / "py.typed").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    where = tmp_path_factory.mktemp("dist")
    subprocess.run([*BUILD, "--wheel", "--outdir", str(where), str(ROOT)], check=True, capture_output=True)
    (wheel,) = where.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel):
    """As an index of packages reads and checks them."""
    with zipfile.ZipFile(wheel) as archive:
        (text,) = (archive.read(name) for name in archive.namelist() if name.endswith("METADATA"))
    return Metadata.from_email(text, validate=True)


@pytest.mark.slow
def test_requirements(metadata):
    required = {x.name for x in metadata.requires_dist if x.marker is None}
    assert required == {"array-api-compat", "numpy", "threadpoolctl"}
    assert {"jax", "torch", "demo", "test", "all"} <= set(metadata.provides_extra)
    assert str(metadata.requires_python) == ">=3.11"
    assert str(metadata.version) == anyattention.__version__
    assert "==2.13.0" in {str(x.specifier) for x in metadata.requires_dist if x.name == "torch"}
    assert metadata.author == "anyattention developers"


@pytest.mark.slow
def test_the_page_on_an_index_needs_no_repository(metadata):
    """No picture and no link of it is a path."""
    assert metadata.description_content_type == "text/markdown"
    links = re.findall(r"\]\(([^)]*)\)", metadata.description)
    assert [x for x in links if not x.startswith(("https:", "#"))] == []
    kept = [line for line in (ROOT / "README.md").read_text().splitlines() if "](" not in line]
    assert metadata.description.splitlines()[0] == kept[0]
    assert [line for line in metadata.description.splitlines() if line in kept and line] == list(filter(None, kept))


@pytest.mark.slow
def test_the_wheel_is_small_and_holds_the_packages_alone(wheel):
    """3.14 MB on 2026-11-27, of which the recorded answers take 2.8 and code the rest."""
    assert wheel.stat().st_size < 3.2e6
    homes = {"anyattention": "src", "anyattention_backends": "backends", "anyattention_conformance": "conformance"}
    ours = {path.relative_to(ROOT / home) for name, home in homes.items() for path in (ROOT / home / name).rglob("*")}
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist()}
    assert {path for path in held if not path.parts[0].endswith(".dist-info")} <= ours
    assert not [path for path in held if "__pycache__" in path.parts]


def test_the_oldest_versions_are_those_that_ci_installs():
    """Each lower bound of what .ci/oldest installs is pinned there, the very number."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = map(
        Requirement,
        [*project["dependencies"], *(x for name in ("jax", "strict", "conform") for x in extras[name])],
    )
    lowest = {canonicalize_name(x.name): Version(next(iter(x.specifier)).version) for x in wanted}
    lines = (ROOT / ".ci/oldest.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(x.name): Version(next(iter(x.specifier)).version)
        for x in map(Requirement, (x for x in lines if x[0] != "#"))
    }
    assert pinned == lowest


def test_the_pythons_that_ci_tests_are_the_classifiers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"])))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert named == set(workflow["jobs"]["everything"]["steps"][1]["with"]["python-version"].split())


def test_the_citation():
    """The keys that Citation File Format 1.2.0 requires, and none that it does not know."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    assert set(cited) - {"type", "abstract", "version", "license", "keywords"} == required
    assert cited["cff-version"] == "1.2.0"
    assert all(set(author) == {"name"} for author in cited["authors"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (anyattention.__version__, project["license"])
    assert (cited["keywords"], cited["authors"]) == (project["keywords"], project["authors"])


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows(path):
    """They run what is there, at versions that are pinned, and may do no more than they need."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step.get("uses", "a/b@v1.2.3"))
    text = " ".join(step.get("run", "") for step in steps)
    assert all((ROOT / name).exists() for name in re.findall(r"\.ci/\w+|src/[\w/.]+", text))
    assert ".ci/run" in text or path.stem != "ci"


def test_the_release_publishes_what_was_built_once_without_a_password():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    uses = {
        name: [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step] for name, job in jobs.items()
    }
    assert uses["publish"] == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]
    assert uses["build"][-2:] == ["actions/attest-build-provenance", "actions/upload-artifact"]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets" not in str(jobs)
    (check,) = (step["run"] for step in jobs["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", ""))
    for tag, status in ((f"v{anyattention.__version__}", 0), ("v9.9.9", 1)):
        assert (
            subprocess.run(["bash", "-c", check], cwd=ROOT, env=os.environ | {"GITHUB_REF_NAME": tag}).returncode
            == status
        )


@pytest.mark.parametrize("name", ["bug", "number", "feature"])
def test_forms(name):
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
    for command in set(re.findall(r"`anyattention (\w+)`", str(form))):
        subprocess.run([sys.executable, "-m", PACKAGES[2], command, "--help"], check=True, capture_output=True)
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert {"bug": {"doctor"}, "number": {"doctor", "reproduce"}, "feature": set()}[name] <= required
