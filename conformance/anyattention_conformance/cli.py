"""The command line: ``anyattention conform TARGET``, ``report``, ``cases``, ``mutants``, ``doctor``."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import anyattention
from anyattention_conformance import commands, suite
from anyattention_conformance.claims import CONTRACTS, DTYPES
from anyattention_conformance.commands import FAILED
from anyattention_conformance.oracles import OracleError
from anyattention_conformance.results import SCOPES
from anyattention_conformance.targets import TargetError
from anyattention_conformance.words import ClaimError

STATUS = """\
exit status:
  0  the target conforms within the scope, or the selection of cases passes
  1  it does not
  2  it could not be run; one sentence on the standard error says why
"""
DOCTOR = """\
exit status:
  0  all numbers are right
  1  some are wrong
  2  something could not be run
"""
CONTRACT = """\
contracts, from the loosest to the strictest:
  C3  the error against the truth in float64 is at most twice Flax's own, plus 4 eps
  C2  Flax's steps: each row within what rounding explains, NaN in the same places
  C1  Flax's bits; asks the installed Flax
  docs/guarantees.md defines them.
"""
SCOPE = """\
scopes:
  ordinary  calls that ordinary models make decide: one batch axis, one dtype, finite numbers
  all       corners decide as well: depth 0, mixed dtypes, fully masked rows, NaN, shapes that Flax refuses
  `anyattention cases` says of each case whether it is a corner, and why.
"""
EXAMPLES = {
    "conform": (
        "anyattention conform mine.py:attention --unsupported bias,dropout --html report.html",
        "anyattention conform mine.py:attention --only mask --only 'lengths-*'",
        "anyattention conform mine.py:attention --write-claims mine.toml  # then check them",
        "anyattention conform mine.py:attention --claims mine.toml --tier full",
        "anyattention conform mine.py:attention --supports scale,sinks",
        "anyattention conform --library array_api_strict",
    ),
    "report": ("anyattention report one.json other.json --html page.html",),
    "cases": ("anyattention cases", "anyattention cases --words"),
    "mutants": ("anyattention mutants",),
    "doctor": ("anyattention doctor", "anyattention doctor --html machine.html"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is as `STATUS` says."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (TargetError, ClaimError, OracleError, RuntimeError, OSError) as error:
        sys.stderr.write(f"anyattention: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        sys.stderr.write(f"anyattention: {type(error).__name__} in the kit itself, so there is no verdict: report it\n")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "anyattention",
        description="Tell whether an attention is Flax's attention.",
        epilog=f"{_examples('conform')}\n{STATUS}",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"anyattention {anyattention.__version__}")
    commands_of = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], help: str, *epilogs: str
    ) -> argparse.ArgumentParser:
        found = commands_of.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog="\n".join((_examples(name), *epilogs)),
            formatter_class=formatter,
        )
        found.set_defaults(command=command)
        return found

    one = add("conform", commands.conform, "compare an attention with Flax's, case by case", STATUS, SCOPE, CONTRACT)
    _add_conform(one)
    many = add("report", commands.report, "put reports side by side, as a page or as a table in Markdown")
    many.add_argument("files", nargs="+", type=Path, metavar="JSON", help="a file that `conform --json` wrote")
    many.add_argument("--html", type=Path, metavar="FILE", help="write a page (default: print a table)")
    listed = add("cases", commands.cases, "list the cases, each with its group, and why it is a corner if it is one")
    listed.add_argument(
        "--words", action="store_true", help="list the words of --unsupported and --supports, each with its meaning"
    )
    add("mutants", commands.mutants, "test the suite itself: it has to reject over a hundred wrong attentions")
    machine = add("doctor", commands.doctor, "examine this machine: what serves attention, is it right", DOCTOR)
    machine.add_argument("--html", type=Path, metavar="FILE", help="write a page with time and memory against length")
    return parser


def _add_conform(one: argparse.ArgumentParser) -> None:
    target = one.add_argument_group("what to certify")
    target.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="module:callable, path/to/file.py:callable, or the name of an adapter",
    )
    target.add_argument("--library", metavar="MODULE", help="certify our own attention on the arrays of this module")
    target.add_argument(
        "--framework", metavar="NAME", help="numpy, jax, torch, mlx, or a module (default: inferred from the target)"
    )
    chosen = one.add_argument_group("which cases")
    chosen.add_argument(
        "--tier", choices=suite.TIERS, default="smoke", help="some 120 calls or all 550 (default: %(default)s)"
    )
    chosen.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CASE",
        help="a case, a pattern such as 'mask-*', or a group, in all its dtypes; may be repeated",
    )
    chosen.add_argument(
        "--dtype",
        action="append",
        default=[],
        choices=sorted(DTYPES),
        metavar="DTYPE",
        help=f"a dtype, one of {', '.join(sorted(DTYPES))}; may be repeated",
    )
    held = one.add_argument_group("what it is held to")
    held.add_argument("--contract", choices=CONTRACTS, help="the contract, see below (default: C3)")
    held.add_argument(
        "--scope", choices=SCOPES, help="which failures decide, see below (default: ordinary; with --only all)"
    )
    held.add_argument("--strict", action="store_const", const="all", dest="scope", help="the same as --scope all")
    held.add_argument("--claims", type=Path, metavar="FILE", help="read from a TOML file what differs on purpose")
    held.add_argument(
        "--unsupported",
        metavar="WORD,...",
        help="what the target raises at, or lacks a parameter for, such as bias,dropout; `anyattention cases "
        "--words` lists the words; what it answers in another way goes under [[differs]] in a claims file",
    )
    held.add_argument(
        "--supports",
        metavar="WORD,...",
        help="what the target has and Flax lacks, such as scale,'soft cap',sinks: it is asked for these as well",
    )
    held.add_argument(
        "--oracle",
        choices=("auto", "golden", "live"),
        default="auto",
        help="recorded answers of Flax, or the installed Flax",
    )
    out = one.add_argument_group("what to write")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the report as data")
    out.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    out.add_argument(
        "--write-claims",
        type=Path,
        metavar="FILE",
        help="write claims that fit what the target did, to be checked by you",
    )
    run = one.add_argument_group("how to run")
    run.add_argument(
        "--time-limit", type=float, default=60.0, metavar="SECONDS", help="of a case (default: %(default)g)"
    )
    run.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes (default: %(default)s)"
    )


def _examples(name: str) -> str:
    lines = EXAMPLES[name]
    return f"{'example' if len(lines) == 1 else 'examples'}:\n" + "".join(f"  {line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
