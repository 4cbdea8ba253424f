"""Claims that would make a target pass, from what it did: a draft, which a person has to check."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date

from anyattention_conformance.case import BEYOND, Case
from anyattention_conformance.claims import DTYPES, Claims, Difference
from anyattention_conformance.oracles import Oracle
from anyattention_conformance.report_text import clean
from anyattention_conformance.results import ALL, BUG, Result
from anyattention_conformance.suite import NO_VJP, Judge, Run
from anyattention_conformance.targets import Outcome
from anyattention_conformance.truth import FLAX, Meaning
from anyattention_conformance.words import WORDS, ClaimError

FIRST = ("bias", "mask", "dropout")  # of words that explain as much
NO_ANSWER = ("raised", "missing")
MEANINGS = tuple(Meaning(fill, empty) for fill in (FLAX.fill, float("-inf")) for empty in (FLAX.empty, 0.0))
Outcomes = list[tuple[Run, Outcome]]
Found = list[tuple[Run, Result]]


class Draft:
    """The claims, and why each was made."""

    def __init__(self, claims: Claims, outcomes: Outcomes, oracle: Oracle) -> None:
        supports = claims.supports - _never_answered(outcomes)
        self.outcomes = [(run, x) for run, x in outcomes if run.case.beyond <= supports]
        self.oracle = oracle
        self.claims = replace(claims, scope=ALL, supports=supports)
        self.why: dict[str, str] = {}  # of a word
        self.claims = replace(self.claims, unsupported=self.claims.unsupported | self._words())
        if self.claims.meaning == FLAX:
            meanings = [replace(self.claims, meaning=x) for x in MEANINGS]
            self.claims = min(meanings, key=lambda x: len(self._judged(x)[0]))
        self._drop_what_does_not_occur()
        self.claims = replace(self.claims, differs=(*self.claims.differs, *self._differences()))
        self._drop_what_does_not_occur()
        failed, problems = self._judged(self.claims)
        if failed or problems:
            left = ", ".join([*(f"{x.case} {x.quantity}" for _, x in failed), *problems])
            raise ClaimError(f"no claims would make it pass; what is left: {left}")

    def _judged(self, claims: Claims) -> tuple[Found, list[str]]:
        """What fails by these claims, and which of them do not come true."""
        judge = Judge(self.oracle, claims)
        results = [(run, x) for run, outcome in self.outcomes for x in judge.results(run, outcome)]
        return [(run, x) for run, x in results if x.verdict == BUG], judge.never

    def _words(self) -> frozenset[str]:
        """Words for what the target always raises at, or has no parameter for: as few as explain all such failures."""
        calls = [(run, x) for run, x in self.outcomes if not run.case.error and run.case.available(run.dtype)]
        failed, _ = self._judged(self.claims)
        left = {(run.case.id, run.dtype) for run, x in failed if x.kind in NO_ANSWER and not run.case.error}
        found: set[str] = set()
        while left:
            covers: dict[str, set[tuple[str, str]]] = {}
            for word in sorted({word for run, _ in calls for word in (*run.case.needs, run.dtype)} - BEYOND):
                asked = [(run, x) for run, x in calls if word in run.case.needs | {run.dtype}]
                if all(x.kind in NO_ANSWER for _, x in asked):
                    covers[word] = {(run.case.id, run.dtype) for run, _ in asked} & left
            word = max(covers, key=lambda x: (len(covers[x]), x not in DTYPES, x in FIRST), default="")
            if not word or not covers[word]:
                break
            left -= covers[word]
            found.add(word)
            outcome = next(x for run, x in calls if word in run.case.needs | {run.dtype})
            self.why[word] = outcome.message
        answers = [x for run, x in calls if run.gradients and x.kind == "answer"]
        if answers and all(x.gradients is None and NO_VJP not in x.no_gradients for x in answers):
            found.add("gradients")
            self.why["gradients"] = answers[0].no_gradients
        return frozenset(found)

    def _differences(self) -> Iterator[Difference]:
        """One for each kind of message and each set of dtypes and quantities; no wider than what differs."""
        failed, _ = self._judged(self.claims)
        cases: dict[Case, list[Result]] = {}
        for run, result in failed:
            cases.setdefault(run.case, []).append(result)
        alike: dict[tuple[bool, str, tuple[str, ...], tuple[str, ...]], list[tuple[Case, Result]]] = {}
        for case, results in cases.items():
            dtypes, quantities = (
                tuple(dict.fromkeys(getattr(x, name) for x in results)) for name in ("dtype", "quantity")
            )
            alike.setdefault((bool(case.corner), case.group, dtypes, quantities), []).append((case, results[0]))
        for (_, _, dtypes, quantities), found in sorted(alike.items()):
            ids = tuple(case.id for case, _ in found)
            yield Difference(clean(found[0][1].message.partition("\n")[0]), ids, dtypes, quantities)

    def _drop_what_does_not_occur(self) -> None:
        _, never = self._judged(self.claims)
        words = self.claims.unsupported - set(never)
        differs = (
            replace(x, cases=tuple(y for y in x.cases if f"{y}: {x.because}" not in never)) for x in self.claims.differs
        )
        self.claims = replace(self.claims, unsupported=words, differs=tuple(x for x in differs if x.cases))

    def to_toml(self, name: str, tier: str) -> str:
        """The claims as a file, each with a comment that asks a person to check it."""
        return "\n".join(self._lines(name, tier)) + "\n"

    def _lines(self, name: str, tier: str) -> Iterator[str]:
        claims = self.claims
        yield f"# What {clean(name)} did on {date.today().isoformat()}, in the {tier} tier, written as claims."
        yield "# Check each of them, and say why in your own words: a mistake that is declared remains a mistake."
        yield f"title = {_text(claims.title or name)}"
        yield f"contract = {_text(claims.contract)}"
        yield f"scope = {_text(claims.scope)}  # every failure counts, corners too"
        if claims.supports:
            yield f"supports = [{', '.join(map(_text, sorted(claims.supports)))}]  # what it has that Flax lacks"
        if claims.unsupported:
            yield "unsupported = [  # what it raises at, or has no parameter for"
            for word in sorted(claims.unsupported):
                why = clean(self.why.get(word, "declared before").partition("\n")[0])[:80]
                yield f"    {_text(word)},  # check: {WORDS[word]} ({why})"
            yield "]"
        if claims.meaning != FLAX:
            yield "\n[meaning]"
            if claims.meaning.fill != FLAX.fill:
                yield f"fill = {claims.meaning.fill}  # check: of hidden logits; Flax: the smallest finite number"
            if claims.meaning.empty == 0:
                yield "empty = 0.0  # check: the weights where every logit is minus infinity; Flax: NaN"
        corners = {run.case.id: run.case.corner for run, _ in self.outcomes}
        for difference in claims.differs:
            corner = next((corners[x] for x in difference.cases if corners.get(x)), "")
            yield "\n[[differs]]"
            yield f"# check: {corner or 'ORDINARY calls, so this is probably a mistake to mend, not to declare'}"
            for key in ("cases", "dtypes", "quantities"):
                if values := getattr(difference, key):
                    yield f"{key} = [{', '.join(map(_text, values))}]"
            yield f"because = {_text(difference.because)}"


def _never_answered(outcomes: Outcomes) -> frozenset[str]:
    """The words beyond Flax of which the target answers no call."""
    asked = {word for run, _ in outcomes for word in run.case.beyond}
    return frozenset(asked - {word for run, x in outcomes if x.kind not in NO_ANSWER for word in run.case.beyond})


def _text(x: str) -> str:
    return json.dumps(clean(x), ensure_ascii=False)
