"""Conformance in a test file of one's own: one assertion, or a class to inherit from.

>>> from anyattention import dot_product_attention
>>> assert_matches_flax(dot_product_attention, framework="numpy", only=["plain"])
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from anyattention_conformance import claims as declarations
from anyattention_conformance import probes, report_terminal, suite, targets
from anyattention_conformance.case import BEYOND
from anyattention_conformance.claims import Claims, Difference
from anyattention_conformance.oracles import OracleError
from anyattention_conformance.results import ALL, BUG, NOT_RUN, ORDINARY, UNSUPPORTED, Report, Result
from anyattention_conformance.suite import Judge, Run
from anyattention_conformance.targets import Target, TargetError
from anyattention_conformance.words import ClaimError, beyond, words

Function = Callable[..., Any]
Differs = Iterable[Difference | Mapping[str, Any]]
IMPOSSIBLE = (TargetError, ClaimError, OracleError)


def assert_matches_flax(
    function: Function | str,
    framework: str | None = None,
    *,
    tier: str = "smoke",
    contract: str | None = None,
    scope: str | None = None,
    claims: Claims | Path | str | None = None,
    unsupported: Iterable[str] = (),
    supports: Iterable[str] = (),
    differs: Differs = (),
    only: Iterable[str] = (),
    dtypes: Iterable[str] = (),
) -> None:
    """AssertionError with a report, unless a function has Flax's numbers.

    Args:
        function: attention with Flax's parameter names, or some of them; or where it is, ``"module:callable"``.
        framework: numpy, jax, torch, mlx, or a module that follows the array API standard; by default what the
            function's annotations, code and file show. TargetError if they show nothing.
        tier: "smoke", seconds, or "full", minutes.
        contract: what the numbers are held to, "C1", "C2" or "C3"; by default what the claims say, else "C3".
        scope: which failures count, those of "ordinary" calls or of "all", corners too; by default what the claims say,
            else "ordinary", and with `only` all.
        claims: what differs on purpose, or the TOML file that says so.
        unsupported: words for what the function raises at, or has no parameter for, such as "dropout".
        supports: words for what the function has and Flax lacks, such as "scale", "soft cap", "sinks": it is asked
            for these as well.
        differs: answers that differ on purpose, as `Difference` or as an entry of the file: ``{"cases": ["depth-0"],
            "because": "no heads are that flat"}``.
        only: patterns of case ids, or case groups.
        dtypes: only these.
    """
    __tracebackhide__ = True
    only, dtypes = tuple(only), tuple(dtypes)
    try:
        target = _target(function, framework)
        declared = _claims(claims, contract, unsupported, supports, differs, scope or (ALL if only else None))
        chosen = suite.runs(tier, declared.contract, only, dtypes, declared.supports)
        tier = "full" if only else tier
        report = suite.certify_here(target, chosen, claims=declared, tier=tier, selection=(*only, *dtypes))
    except IMPOSSIBLE as error:  # the frames are the kit's own, and the sentence says it all
        raise error.with_traceback(None) from None
    if not report.passes:
        raise AssertionError(report_terminal.to_text(report))


def reproduce(
    function: Function | str,
    case: str,
    dtype: str = "float32",
    framework: str | None = None,
    contract: str = "C3",
    inputs: bool = False,
) -> Report:
    """Print how a function's answer to one case compares with Flax's, and return the report: to look into a failure.

    With `inputs` the arguments and both outputs are printed as well.
    """
    chosen = [run for run in suite.runs("full", "C1", [case], [dtype], BEYOND) if run.case.id == case]
    if not chosen:
        raise ValueError(f"there is no case {case!r} in {dtype}; `anyattention cases` lists them")
    target, declared = (
        _target(function, framework),
        Claims(contract=contract, scope=ALL, supports=chosen[0].case.beyond),
    )
    report = suite.certify_here(target, chosen, claims=declared, tier="full", selection=(case, dtype))
    print(report_terminal.to_short(report))  # noqa: T201
    if inputs:
        (run,) = chosen
        for name, x in run.case.inputs(dtype).items():
            print(f"{name} =\n{x!r}" if hasattr(x, "shape") else f"{name} = {x!r}")  # noqa: T201
        outcome, flax = target.run(*run), suite.oracle_for(contract).answer(run.case, dtype)
        print(f"returned {outcome.kind} {outcome.message}\n{outcome.output!r}")  # noqa: T201
        whose = "the reference" if run.case.beyond else "Flax"
        print(f"{whose}\n{flax if isinstance(flax, str) else flax.output!r}")  # noqa: T201
    return report


class AttentionConformance:
    """A test of every case. Inherit from it, under a name that pytest collects, and say what is tested.

    ::

        class TestMyAttention(AttentionConformance):
            target = staticmethod(my_attention)
            framework = "torch"
            unsupported = ("dropout",)

    The attributes are as the arguments of `assert_matches_flax`. In the scope "ordinary" a corner that differs is an
    expected failure, with the reason why it is a corner.
    """

    target: ClassVar[Any] = None
    framework: ClassVar[str | None] = None
    tier: ClassVar[str] = "smoke"
    contract: ClassVar[str | None] = None
    scope: ClassVar[str | None] = None
    claims: ClassVar[Claims | Path | str | None] = None
    unsupported: ClassVar[Iterable[str]] = ()
    supports: ClassVar[Iterable[str]] = ()
    differs: ClassVar[Differs] = ()

    @classmethod
    def _declared(cls) -> Claims:
        return _claims(cls.claims, cls.contract, cls.unsupported, cls.supports, cls.differs, cls.scope)

    @classmethod
    @cache
    def _judge(cls) -> tuple[Target, Judge, str]:
        """The target, what judges it, and a diagnosis of its mistakes."""
        declared = cls._declared()
        target = _target(cls.target, cls.framework)
        answers: dict[str, list[Any]] = {}
        for run in suite.probing(declared.supports):
            answers.setdefault(run.case.id, []).append(target.run(*run))
        diagnosis = "".join(f"{x.cause}\n{x.mend}\n" for x in probes.diagnose(answers))
        return target, Judge(suite.oracle_for(declared.contract), declared), diagnosis

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """One test for each case and dtype."""
        import pytest

        if "attention_run" in metafunc.fixturenames:
            try:
                declared = cls._declared()
            except IMPOSSIBLE as error:
                raise pytest.Collector.CollectError(str(error)) from None
            chosen = suite.runs(cls.tier, declared.contract, supports=declared.supports)
            metafunc.parametrize("attention_run", chosen, ids=[f"{run.case.id}-{run.dtype}" for run in chosen])

    def test_case(self, attention_run: Run) -> None:
        """A case in one dtype: output and gradients."""
        import pytest

        try:
            target, judge, diagnosis = self._judge()
            results = judge.results(attention_run, target.run(*attention_run))
        except IMPOSSIBLE as error:
            pytest.fail(str(error), pytrace=False)
        if failures := [result for result in results if result.verdict == BUG]:
            sentences = "\n".join(map(_sentence, failures))
            if judge.claims.scope == ORDINARY and attention_run.case.corner:  # as declared; scope="all" fails it
                pytest.xfail(f"a corner, {attention_run.case.corner}: {sentences}")
            pytest.fail(f"{diagnosis}{sentences}", pytrace=False)
        if all(result.verdict in (UNSUPPORTED, NOT_RUN) for result in results):  # nothing was compared
            pytest.skip(_sentence(results[0]))

    def test_claims(self) -> None:
        """Every claim comes true in some case."""
        import pytest

        try:
            target, judge, _ = self._judge()
        except IMPOSSIBLE as error:
            pytest.fail(str(error), pytrace=False)
        declared = judge.claims
        fresh = Judge(judge.oracle, declared)
        for run in suite.runs(self.tier, declared.contract, supports=declared.supports):
            if declared.concerns(run.case, run.dtype):
                fresh.results(run, target.run(*run))
        if fresh.problems:  # an assert would be gone under python -O
            pytest.fail("\n".join(fresh.problems), pytrace=False)


def _sentence(result: Result) -> str:
    rows = "" if result.rows is None else f"\n  expected {result.rows.expected}\n  actual   {result.rows.actual}"
    return f"{result.verdict}: {result.case} {result.dtype} {result.quantity}: {result.message}{rows}"


def _target(function: Function | str, framework: str | None) -> Target:
    return targets.load(function, framework) if isinstance(function, str) else targets.make(function, framework)


def _claims(
    claims: Claims | Path | str | None,
    contract: str | None,
    unsupported: Iterable[str],
    supports: Iterable[str],
    differs: Differs,
    scope: str | None,
) -> Claims:
    declared = claims if isinstance(claims, Claims) else declarations.read(Path(claims)) if claims else Claims()
    entries = [x for x in differs if not isinstance(x, Difference)]
    more = (*(x for x in differs if isinstance(x, Difference)), *declarations.parse({"differs": entries}).differs)
    return replace(
        declared,
        unsupported=declared.unsupported | words(unsupported),
        supports=declared.supports | beyond(supports),
        differs=(*declared.differs, *more),
        contract=contract or declared.contract,
        scope=scope or declared.scope,
    )
