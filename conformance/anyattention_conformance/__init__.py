"""What it means to have Flax's numbers: cases as data, Flax as the oracle, and the budgets of the contracts."""

from anyattention_conformance.budgets import within_c2
from anyattention_conformance.cases import SMOKE, Case
from anyattention_conformance.oracles import flax_attention

__all__ = ["SMOKE", "Case", "flax_attention", "within_c2"]
