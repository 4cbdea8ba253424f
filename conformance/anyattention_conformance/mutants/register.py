"""What a mutant is, and how one is registered."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from anyattention_conformance.reference import Attention


@dataclass(frozen=True)
class Mutant:
    """A mistake, and what has to find it.

    `group` is the group of cases that does. `contract` is "C3" if the answer is too far from the truth, has another
    dtype, shape or NaN, or is given where Flax raises; "C2" if only a target that claims Flax's own steps is wrong to
    give it. `row` is the mistake's number in the table of known traps, 0 if it is not there. `case`, if named, is the
    one that must find it.
    """

    name: str
    what: str
    group: str
    contract: str
    row: int
    attention: Attention
    case: str = ""


REGISTERED: list[Mutant] = []


def mutant(
    group: str, what: str, row: int = 0, contract: str = "C3", case: str = ""
) -> Callable[[type[Attention]], type[Attention]]:
    """Register a wrong attention, named as its class."""

    def register(attention: type[Attention]) -> type[Attention]:
        name = re.sub("(?<!^)(?=[A-Z])", "-", attention.__name__).lower()
        REGISTERED.append(Mutant(name, what, group, contract, row, attention(), case))
        return attention

    return register
