"""Which implementation serves a call, and why: the one place where that is decided.

The choice depends on nothing but shapes, dtypes, the library, its platform, the arguments and the settings, so that a
traced call and an eager one are served alike.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from anyattention._src import registry, settings
from anyattention._src.call import Call
from anyattention._src.implementations.base import Implementation
from anyattention._src.settings import Name


class Rule(NamedTuple):
    """An implementation, and which calls it is for: the least logits of the call, and of a head; bounds of q_length."""

    implementation: Name
    logits: int = 0
    of_a_head: int = 0
    least_queries: int = 0
    most_queries: int = 2**63

    def fits(self, logits: int, of_a_head: int, queries: int) -> bool:
        """Whether a call of this size is one that the rule is for."""
        bounded = self.least_queries <= queries <= self.most_queries
        return logits >= self.logits and of_a_head >= self.of_a_head and bounded

    def __str__(self) -> str:
        """From which sizes on: "tiled from 4194304 logits, 262144 of a head"."""
        bounds = ((self.logits, "logits"), (self.of_a_head, "of a head"), (self.least_queries, "queries"))
        text = f"{self.implementation} from {', '.join(f'{least} {unit}' for least, unit in bounds if least)}"
        return text if self.most_queries == 2**63 else f"{text}, at most {self.most_queries} queries"


#: The rules for ``implementation=None``, by library and platform: the first that fits, where nothing speaks against
#: it; exact everywhere else.
RULES = {
    ("numpy", "cpu"): (Rule("tiled", of_a_head=2**16, least_queries=64),),
    ("jax", "cpu"): (Rule("tiled", logits=2**22, of_a_head=2**18), Rule("tiled", logits=2**16, most_queries=1)),
    ("jax", "gpu"): (Rule("fused", logits=2**16), Rule("tiled", logits=2**30)),
    ("jax", "tpu"): (Rule("fused", logits=2**16), Rule("tiled", logits=2**30)),
    ("torch", "cpu"): (Rule("fused", logits=2**16), Rule("tiled", logits=2**22, of_a_head=2**18)),
    ("torch", "cuda"): (Rule("fused", logits=2**16), Rule("tiled", logits=2**30)),
    ("mlx", "gpu"): (Rule("fused", logits=2**16),),
}
_RULED = {library for library, _ in RULES}

#: Engines that None may choose on an accelerator, by library, platform and engine, with the dtypes in which both their
#: outputs and their gradients have run on such a device: the runs under ``benchmarks/results``. Others run by name or
#: by `config(engines=...)`. Engines on CPUs are tested with every change.
RUN_ON_A_DEVICE = {
    ("jax", "gpu", "cudnn"): ("bfloat16", "float16"),
    ("torch", "cuda", "sdpa"): ("bfloat16", "float16"),
}
_CHECK = "check it with `python -m benchmarks.gpu`, then pass implementation='fused' or name it in config(engines=...)"


class Plan(NamedTuple):
    """The decision for one call, in names: what runs, on which library, with which engine, and the reasons."""

    implementation: Name | None  # None where the one that was asked for by name cannot serve the call
    library: str
    reasons: tuple[str, ...]
    engine: str | None = None  # of "fused"

    def __str__(self) -> str:
        rows = [("implementation", self.implementation or "none: the call raises"), ("library", self.library)]
        rows += [("engine", self.engine)] if self.engine else []
        rows += [("reason", reason) for reason in self.reasons]
        return "\n".join(f"{name:<16}{text}" for name, text in rows)


def choose(call: Call, name: str | None = None) -> Implementation:
    """The implementation that serves a call: the one of this name, or by rule.

    Raises:
        ValueError: a name that no implementation has.
        NotImplementedError: the implementation of this name cannot serve the call.
    """
    name = settings.check_implementation(name) if name else settings.current().implementation
    _, found = _decide(call, name, None)
    if found is None:
        reasons = "; ".join(explain(call, name).reasons)
        raise NotImplementedError(
            f"implementation={name or 'exact'!r} cannot serve this call: {reasons}. Pass None for one that can, or its "
            "name"
        )
    return found


def explain(call: Call, name: str | None = None) -> Plan:
    """What `choose` does, in words."""
    told: list[str] = []
    kind, found = _decide(call, settings.check_implementation(name) or settings.current().implementation, told)
    if found is None:
        return Plan(None, call.backend.name, tuple(told))
    return Plan(kind, call.backend.name, (*told, *found.remarks(call)), found.name if kind == "fused" else None)


def _decide(call: Call, name: Name | None, told: list[str] | None) -> tuple[Name, Implementation | None]:
    """The name of the implementation, and what computes it, if anything; `told` takes the reasons, where wanted."""
    if name is not None:
        found = _able(call, name, told, by_rule=False)
        if told is not None and found is not None:
            told[:] = ["asked for by name"]
        return name, found
    for rule in _rules(call, told):
        found = _able(call, rule.implementation, told, by_rule=True)
        if found is not None:
            return rule.implementation, found
    exact = registry.EXACT  # which refuses words alone: to go through `_able` takes 0.9 us more
    return "exact", exact if call.needs <= exact.serves else _able(call, "exact", told, by_rule=True)


def _rules(call: Call, told: list[str] | None) -> Sequence[Rule]:
    """The rules that fit the size of the call, in order."""
    library, query = call.backend.name, call.operands.query
    shape = query.shape
    queries, heads = shape[-3], shape[-2]
    fitting: Sequence[Rule] = ()
    if library not in _RULED:
        reasons = ["exact is the default of this library"]
    elif not isinstance(logits := (of_a_head := queries * call.operands.key.shape[-3]) * heads * prod(shape[:-3]), int):
        reasons = ["lengths are symbols"]
    else:
        platform = call.backend.arrays.platform(query)
        rules = RULES.get((library, platform), ())
        fitting = [x for x in rules if x.fits(logits, of_a_head, queries)]
        if wasteful := call.backend.tiles.wasteful(call) if fitting else "":
            fitting = [x for x in fitting if x.implementation != "tiled"]
        if told is None:
            return fitting
        reasons = [f"{logits} logits, {of_a_head} of a head, {queries} queries"]
        unfit = [str(x) for x in rules if not x.fits(logits, of_a_head, queries)]
        reasons += unfit if rules else [f"there is no rule for {platform}"]
        reasons += [f"not tiled: {wasteful}"] if wasteful else []
    if told is not None:
        told += reasons
    return fitting


def _able(call: Call, name: Name, told: list[str] | None, by_rule: bool) -> Implementation | None:
    """The implementation of this name that serves the call, of several the one of the least rank; None if none can."""
    chosen = settings.current().engines if name == "fused" else None
    candidates = registry.named(call.backend, name, chosen)
    best, least = None, 0
    refused: list[str] = []
    for implementation in candidates:
        reasons = []
        for reason in implementation.refusals(call):
            reasons.append(reason)
            if told is None:
                break
        if not reasons and by_rule and chosen is None and name == "fused":
            reasons = _not_on_record(call, implementation)
        if reasons:
            refused.append(f"{implementation.name}: {', '.join(reasons)}" if name == "fused" else ", ".join(reasons))
            continue
        rank = implementation.rank(call)
        if best is None or rank < least:  # not `min(..., key=...)`, which torch.compile cannot trace
            best, least = implementation, rank
        if chosen is not None or rank == 0:  # there is none before it
            break
    if told is not None:
        if best is None and name == "fused":
            known = registry.engines(call.backend)
            refused += [f"{x.name}: it is switched off" for x in known if x not in candidates]
            refused += [] if known else [f"there is no engine for {call.backend.name}"]
        told += [f"not {name}: {reason}" for reason in refused] if by_rule else refused
    return best


def _not_on_record(call: Call, engine: Implementation) -> list[str]:
    """Why None does not pick an engine that can serve the call."""
    platform, dtype = call.backend.arrays.platform(call.operands.query), call.options.dtype
    if platform == "cpu" or dtype in RUN_ON_A_DEVICE.get((call.backend.name, platform, engine.name), ()):
        return []
    return [f"no run of it in {dtype} on a {platform} is on record: {_CHECK}"]
