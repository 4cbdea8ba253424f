"""The command line: ``anyattention conform TARGET``, ``report``, ``mutants``, ``cases``, ``doctor``."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyattention_conformance import claims, report_html, report_text, suite, targets
from anyattention_conformance.adapters import ADAPTERS, FOLDER, OURS
from anyattention_conformance.cases import CASES
from anyattention_conformance.claims import CONTRACTS, ClaimError, Claims
from anyattention_conformance.oracles import OracleError
from anyattention_conformance.results import ALL, SCOPES, Report
from anyattention_conformance.targets import TargetError
from anyattention_conformance.workers import Recipe, Workers

CONFORMS, DIFFERS, FAILED = 0, 1, 2  # exit status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status is 0 if the target conforms, 1 if it does not, 2 if it could not be run."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (TargetError, ClaimError, OracleError, RuntimeError, OSError) as error:
        _say(f"anyattention: {error}", sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130


def conform(options: argparse.Namespace) -> int:
    """Certify a target."""
    name, library, declared = _target(options)
    if options.claims:
        declared = claims.read(options.claims)
    if options.unsupported:
        more = claims.words(word.strip() for word in options.unsupported.split(","))
        declared = replace(declared, unsupported=declared.unsupported | more)
    if options.contract:
        declared = replace(declared, contract=options.contract)
    if options.scope or options.only:  # who names cases asks about them all
        declared = replace(declared, scope=options.scope or ALL)
    chosen = suite.runs(options.tier, declared.contract, options.only, options.dtype)
    if not chosen:
        raise ClaimError("no case is chosen; `anyattention cases` lists them")
    if options.html:
        report_html.to_html([])
    workers = Workers(Recipe(targets.load, (name, library)), options.time_limit, options.jobs)
    report = suite.certify(
        name,
        library,
        workers(chosen),
        chosen,
        claims=declared,
        oracle=suite.oracle_for(declared.contract, options.oracle),
        tier="full" if options.only else options.tier,
        selection=(*options.only, *options.dtype),
        progress=_progress,
    )
    report.versions = workers.versions
    if options.json:
        options.json.write_text(report.to_json() + "\n", encoding="utf-8")
    if options.html:
        options.html.write_text(report_html.to_html([report]), encoding="utf-8")
    report_text.print_report(report, sys.stdout)
    if report.exit_status == FAILED:
        raise TargetError("nothing was compared: every case is unsupported or was not run")
    return report.exit_status


def report(options: argparse.Namespace) -> int:
    """Put reports side by side, as one page or as a table in Markdown."""
    found = [Report.from_json(path.read_text(encoding="utf-8")) for path in options.files]
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
    """List the cases."""
    for case in CASES:
        tier = "smoke" if case.smoke else "full"
        _say(f"{case.id:32} {case.group:14} {tier:6} {','.join(case.dtypes):26} {', '.join(sorted(case.needs))}")
    return CONFORMS


def doctor(options: argparse.Namespace) -> int:
    """Say what this machine has for attention: what serves the usual calls, whether the numbers are right, what is
    missing. The exit status is 0 if all is right, 1 if numbers are wrong, 2 if something could not be run.
    """
    from anyattention_conformance import doctor

    return doctor.run(options.html)


def _target(options: argparse.Namespace) -> tuple[str, str, Claims]:
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


def _say(text: str, file: Any = None) -> None:
    (file or sys.stdout).write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("anyattention", description="Is an attention Flax's attention?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("conform", help="certify an attention", description=conform.__doc__)
    one.set_defaults(command=conform)
    one.add_argument("target", nargs="?", metavar="TARGET", help="module:callable, file.py:callable, or an adapter")
    one.add_argument("--library", metavar="MODULE", help="certify our own attention on the arrays of this module")
    one.add_argument("--framework", default="numpy", metavar="NAME", help="numpy, jax, torch, mlx, or a module")
    one.add_argument("--tier", choices=suite.TIERS, default="smoke")
    one.add_argument("--contract", choices=CONTRACTS, help="what the numbers are held to (default: C3)")
    one.add_argument("--scope", choices=SCOPES, help="which failures count")
    one.add_argument("--claims", type=Path, metavar="FILE", help="what differs on purpose, in TOML")
    one.add_argument("--unsupported", metavar="WORD,...", help="what the target refuses, such as dropout,bias")
    one.add_argument("--only", action="append", default=[], metavar="CASE", help="a case, a pattern, or a group")
    one.add_argument("--dtype", action="append", default=[], choices=sorted(claims.DTYPES))
    one.add_argument("--oracle", choices=("auto", "golden", "live"), default="auto", help="recorded Flax or live")
    one.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="of a case (default: 60)")
    one.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes")
    one.add_argument("--json", type=Path, metavar="FILE")
    one.add_argument("--html", type=Path, metavar="FILE")
    many = commands.add_parser("report", help="put reports side by side", description=report.__doc__)
    many.set_defaults(command=report)
    many.add_argument("files", nargs="+", type=Path, metavar="JSON")
    many.add_argument("--html", type=Path, metavar="FILE", help="as a page; without it, a table in Markdown")
    machine = commands.add_parser("doctor", help="examine this machine", description=doctor.__doc__)
    machine.set_defaults(command=doctor)
    machine.add_argument("--html", type=Path, metavar="FILE", help="a page with time and memory against length")
    for command in (mutants, cases):
        commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__).set_defaults(
            command=command
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
