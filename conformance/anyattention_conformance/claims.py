"""What a target does differently on purpose, declared in a TOML file.

```toml
title = "torch SDPA"
contract = "C3"                       # C1, C2 or C3; what the numbers are held to
scope = "ordinary"                    # which failures count: those of ordinary calls, or of "all", corners too
supports = ["scale", "sinks"]         # what it has that Flax lacks, and is asked for
unsupported = ["dropout", "growth"]   # for what it raises, or has no parameter: words of `anyattention cases --words`

[meaning]                             # where its definition of attention differs
fill = -inf                           # the logit of a hidden key: a number, or "minimum", Flax's
empty = 0.0                           # the weights where every logit is minus infinity: 0.0, or nan, Flax's

[[differs]]                           # anything else
cases = ["hidden-nan-*"]              # patterns of case ids, or names of case groups
dtypes = ["float16"]                  # all, if left out
quantities = ["output", "dq"]         # all, if left out
because = "NaN behind a mask shows"
```
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from anyattention_conformance.case import Case
from anyattention_conformance.cases import CASES
from anyattention_conformance.results import ORDINARY, SCOPES
from anyattention_conformance.truth import FLAX, Meaning
from anyattention_conformance.words import ClaimError, beyond, nearest, words

CONTRACTS = ("C1", "C2", "C3")
QUANTITIES = {"query": "dq", "key": "dk", "value": "dv", "bias": "dbias", "sinks": "dsinks"}
DTYPES = frozenset(dtype for case in CASES for dtype in case.dtypes)


@dataclass(frozen=True)
class Difference:
    """Results that differ from Flax's, and why."""

    because: str
    cases: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    quantities: tuple[str, ...] = ()

    def covers(self, case: Case, dtype: str, quantity: str) -> bool:
        """Whether a result is among them."""
        return (
            bool(self.claims(case))
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.quantities or quantity in self.quantities)
        )

    def claims(self, case: Case) -> set[str]:
        """What is claimed of a case: each of the patterns that match it, with the reason."""
        return {
            f"{pattern}: {self.because}"
            for pattern in self.cases
            if fnmatchcase(case.id, pattern) or case.group == pattern
        }


@dataclass(frozen=True)
class Claims:
    """What a target declares; without any it is Flax's attention, whole, by contract C3, in ordinary calls.

    `unsupported` has words for what the target raises, or has no parameter for. For what it answers in another way than
    Flax there is `differs`. `supports` has words for what Flax lacks: only what supports them is asked for them.
    """

    title: str = ""
    contract: str = "C3"
    scope: str = ORDINARY
    unsupported: frozenset[str] = frozenset()
    supports: frozenset[str] = frozenset()
    meaning: Meaning = FLAX
    differs: tuple[Difference, ...] = ()

    def refused(self, case: Case, dtype: str) -> frozenset[str]:
        """The words of `unsupported` that a case needs."""
        return self.unsupported & (case.needs | {dtype})

    def difference(self, case: Case, dtype: str, quantity: str) -> Difference | None:
        """What is declared of a result."""
        return next((x for x in self.differs if x.covers(case, dtype, quantity)), None)

    def concerns(self, case: Case, dtype: str) -> bool:
        """Whether anything is declared of a run, other than a meaning."""
        quantities = ("output", "error", *QUANTITIES.values())
        return bool(
            self.refused(case, dtype)
            or "gradients" in self.unsupported
            or any(self.difference(case, dtype, quantity) for quantity in quantities)
        )

    @property
    def sentences(self) -> list[str]:
        """The claims in words."""
        found = [f"unsupported: {', '.join(sorted(self.unsupported))}"] if self.unsupported else []
        if self.meaning.fill != FLAX.fill:
            found.append(f"hidden logits are {self.meaning.fill}")
        if self.meaning.empty == 0:
            found.append("weights are zero where every logit is minus infinity")
        return [*found, *(f"{', '.join(x.cases)}: {x.because}" for x in self.differs)]


def read(path: Path) -> Claims:
    """The claims of a file. ClaimError if it has names or words that mean nothing."""
    try:
        return parse(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ClaimError(f"{path}: {error}") from error
    except ClaimError as error:
        raise ClaimError(f"{path}: {error}") from error


def parse(data: dict[str, Any]) -> Claims:
    """The claims in the data of a file."""
    _known(data, ("title", "contract", "scope", "supports", "unsupported", "meaning", "differs"), "a claim")
    meaning = data.get("meaning", {})
    _known(meaning, ("fill", "empty"), "a meaning")
    contract = data.get("contract", "C3")
    _known([contract], CONTRACTS, "a contract")
    _known([data.get("scope", ORDINARY)], SCOPES, "a scope")
    differs = []
    for entry in data.get("differs", []):
        _known(entry, ("because", "cases", "dtypes", "quantities"), "of a difference")
        if not entry.get("because") or not entry.get("cases"):
            raise ClaimError("a difference needs `cases` and `because`")
        _known(entry.get("dtypes", []), DTYPES, "a dtype")
        _known(entry.get("quantities", []), ("output", "error", *QUANTITIES.values()), "a quantity")
        for pattern in entry["cases"]:
            if not any(fnmatchcase(case.id, pattern) or case.group == pattern for case in CASES):
                names = {name for case in CASES for name in (case.id, case.group)}
                raise ClaimError(f"no case and no group is called {pattern!r}{nearest(pattern, names)}")
        lists = (tuple(entry.get(name, ())) for name in ("cases", "dtypes", "quantities"))
        differs.append(Difference(entry["because"], *lists))
    return Claims(
        title=data.get("title", ""),
        contract=contract,
        scope=data.get("scope", ORDINARY),
        unsupported=words(data.get("unsupported", [])),
        supports=beyond(data.get("supports", [])),
        meaning=Meaning(fill=_fill(meaning.get("fill", FLAX.fill)), empty=float(meaning.get("empty", FLAX.empty))),
        differs=tuple(differs),
    )


def _fill(fill: float | str) -> float | str:
    try:
        return fill if fill == FLAX.fill else float(fill)
    except ValueError:
        raise ClaimError(f"fill is a number or {FLAX.fill!r}, not {fill!r}") from None


def _known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ClaimError(f"{unknown[0]!r} is not {what}: {', '.join(sorted(known))}")
