"""What an implementation is. `serves` is an allow-list, so that nothing a call asks for is ever ignored."""

from collections.abc import Iterator
from typing import Any

from anyattention._src.call import Call

Array = Any
EINSUMS = ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum")
# What both of the project's own implementations honour.
OWN = frozenset(
    {"bias", "bias by rule", "mask", "dropout_key", "dropout", "precision", "force_fp32_for_softmax", "grouped heads"}
    | {"scale", "logits_soft_cap", "sinks"}
)
# Why a word is not served, where there is more to say than that.
_WHY = {
    "module": "module is given the weights, which {name} never has all at once",
    "weights_only": "{name} never has all the weights",
    "bias": "it has no bias",
    "bias by rule": "it has no bias by rule",
    "dropout": "it has no dropout of Flax's bits",
    "precision": "its precision is its own",
    "origin": "it takes no shard of a whole",
    "spread": "it gives no row statistics, by which the parts of several devices are joined",
    "partial": "it gives no row statistics",
    "logits_soft_cap": "it has no soft cap",
    "sinks": "it has no sinks",
    **dict.fromkeys(EINSUMS, "einsum overrides take whole products"),
}
# Words that come with another, which is told instead.
_SILENT = {"dropout_key": "dropout", "whole": "origin", "origin": "spread"}


class Implementation:
    """One way to compute attention. Subclasses hold no state of a call.

    Attributes:
        name: of an engine of another package, as its entry point says.
        serves: the words of `Call.needs` that it supports: names of operands and options, and "grouped heads".
    """

    name = ""
    serves: frozenset[str] = frozenset()

    def refusals(self, call: Call) -> Iterator[str]:
        """Why it cannot serve the call, a line each; nothing where it can.

        Takes a few microseconds, and never looks at values.
        """
        needs = call.needs
        if not needs <= self.serves:
            lacking = needs - self.serves
            spoken = [word for word in lacking if _SILENT.get(word) not in lacking]
            yield from sorted({_WHY.get(x, f"it does not know {x!r}").format(name=self.name) for x in spoken})

    def rank(self, call: Call) -> int:
        """Its place among the implementations of one name that can serve the call: the least does."""
        return 0

    def remarks(self, call: Call) -> list[str]:
        """What else `explain` says of a call that it serves, a line each."""
        return []

    def compute(self, call: Call) -> Array:
        """The output, ``[batch..., q_length, num_heads, v_depth]``, in the compute dtype."""
        raise NotImplementedError


class Broken(Implementation):
    """An implementation that cannot be imported, and why."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def refusals(self, call: Call) -> Iterator[str]:
        yield self.reason
