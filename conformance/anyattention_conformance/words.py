"""The words of a claim: what a call may need of a target beside query, key and value, each with what it means."""

from collections.abc import Iterable
from difflib import get_close_matches

from anyattention_conformance.case import BEYOND
from anyattention_conformance.cases import CASES

WORDS = {
    "bias": "the parameter bias: numbers that are added to the logits",
    "mask": "the parameter mask: what is zero or false hides a key",
    "dropout": "dropout_rate, dropout_rng, broadcast_dropout and deterministic, with JAX's random bits",
    "dtype": "the parameter dtype, in which all is computed",
    "force_fp32_for_softmax": "the parameter of this name: a softmax in float32",
    "deterministic": "the parameter of this name: no dropout, whatever the rate",
    "gradients": "gradients of query, key, value and bias",
    "errors": "to raise where Flax raises, for shapes that do not fit",
    "float32": "arrays of this dtype",
    "float16": "arrays of this dtype",
    "bfloat16": "arrays of this dtype",
    "float64": "arrays of this dtype",
    "int32": "arrays of this dtype",
    "bool": "arrays of this dtype as query, key and value",
    "bias and mask": "both in one call",
    "per-head dropout": "broadcast_dropout=False",
    "dropout rate 1": "a dropout rate of one",
    "non-boolean mask": "a mask of integers or of floating-point numbers",
    "low-rank mask": "a mask with fewer axes than the query",
    "low-rank bias": "a bias with fewer axes than the query",
    "no batch": "query, key and value without a batch axis",
    "several batch dimensions": "query, key and value with two or three batch axes",
    "value depth": "values of another depth than keys",
    "empty": "no queries, no keys, or heads of depth 0",
    "depth 0": "heads of depth 0",
    "growth": "a bias or a mask that is larger than the logits, and enlarges the output",
    "mixed dtypes": "query, key and value in different dtypes",
    "wide bias": "a bias in a wider dtype than the query",
    "bool bias": "a boolean bias: true adds one",
    "bool inputs": "boolean query, key and value",
    "integer inputs": "integer query, key and value",
    "sinks of each query": "sinks with more axes than that of the heads",
    "offset of each entry": "an offset for each batch entry, in an array",
    "scale": "a number that the query is multiplied with, in place of the division by the root of the depth",
    "soft cap": "cap * tanh(logits / cap) in place of the logits, before bias and mask",
    "sinks": "a logit for each head, [num_heads], that has a part in the softmax and no value",
    "offsets": "the position of the first query: query i sees key j where j <= i + offset; a number or [batch]",
    "window": "(left, right): query i sees key j where i + offset - left <= j <= i + offset + right",
    "grouped heads": "keys and values with fewer heads than the query, each for several of its heads in a row",
}
USED = frozenset({"gradients"} | {x for case in CASES for x in (*case.dtypes, *case.needs)})  # those that cases need
FLAX_HAS = USED - BEYOND


class ClaimError(ValueError):
    """What is claimed or chosen cannot be understood; the message says what to write instead."""


def words(names: Iterable[str]) -> frozenset[str]:
    """The words of what is unsupported. ClaimError for others."""
    found = frozenset(names)
    if beyond := sorted(found & BEYOND):
        raise ClaimError(
            f"{beyond[0]!r} is beyond Flax, and asked only where it is declared as supported: leave it out"
        )
    if unknown := sorted(found - FLAX_HAS):
        meant = nearest(unknown[0], FLAX_HAS)
        raise ClaimError(
            f"{unknown[0]!r} is not something to support{meant}; `anyattention cases --words` lists all words"
        )
    return found


def beyond(names: Iterable[str]) -> frozenset[str]:
    """The words of what is supported beyond Flax. ClaimError for others."""
    found = frozenset(names)
    if unknown := sorted(found - BEYOND):
        meant = nearest(unknown[0], BEYOND)
        known = ", ".join(sorted(BEYOND))
        raise ClaimError(f"{unknown[0]!r} is nothing that Flax lacks and cases ask for{meant}: {known}")
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names what a mistyped name may stand for, or nothing."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5) or [x for x in known if x in name or name in x][:3]
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
