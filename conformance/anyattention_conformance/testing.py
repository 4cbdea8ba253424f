"""Conformance in a test file of one's own: one assertion, or a class to inherit from.

>>> from anyattention import dot_product_attention
>>> assert_matches_flax(dot_product_attention, framework="numpy", only=["plain"])
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from anyattention_conformance import claims as declarations
from anyattention_conformance import report_text, suite, targets
from anyattention_conformance.claims import Claims
from anyattention_conformance.results import ALL, BUG, NOT_RUN, UNSUPPORTED, Result
from anyattention_conformance.suite import Judge, Run
from anyattention_conformance.targets import Target

Function = Callable[..., Any]


def assert_matches_flax(
    function: Function | str,
    framework: str = "numpy",
    *,
    tier: str = "smoke",
    contract: str | None = None,
    claims: Claims | Path | str | None = None,
    unsupported: Iterable[str] = (),
    only: Iterable[str] = (),
    dtypes: Iterable[str] = (),
) -> None:
    """AssertionError with a report, unless a function has Flax's numbers.

    Args:
        function: attention with Flax's parameter names, or some of them; or where it is, ``"module:callable"``.
        framework: numpy, jax, torch, mlx, or a module that follows the array API standard.
        tier: "smoke", seconds, or "full", minutes.
        contract: what the numbers are held to, "C1", "C2" or "C3"; by default what the claims say, else "C3".
        claims: what differs on purpose, or the TOML file that says so.
        unsupported: words for what the function refuses, such as "dropout".
        only: patterns of case ids, or case groups.
        dtypes: only these.
    """
    only, dtypes = tuple(only), tuple(dtypes)
    target, declared = _target(function, framework), _claims(claims, contract, unsupported)
    if only:  # who names cases asks about them all
        declared = replace(declared, scope=ALL)
    chosen = suite.runs(tier, declared.contract, only, dtypes)
    tier = "full" if only else tier
    report = suite.certify_here(target, chosen, claims=declared, tier=tier, selection=(*only, *dtypes))
    if not report.passes:
        raise AssertionError(report_text.to_text(report))


def reproduce(
    function: Function | str, case: str, dtype: str = "float32", framework: str = "numpy", contract: str = "C3"
) -> None:
    """Print what a function and Flax answer to one case, the inputs too: to look into a failure."""
    chosen = [run for run in suite.runs("full", "C1", [case], [dtype]) if run.case.id == case]
    if not chosen:
        raise ValueError(f"there is no case {case!r} in {dtype}; `anyattention cases` lists them")
    target, declared = _target(function, framework), Claims(contract=contract)
    judge = Judge(suite.oracle_for(contract), declared)
    (run,) = chosen
    for name, x in run.case.inputs(dtype).items():
        print(f"{name} =\n{x!r}" if hasattr(x, "shape") else f"{name} = {x!r}")  # noqa: T201
    outcome = target.run(*run)
    print(f"returned {outcome.kind} {outcome.message}\n{outcome.output!r}")  # noqa: T201
    flax = judge.oracle.answer(run.case, dtype)
    print(f"Flax\n{flax if isinstance(flax, str) else flax.output!r}")  # noqa: T201
    for result in judge.results(run, outcome):
        print(f"{result.quantity}: {result.verdict} {result.message}")  # noqa: T201


class AttentionConformance:
    """A test of every case. Inherit from it, under a name that pytest collects, and say what is tested.

    ```python
    class TestMyAttention(AttentionConformance):
        target = staticmethod(my_attention)
        framework = "torch"
        unsupported = ("dropout",)
    ```
    """

    target: ClassVar[Any] = None
    framework: ClassVar[str] = "numpy"
    tier: ClassVar[str] = "smoke"
    contract: ClassVar[str | None] = None
    claims: ClassVar[Claims | Path | str | None] = None
    unsupported: ClassVar[Iterable[str]] = ()

    @classmethod
    @cache
    def _judge(cls) -> tuple[Target, Judge]:
        declared = _claims(cls.claims, cls.contract, cls.unsupported)
        return _target(cls.target, cls.framework), Judge(suite.oracle_for(declared.contract), declared)

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """One test for each case and dtype."""
        if "attention_run" in metafunc.fixturenames:
            declared = _claims(cls.claims, cls.contract, cls.unsupported)
            chosen = suite.runs(cls.tier, declared.contract)
            metafunc.parametrize("attention_run", chosen, ids=[f"{run.case.id}-{run.dtype}" for run in chosen])

    def test_case(self, attention_run: Run) -> None:
        """A case in one dtype: output and gradients."""
        import pytest

        target, judge = self._judge()
        results = judge.results(attention_run, target.run(*attention_run))
        if failures := [result for result in results if result.verdict == BUG]:
            pytest.fail("\n".join(map(_sentence, failures)), pytrace=False)
        if all(result.verdict in (UNSUPPORTED, NOT_RUN) for result in results):  # nothing was compared
            pytest.skip(_sentence(results[0]))

    def test_claims(self) -> None:
        """Every claim comes true in some case."""
        import pytest

        target, judge = self._judge()
        declared = judge.claims
        fresh = Judge(judge.oracle, declared)
        for run in suite.runs(self.tier, declared.contract):
            if declared.concerns(run.case, run.dtype):
                fresh.results(run, target.run(*run))
        if fresh.problems:  # an assert would be gone under python -O
            pytest.fail("\n".join(fresh.problems), pytrace=False)


def _sentence(result: Result) -> str:
    rows = "" if result.rows is None else f"\n  expected {result.rows.expected}\n  actual   {result.rows.actual}"
    return f"{result.verdict}: {result.case} {result.dtype} {result.quantity}: {result.message}{rows}"


def _target(function: Function | str, framework: str) -> Target:
    return targets.load(function, framework) if isinstance(function, str) else targets.make(function, framework)


def _claims(claims: Claims | Path | str | None, contract: str | None, unsupported: Iterable[str]) -> Claims:
    declared = claims if isinstance(claims, Claims) else declarations.read(Path(claims)) if claims else Claims()
    declared = replace(declared, unsupported=declared.unsupported | declarations.words(unsupported))
    return replace(declared, contract=contract) if contract else declared
