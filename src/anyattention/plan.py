"""Which implementation serves a call, and why: the one place where that is decided.

The choice depends on nothing but shapes, dtypes, the library, its platform and the arguments given, so that a traced
call and an eager one are served alike.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from anyattention.settings import check_implementation


class Rule(NamedTuple):
    """An implementation, and which calls it is for: the least logits of the call, and of a head; bounds of q_length."""

    implementation: str
    logits: int = 0
    of_a_head: int = 0
    least_queries: int = 0
    most_queries: int = 2**63


#: The rules for ``implementation=None``, by library and platform: the first that fits, where nothing speaks against
#: it; exact everywhere else.
RULES = {
    ("numpy", "cpu"): (Rule("tiled", of_a_head=2**16, least_queries=64),),
    ("jax", "cpu"): (
        Rule("tiled", logits=2**22, of_a_head=2**18),
        Rule("tiled", logits=2**16, most_queries=1),
    ),
    ("jax", "gpu"): (Rule("fused", logits=2**16), Rule("tiled", logits=2**30)),
    ("jax", "tpu"): (Rule("fused", logits=2**16), Rule("tiled", logits=2**30)),
    ("torch", "cpu"): (
        Rule("fused", logits=2**16),
        Rule("tiled", logits=2**22, of_a_head=2**18),
    ),
    ("torch", "cuda"): (Rule("fused", logits=2**16), Rule("tiled", logits=2**30)),
    ("mlx", "gpu"): (Rule("fused", logits=2**16),),
}
_RULED = {library for library, _ in RULES}
_BY_DEFAULT = ("the default of this library",)
_SMALL = ("the call is small, see anyattention.plan.RULES",)


class Plan(NamedTuple):
    """The decision for one call: what runs, on which library, and the reasons."""

    implementation: str
    library: str
    reasons: tuple[str, ...]
    engine: Any = None  # of "fused"

    def __str__(self) -> str:
        rows = [("implementation", self.implementation), ("library", self.library)]
        rows += [("engine", self.engine.name)] if self.engine else []
        rows += [("reason", reason) for reason in self.reasons]
        return "\n".join(f"{name:<16}{text}" for name, text in rows)


def choose(
    implementation: str | None,
    backend: Any,
    query: Any,
    key: Any,
    serves: Callable[..., tuple[Any, list[str]]],
    *call: Any,
) -> Plan:
    """The plan for a call.

    Args:
        implementation: the name that was asked for, or None.
        backend: of the library.
        query: ``[batch..., q_length, num_heads, depth]``.
        key: ``[batch..., kv_length, num_heads, depth]``.
        serves: called with an implementation, the backend and `call` where tiled or fused comes into question; returns
            the engine, if any, and the reasons against it.
        *call: more arguments of `serves`.

    Raises:
        ValueError: a name that no implementation has.
        NotImplementedError: an implementation asked for by name that cannot serve the call.
    """
    library = backend.name
    if implementation is None:
        return _by_rule(backend, query, key, serves, *call)
    check_implementation(implementation)
    engine = None
    if implementation != "exact":
        engine, reasons = serves(implementation, backend, *call)
        if reasons:
            raise NotImplementedError(
                f"implementation={implementation!r} cannot serve this call: {'; '.join(reasons)}. Pass None for one "
                "that can, or its name"
            )
    return Plan(implementation, library, ("asked for by name",), engine)


def _by_rule(backend: Any, query: Any, key: Any, serves: Callable[..., tuple[Any, list[str]]], *call: Any) -> Plan:
    library = backend.name
    if library not in _RULED:
        return Plan("exact", library, _BY_DEFAULT)
    *batch, queries, heads, _ = query.shape
    of_a_head = queries * key.shape[-3]
    logits = of_a_head * heads * prod(batch)
    if not isinstance(logits, int):
        return Plan("exact", library, ("lengths are symbols",))
    against: list[str] = []
    platform = backend.platform(query)
    if (library, platform) not in RULES:
        return Plan("exact", library, (f"there is no rule for {platform}",))
    for rule in RULES[library, platform]:
        small = logits < rule.logits or of_a_head < rule.of_a_head
        if small or not rule.least_queries <= queries <= rule.most_queries:
            continue
        engine, reasons = serves(rule.implementation, backend, *call)
        if not reasons:
            size = f"{logits} logits, {of_a_head} of a head, {queries} queries: see anyattention.plan.RULES"
            return Plan(rule.implementation, library, (*against, size), engine)
        against += [f"not {rule.implementation}: {reason}" for reason in reasons]
    return Plan("exact", library, tuple(against) or _SMALL)
