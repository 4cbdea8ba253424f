"""Wrong attentions, one mistake each: a kit that lets one of them pass does not see that mistake in others.

Each is right wherever its mistake has no part, so that it takes a case of its group to catch it.
"""

from anyattention_conformance.mutants import beyond, dropout, logits, masks, rounding  # noqa: F401  they register
from anyattention_conformance.mutants.register import REGISTERED, Mutant

MUTANTS = tuple(REGISTERED)

__all__ = ["MUTANTS", "Mutant"]
