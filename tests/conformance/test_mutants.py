"""The suite bites: every mutant is rejected where it must be, and the right attention is accepted."""

from dataclasses import replace

import pytest

from anyattention_conformance import CASES, suite, targets, teeth
from anyattention_conformance.beyond import Attention
from anyattention_conformance.beyond import attention as reference
from anyattention_conformance.case import BEYOND
from anyattention_conformance.claims import Claims
from anyattention_conformance.mutants import MUTANTS
from anyattention_conformance.reference import attention

SINGLE = BEYOND  # each word has a mutant that a case of this word alone must find
pytestmark = pytest.mark.needs("ml_dtypes")  # some mutants are caught in bfloat16 alone


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_rejected(mutant):
    score = teeth.score(mutant)
    assert score.caught, str(score)


@pytest.mark.parametrize("contract", ["C2", "C3"])
@pytest.mark.parametrize("tier", ["smoke", pytest.param("full", marks=pytest.mark.slow)])
def test_the_right_attention_is_accepted(contract, tier):
    report = suite.certify_here(
        targets.make(attention, "numpy"), suite.runs(tier, contract), claims=Claims(contract=contract), tier=tier
    )
    assert report.conforms
    assert {x.verdict for x in report.results} == {"conforms"}


def test_every_trap_has_a_mutant():
    """The rows of the list of known traps, of which each has one."""
    assert {mutant.row for mutant in MUTANTS} >= set(range(1, 33))
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30
    assert {mutant.group for mutant in MUTANTS} <= {case.group for case in CASES} | {"gradients"}


def test_every_word_beyond_flax_has_mutants_and_a_case_for_each():
    beyond = [mutant for mutant in MUTANTS if isinstance(mutant.attention, Attention)]
    assert {case.beyond for case in CASES if case.id in {x.case for x in beyond}} >= {frozenset({x}) for x in SINGLE}
    assert all(mutant.case for mutant in beyond)
    right = teeth.score(replace(beyond[0], attention=reference))
    assert not right.caught  # nothing is wrong with it
