"""Which implementation serves a call, and why: the one place where that is decided.

The choice depends on nothing but shapes, dtypes, the library, its platform, the arguments and the settings, so that a
traced call and an eager one are served alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

from anyattention._src import registry, settings
from anyattention._src.call import Call
from anyattention._src.implementations.base import Implementation
from anyattention._src.settings import Name


class Rule(NamedTuple):
    """An implementation, and which calls it is for, by what one batch entry needs: its neighbours change nothing."""

    implementation: Name
    of_a_head: int = 0  # logits, at least
    of_an_entry: int = 0  # logits of all heads, at least
    least_queries: int = 0
    most_queries: int = 2**63
    dtypes: tuple[str, ...] = ()  # of the computation; all of none
    traced: bool = False  # whether it is only for calls in a program that is compiled as a whole

    def fits(self, call: Call) -> bool:
        """Whether the call is one that the rule is for."""
        (queries, keys), heads = call.lengths, call.operands.query.shape[-2]
        if queries < self.least_queries or queries > self.most_queries or queries * keys < self.of_a_head:
            return False
        if queries * keys * heads < self.of_an_entry or (self.dtypes and call.options.dtype not in self.dtypes):
            return False
        return not self.traced or call.backend.arrays.traced(call.operands.query)

    def __str__(self) -> str:
        """Which calls: "tiled from 65536 logits of a head, 64 queries"."""
        bounds = (
            (self.of_a_head, "logits of a head"),
            (self.of_an_entry, "logits of a batch entry"),
            (self.least_queries, "queries"),
        )
        text = f"{self.implementation} from {', '.join(f'{least} {unit}' for least, unit in bounds if least)}"
        text += "" if self.most_queries == 2**63 else f", at most {_queries(self.most_queries)}"
        text += f", in {' and '.join(self.dtypes)}" if self.dtypes else ""
        return f"{text}, in a compiled program" if self.traced else text


RULES: dict[tuple[str, str], tuple[Rule, ...]] = {
    ("numpy", "cpu"): (Rule("tiled", of_a_head=2**16, least_queries=64),),
    ("jax", "cpu"): (
        Rule("tiled", of_a_head=2**18),
        # Measured, of 16 bits: 1.6 times exact's time. Called step by step, each length of a cache is compiled anew.
        Rule("tiled", of_a_head=2**12, most_queries=1, dtypes=("float32", "float64"), traced=True),
    ),
    # Measured on an H100, of 128 heads in all: up to 2^16 exact takes 0.046 to 0.065 ms, cuDNN 0.068 to 0.094. There
    # are mostly more heads, and exact's time grows with them.
    ("jax", "gpu"): (
        Rule("fused", of_a_head=2**14),
        Rule("fused", of_a_head=2**10, most_queries=1),
        Rule("tiled", of_an_entry=2**30),
    ),
    ("jax", "tpu"): (Rule("fused", of_a_head=2**10), Rule("tiled", of_an_entry=2**30)),
    ("torch", "cpu"): (Rule("fused", of_a_head=2**6), Rule("tiled", of_a_head=2**18)),
    ("torch", "cuda"): (Rule("fused", of_a_head=2**8), Rule("tiled", of_an_entry=2**30)),
    ("mlx", "gpu"): (Rule("fused", of_a_head=2**10),),
    ("dask", "cpu"): (Rule("tiled", of_a_head=1),),  # exact has all logits of two chunks at once
}
"""The rules for ``implementation=None``, by library and platform: the first that fits, where nothing speaks against it.

Exact serves everything else. On accelerators tiled takes several times as long as exact, and serves where that has no
room.
"""
_RULED = {library for library, _ in RULES}

#: Engines that None may choose on an accelerator, by library, platform and engine, with the dtypes in which both their
#: outputs and their gradients have run on such a device: the runs under ``benchmarks/results``. Others run by name or
#: by `config(engines=...)`. Engines on CPUs are tested with every change.
RUN_ON_A_DEVICE = {
    ("jax", "gpu", "cudnn"): ("bfloat16", "float16"),
    ("torch", "cuda", "sdpa"): ("bfloat16", "float16"),
}
_CHECK = "check it with `python -m benchmarks.gpu`, then pass implementation='fused' or name it in config(engines=...)"


def _queries(number: int) -> str:
    return "1 query" if number == 1 else f"{number} queries"


class Plan(NamedTuple):
    """The decision for one call, in names; prints as a table.

    Attributes:
        implementation: what runs; None if the call raises, since what was asked for by name cannot serve it.
        library: of the arrays.
        reasons: why, a line each.
        engine: the kernel, where the implementation is "fused".
    """

    implementation: Name | None
    library: str
    reasons: tuple[str, ...]
    engine: str | None = None

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
            f"implementation={name or 'exact'!r} cannot serve this call: {reasons}. Pass implementation=None, which "
            "chooses one that can"
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
    (queries, keys), heads = call.lengths, query.shape[-2]
    fitting: tuple[Rule, ...] = ()
    if call.options.spread is not None:
        fitting = (Rule("fused"), Rule("tiled")) if call.options.spread.asked else (Rule("tiled"),)
        reasons = ["the sequence is on several devices"]
    elif library not in _RULED:
        reasons = ["exact is the default of this library"]
    elif call.backend.symbolic(queries * keys * heads):
        reasons = ["lengths are symbols"]
    else:
        platform = call.backend.arrays.platform(query)
        rules: Sequence[Rule] = RULES.get((library, platform), ())
        fitting = tuple([x for x in rules if x.fits(call)])
        unfit = [] if told is None else _unfit(rules, fitting)
        tiled = any(x.implementation == "tiled" for x in fitting)
        if wasteful := call.backend.tiles.no_tiles(call, by_rule=True) if tiled else "":
            fitting = tuple([x for x in fitting if x.implementation != "tiled"])
        if told is None:
            return fitting
        reasons = [f"{queries * keys} logits of a head, {queries * keys * heads} of a batch entry, {_queries(queries)}"]
        reasons += unfit if rules else [f"there is no rule for {platform}"]
        reasons += [f"not tiled: {wasteful}"] if wasteful else []
    if told is not None:
        told += reasons
    return fitting


def _unfit(rules: Sequence[Rule], fitting: Sequence[Rule]) -> list[str]:
    """The rules that do not fit, of implementations of which none does."""
    served = {x.implementation for x in fitting}
    return [str(x) for x in rules if x.implementation not in served]


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
