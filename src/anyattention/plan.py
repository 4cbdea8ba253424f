"""Which implementation serves a call, and why: the one place where that is decided."""

from typing import NamedTuple

#: Every implementation there is, with the rule by which ``implementation=None`` picks it, first match first.
RULES = {"exact": "Flax's own operations serve every call"}


class Plan(NamedTuple):
    """The decision for one call: what runs, on which library, and the reasons."""

    implementation: str
    library: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("implementation", self.implementation), ("library", self.library)]
        rows += [("reason", reason) for reason in self.reasons]
        return "\n".join(f"{name:<16}{text}" for name, text in rows)


def choose(implementation: str | None, library: str) -> Plan:
    """The plan for a call.

    Raises:
        ValueError: a name that no implementation has.
    """
    if implementation is None:
        return Plan("exact", library, (RULES["exact"],))
    if implementation not in RULES:
        raise ValueError(f"implementation={implementation!r} is unknown: pass None or one of {', '.join(RULES)}")
    return Plan(implementation, library, ("asked for by name",))
