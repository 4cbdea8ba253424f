"""What the commands of the command line do; each returns its exit status."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyattention_conformance import claims, report_html, report_terminal, report_text, suite, targets
from anyattention_conformance.adapters import ADAPTERS, FOLDER, OURS
from anyattention_conformance.case import BEYOND
from anyattention_conformance.cases import CASES
from anyattention_conformance.claims import Claims
from anyattention_conformance.drafts import Draft
from anyattention_conformance.results import ALL, Report
from anyattention_conformance.suite import Run
from anyattention_conformance.targets import Outcome, TargetError
from anyattention_conformance.words import USED, WORDS, ClaimError, beyond, nearest, words
from anyattention_conformance.workers import Recipe, Workers

CONFORMS, DIFFERS, FAILED = 0, 1, 2  # exit status


def conform(options: argparse.Namespace) -> int:
    """Certify a target."""
    name, library, declared = _target(options)
    declared = _declared(options, declared)
    chosen = suite.runs(options.tier, declared.contract, options.only, options.dtype, declared.supports)
    if not chosen:
        _advise(suite.runs(options.tier, declared.contract, options.only, options.dtype, BEYOND))
        meant = (
            nearest(options.only[0], {name for case in CASES for name in (case.id, case.group)}) if options.only else ""
        )
        raise ClaimError(f"no case is chosen{meant}; `anyattention cases` lists them")
    _check_files(options)
    oracle = suite.oracle_for(declared.contract, options.oracle)
    workers = Workers(Recipe(targets.load, (name, library)), options.time_limit, options.jobs)
    probing, outcomes = suite.probing(declared.supports), list[tuple[Run, Outcome]]()

    def kept() -> Iterator[tuple[Run, Outcome]]:
        for run, outcome in workers([*probing, *chosen]):
            if run not in probing:
                outcomes.append((run, outcome))
            yield run, outcome

    tier = "full" if options.only else options.tier
    report = suite.certify(
        name,
        library or "",
        kept(),
        chosen,
        claims=declared,
        oracle=oracle,
        tier=tier,
        selection=(*options.only, *options.dtype),
        progress=_progress,
    )
    report = replace(report, **workers.about)
    if options.json:
        options.json.write_text(report.to_json() + "\n", encoding="utf-8")
    if options.html:
        options.html.write_text(report_html.to_html([report]), encoding="utf-8")
    report_terminal.print_report(report, sys.stdout)
    if options.write_claims:
        draft = Draft(declared, outcomes, oracle).to_toml(name, tier)
        options.write_claims.write_text(draft, encoding="utf-8")
        _say(f"  claims are written to {options.write_claims}: check each of them, then pass --claims")
    if report.exit_status == FAILED:
        raise TargetError("nothing was compared: every case that counts is unsupported or was not run")
    return report.exit_status


def report(options: argparse.Namespace) -> int:
    """Put reports side by side, as one page or as a table in Markdown."""
    found = [_read(path) for path in options.files]
    if options.html:
        options.html.write_text(report_html.to_html(found), encoding="utf-8")
    else:
        _say(report_text.to_markdown(found))
    return CONFORMS


def mutants(options: argparse.Namespace) -> int:
    """Show that the suite has teeth: every wrong attention is rejected, the right one is accepted."""
    from anyattention_conformance import teeth

    scores = list(teeth.scores(_progress))
    for score in scores:
        _say(str(score))
    caught = sum(score.caught for score in scores)
    _say(f"{caught} of {len(scores)} as they should be")
    return CONFORMS if caught == len(scores) else DIFFERS


def cases(options: argparse.Namespace) -> int:
    """List the cases, or the words for what a target may not support."""
    if options.words:
        for word in filter(USED.__contains__, WORDS):
            _say(f"{word:26} {'beyond Flax, for --supports: ' if word in BEYOND else ''}{WORDS[word]}")
        return CONFORMS
    _say(f"{'case':32} {'group':14} {'tier':6} {'dtypes':26} {'needs':40} corner, because")
    for case in CASES:
        tier, needs = "smoke" if case.smoke else "full", ", ".join(sorted(case.needs))
        dtypes = ",".join(case.dtypes)
        _say(f"{case.id:32} {case.group:14} {tier:6} {dtypes:26} {needs:40} {case.corner}".rstrip())
    return CONFORMS


def doctor(options: argparse.Namespace) -> int:
    """Say what this machine has for attention: what serves the usual calls, and whether the numbers are right."""
    from anyattention_conformance import doctor

    return doctor.run(options.html)


def _target(options: argparse.Namespace) -> tuple[str, str | None, Claims]:
    """Name, framework and claims of what is to be certified."""
    if options.library:
        declared = claims.read(FOLDER / "anyattention.toml")
        return OURS, options.library, replace(declared, title=f"anyattention on {options.library}")
    if not options.target:
        raise TargetError("name a target, module:callable or path/to/file.py:callable, or a --library")
    if options.target in ADAPTERS:
        declared = claims.read(FOLDER / f"{options.target}.toml")
        return options.target, ADAPTERS[options.target].framework, declared
    return options.target, options.framework, Claims()


def _declared(options: argparse.Namespace, declared: Claims) -> Claims:
    """The claims, by the options."""
    if options.claims:
        declared = claims.read(options.claims)
    if options.unsupported:
        more = words(word.strip() for word in options.unsupported.split(","))
        declared = replace(declared, unsupported=declared.unsupported | more)
    if options.supports:
        more = beyond(word.strip() for word in options.supports.split(","))
        declared = replace(declared, supports=declared.supports | more)
    if options.contract:
        declared = replace(declared, contract=options.contract)
    if options.scope or options.only:  # who names cases asks about them all
        declared = replace(declared, scope=options.scope or ALL)
    return declared


def _advise(chosen: list[Run]) -> None:
    """ClaimError if there are cases, but all need what the target does not declare to support."""
    if needed := sorted({word for run in chosen for word in run.case.beyond}):
        raise ClaimError(
            f"these cases need what Flax lacks ({', '.join(needed)}): declare with --supports what there is"
        )


def _check_files(options: argparse.Namespace) -> None:
    """OSError, RuntimeError or ClaimError for what could not be written in the end: said before the suite runs."""
    if options.html:
        report_html.to_html([])
    if options.write_claims and (options.only or options.dtype):
        raise ClaimError("--write-claims writes claims of a whole tier: leave out --only and --dtype")
    if options.write_claims and options.write_claims.exists():
        raise ClaimError(f"{options.write_claims} exists, and is not written over: name another file, or remove it")
    for path in filter(None, (options.json, options.html, options.write_claims)):
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()


def _read(path: Path) -> Report:
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ClaimError(f"{path} is no report that `anyattention conform --json` wrote: {error}") from error


def _progress(each: Iterable[Any], total: int) -> Iterable[Any]:
    """A bar, on a terminal with rich."""
    if not sys.stderr.isatty():
        return each
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return each
    return track(each, "cases", total, console=Console(stderr=True), transient=True)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
