"""Is an attention Flax's attention? Cases as data, oracles, budgets of the contracts, and a suite that applies them.

``anyattention conform TARGET`` is the command; `assert_matches_flax` is for a test file of one's own.
"""

from anyattention_conformance.budgets import within_c2, within_c3
from anyattention_conformance.case import Case
from anyattention_conformance.cases import CASES, FORMS
from anyattention_conformance.claims import Claims, Difference
from anyattention_conformance.oracles import Golden, Live, flax_answer, flax_attention
from anyattention_conformance.results import Report, Result
from anyattention_conformance.testing import AttentionConformance, assert_matches_flax, reproduce
from anyattention_conformance.truth import Answer, Meaning, truth

__all__ = [
    "CASES",
    "FORMS",
    "Answer",
    "AttentionConformance",
    "Case",
    "Claims",
    "Difference",
    "Golden",
    "Live",
    "Meaning",
    "Report",
    "Result",
    "assert_matches_flax",
    "flax_answer",
    "flax_attention",
    "reproduce",
    "truth",
    "within_c2",
    "within_c3",
]
