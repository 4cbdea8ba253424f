"""A pytest plugin: ``pytest -p anyattention_conformance.plugin --attention-target module:callable``."""

from pathlib import Path

import pytest

from anyattention_conformance import plugin_suite
from anyattention_conformance.claims import CONTRACTS
from anyattention_conformance.results import SCOPES
from anyattention_conformance.suite import TIERS


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, as those of ``anyattention conform``."""
    group = parser.getgroup("attention", "conformance to Flax's attention")
    group.addoption("--attention-target", metavar="TARGET", help="module:callable or path/to/file.py:callable")
    group.addoption("--attention-framework", metavar="NAME", help="numpy, jax, torch, mlx, a module; else inferred")
    group.addoption("--attention-tier", default="smoke", choices=TIERS)
    group.addoption("--attention-contract", choices=CONTRACTS)
    group.addoption(
        "--attention-scope", choices=SCOPES, help="which failures count: of ordinary calls (default), or all"
    )
    group.addoption("--attention-claims", metavar="FILE", help="what differs on purpose, in TOML")
    group.addoption("--attention-supports", default="", metavar="WORD,...", help="what it has that Flax lacks")
    group.addoption("--attention-unsupported", default="", metavar="WORD,...", help="what the target raises at")


def pytest_configure(config: pytest.Config) -> None:
    """Collect the suite for the target: beside the files that are named, or alone."""
    option = config.getoption
    if not option("--attention-target"):
        return
    suite = plugin_suite.TestAttention
    suite.target, suite.framework = option("--attention-target"), option("--attention-framework")
    suite.tier, suite.contract = option("--attention-tier"), option("--attention-contract")
    suite.scope = option("--attention-scope")
    suite.claims = option("--attention-claims")
    for name in ("unsupported", "supports"):
        setattr(suite, name, tuple(filter(None, (x.strip() for x in option(f"--attention-{name}").split(",")))))
    named = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
    config.args = [*named, str(Path(plugin_suite.__file__))]
