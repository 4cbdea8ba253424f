"""What it means to have Flax's numbers: cases as data, oracles, and the budgets of the contracts."""

from anyattention_conformance.budgets import within_c2, within_c3
from anyattention_conformance.cases import SMOKE, Case
from anyattention_conformance.oracles import Answer, flax_answer, flax_attention, truth

__all__ = ["SMOKE", "Answer", "Case", "flax_answer", "flax_attention", "truth", "within_c2", "within_c3"]
