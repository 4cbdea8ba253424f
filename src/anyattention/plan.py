"""Which implementation serves a call, and why: the one place where that is decided.

The choice depends on nothing but shapes, dtypes, the library and the arguments given, so that a traced call and an
eager one are served alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

#: Every implementation there is.
IMPLEMENTATIONS = ("exact", "tiled")
#: The rule for ``implementation=None``: by library, tiled from this many queries and this many logits of a head on,
#: where nothing speaks against it; exact everywhere else.
TILED_FROM = {"numpy": (64, 2**16)}
_BY_DEFAULT = ("the default of this library",)
_FEW = ("few queries or logits, see anyattention.plan.TILED_FROM",)


class Plan(NamedTuple):
    """The decision for one call: what runs, on which library, and the reasons."""

    implementation: str
    library: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("implementation", self.implementation), ("library", self.library)]
        rows += [("reason", reason) for reason in self.reasons]
        return "\n".join(f"{name:<16}{text}" for name, text in rows)


def choose(
    implementation: str | None, library: str, shapes: tuple[Any, Any], refusals: Callable[..., list[str]], *call: Any
) -> Plan:
    """The plan for a call.

    Args:
        implementation: the name that was asked for, or None.
        library: of the arrays.
        shapes: of query and key.
        refusals: says why the call cannot be tiled; asked only if it might be.
        *call: the arguments of `refusals`.

    Raises:
        ValueError: a name that no implementation has.
        NotImplementedError: an implementation asked for by name that cannot serve the call.
    """
    if implementation is None:
        least = TILED_FROM.get(library)
        if least is None:
            return Plan("exact", library, _BY_DEFAULT)
        q_length, kv_length = shapes[0][-3], shapes[1][-3]
        if q_length < least[0] or q_length * kv_length < least[1]:
            return Plan("exact", library, _FEW)
        reasons = refusals(*call)
        if reasons:
            return Plan("exact", library, tuple(f"not tiled: {reason}" for reason in reasons))
        return Plan("tiled", library, (f"a head has {q_length} x {kv_length} logits, tiled from {least[1]} on",))
    if implementation == "tiled":
        reasons = refusals(*call)
        if reasons:
            raise NotImplementedError(f"implementation='tiled' cannot serve this call: {'; '.join(reasons)}")
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: pass None or one of {', '.join(IMPLEMENTATIONS)}"
        )
    return Plan(implementation, library, ("asked for by name",))
