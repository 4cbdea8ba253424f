"""The tables of who-does-what.md, from the results that are committed under ``conformance/results``.

A table of a corner tells what each attention does in the corner's cases: the words are the verdict of the kit, or the
reason that the attention's claims give, which the kit has seen occur. ``python docs/tables.py`` writes them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from anyattention_conformance import Report
from anyattention_conformance.adapters import FOLDER
from anyattention_conformance.cases import CASES
from anyattention_conformance.claims import Claims, read
from anyattention_conformance.report_text import DASH, to_markdown
from anyattention_conformance.results import CONFORMS, DECLARED, UNSUPPORTED, Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "conformance" / "results"
PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())
GRADIENTS = ("dq", "dk", "dv", "dbias")
OURS = ("anyattention-jax", "anyattention-numpy", "anyattention-torch")
TILED = tuple(f"{name}-tiled" for name in OURS)
KERAS = ("keras-jax", "keras-numpy", "keras-torch")
TRANSFORMERS = ("huggingface-eager", "huggingface-sdpa")
NAMES = ("flax-nnx", "jax-nn", *KERAS, "mlx-fast", "torch-sdpa", "torch-flex", *TRANSFORMERS)
NAMES += (*OURS, *TILED)
FAMILIES = {
    "ours": (*OURS, *TILED),
    "ours (exact)": OURS,
    "ours (tiled)": TILED,
    "Keras": KERAS,
    "Transformers": TRANSFORMERS,
}
AS_FLAX = ("as Flax", "refused", "Flax's bits")
MEANINGS = {
    "empty": "the weights are zero",
    "fill": "a hidden logit is {fill}",
}


@dataclass(frozen=True)
class Corner:
    """Cases, the quantities of each column, and which part of a declared meaning shows in them."""

    cases: tuple[str, ...]
    columns: tuple[tuple[str, tuple[str, ...]], ...] = (("output", ("output",)), ("gradients", GRADIENTS))
    meaning: str = "fill"
    rounds: bool = False  # whether the bits are of interest, not only the budget
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64", "int32", "bool")


def corner(*cases: str, meaning: str = "fill") -> Corner:
    """A corner of these cases."""
    return Corner(cases, meaning=meaning)


def outputs(*cases: str) -> Corner:
    """A corner whose gradients tell nothing more."""
    return Corner(cases, Corner.columns[:1])


def roundings(*cases: str) -> Corner:
    """A corner in which the bits of 16-bit dtypes differ."""
    return Corner(cases, Corner.columns[:1], rounds=True, dtypes=("bfloat16", "float16"))


def errors(*cases: str) -> Corner:
    """A corner in which Flax raises."""
    return Corner(cases, (("call", ("error",)),))


CORNERS = {
    "fully-masked-rows": corner("mask-hidden-row", "mask-hidden-all", "mask-queries", meaning="empty"),
    "rows-of-minus-infinity": corner("bias-row-minus-infinity", meaning="empty"),
    "nan-in-a-hidden-key": corner("hidden-nan-key"),
    "nan-in-a-hidden-value": corner("hidden-nan-value", "hidden-infinite-value"),
    "nan-in-a-hidden-bias": corner("hidden-nan-bias", "hidden-infinite-bias"),
    "visible-infinities": outputs("visible-infinite-bias", "visible-nan-bias", "visible-nan-key", "infinite-query"),
    "hidden-keys-beside-minus-infinity": outputs("fill-over-infinity"),
    "hidden-keys-beside-the-smallest-number": outputs("fill-tie"),
    "hidden-keys-beside-a-wider-bias": outputs("fill-of-the-arrays"),
    "mask-and-bias-together": corner("mask-and-bias"),
    "dtype-of-the-mask": outputs("mask-float", "mask-int", "mask-fractions"),
    "shape-of-the-mask": outputs("mask-keys", "mask-lower-rank", "mask-rank-3", "mask-heads"),
    "a-mask-or-bias-that-enlarges-the-result": outputs(
        "bias-higher-rank", "mask-higher-rank", "heads-grown-by-bias", "keys-grown-by-bias"
    ),
    "boolean-bias": outputs("bias-bool"),
    "scale-before-or-after": outputs("scale-first"),
    "rounding-of-the-scale": roundings("weights-of-depth-96"),
    "softmax-in-half-precision": roundings("sums-of-weights"),
    "sums-over-many-keys": roundings("sum-overflow"),
    "overflow-to-minus-infinity": outputs("overflow-to-infinity"),
    "bias-of-a-wider-dtype": outputs("wide-bias-fine"),
    "double-precision": corner("float64", "float64-depth-24"),
    "mixed-dtypes": outputs("float16-and-bfloat16", "bfloat16-and-float32", "float16-and-integers"),
    "integers-and-booleans": outputs("integers", "booleans"),
    "another-dtype-for-the-computation": outputs("dtype"),
    "values-of-another-depth": corner("value-depth"),
    "depth-zero": outputs("depth-0"),
    "no-keys": outputs("kv-length-0"),
    "no-queries": outputs("q-length-0"),
    "shapes-that-do-not-fit": errors("ranks-differ", "batches-differ", "heads-differ", "depths-differ"),
    "more-values-than-keys": errors("kv-lengths-differ"),
    "masks-that-do-not-fit": errors("mask-does-not-fit", "bias-does-not-fit"),
}
QUESTIONS = {
    "a-mask-of-zeros-and-ones": "float mask",
    "causal-alignment": "causal",
    "grouped-heads": "grouped heads",
    "dropout": "dropout",
}


@cache
def reports() -> dict[str, tuple[Report, Claims]]:
    """The committed reports, with the claims that stand beside each adapter."""
    return {
        name: (Report.from_json((RESULTS / f"{name}.json").read_text()), read(FOLDER / f"{name}.toml"))
        for name in NAMES
    }


def title(name: str) -> str:
    """What an attention is called in a table."""
    return re.sub(r", (.*)", r" (\1)", reports()[name][1].title) if name in reports() else "flax.linen"


def members(names: Iterable[str]) -> str:
    """The titles of some attentions; of a whole family, the family's."""
    names = list(names)
    found = []
    for name in names:
        family = next((x for x, y in FAMILIES.items() if name in y and set(y) <= set(names)), "")
        found.append(family or title(name))
    return ", ".join(dict.fromkeys(found))


def phrase(name: str, result: Result, corner: Corner) -> str:
    """What an attention does, where a result has been recorded."""
    claims = reports()[name][1]
    (case,) = (case for case in CASES if case.id == result.case)
    if result.verdict == UNSUPPORTED:
        lacks = ", ".join(sorted(claims.refused(case, result.dtype))) or "gradients"
        return f"does not take: {lacks}" if result.quantity in ("output", "error") else "no gradients"
    if result.verdict == DECLARED:
        if difference := claims.difference(case, result.dtype, result.quantity):
            return difference.because
        return MEANINGS[corner.meaning].format(fill=claims.meaning.fill).replace("-inf", "minus infinity")
    if result.verdict != CONFORMS:
        return f"{result.verdict}: {result.message}"
    if result.quantity == "error":
        return "refused"
    if words := PEERS["not finite"][name].get(result.case, {}).get(result.quantity):
        return words
    if not corner.rounds:
        return "as Flax"
    if result.contract in ("C1", "C2"):
        return "Flax's bits"
    smaller = result.error is not None and result.flax_error is not None and 2 * result.error < result.flax_error
    return "other bits, a smaller error" if smaller else "other bits"


def phrases(name: str, corner: Corner, quantities: tuple[str, ...]) -> dict[str, list[Result]]:
    """What one attention does in a corner, with the results that say so; what is as Flax first."""
    found: dict[str, list[Result]] = {}
    for result in reports()[name][0].results:
        if result.case in corner.cases and result.quantity in quantities and result.dtype in corner.dtypes:
            found.setdefault(phrase(name, result, corner), []).append(result)
    return {x: found[x] for x in sorted(found, key=lambda x: (x not in AS_FLAX, x))}


def cell(name: str, corner: Corner, quantities: tuple[str, ...]) -> str:
    """The phrases of an attention, each with the cases, gradients or dtypes that it is about."""
    found = phrases(name, corner, quantities)
    if len(found) <= 1:
        return next(iter(found), "")
    for of in ("case", "quantity", "dtype"):
        parts = {text: list(dict.fromkeys(getattr(x, of) for x in results)) for text, results in found.items()}
        if sum(map(len, parts.values())) == len({x for part in parts.values() for x in part}):
            mark = "`" if of == "case" else ""
            return "; ".join(f"{', '.join(f'{mark}{x}{mark}' for x in part)}: {text}" for text, part in parts.items())
    return "; in part ".join(found)


def grouped(rows: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Rows of a table, one for all that do the same; those as Flax first."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        found.setdefault(row, []).append(name)
    for row in sorted(found, key=lambda x: (set(x) != {"as Flax"}, "as Flax" not in x)):
        yield (members(found[row]), *row)


def markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def of_corner(corner: Corner) -> str:
    """The table of a corner, and how to see it."""
    columns = {
        title: cells
        for title, quantities in corner.columns
        if any((cells := {name: cell(name, corner, quantities) for name in NAMES}).values())
    }
    rows = {name: tuple(cells[name] or "no gradients" for cells in columns.values()) for name in NAMES}
    cases = ", ".join(f"`{case}`" for case in corner.cases)
    see = f"`anyattention conform NAME --only {corner.cases[0]}`"
    return f"{markdown(('attention', *columns), grouped(rows))}\nCases: {cases}. See it: {see}\n"


def of_question(question: str) -> str:
    """The table of what ``docs/peers.py`` has measured."""
    rows = {name: (PEERS["answers"][name][question],) for name in ("flax-linen", *NAMES) if name in PEERS["answers"]}
    return markdown(("attention", "what it does"), grouped(rows)).replace("ours (exact)", "ours")


def attentions() -> str:
    """What was measured, and when."""
    packages = {"flax-nnx": ("flax", "jax"), "jax-nn": ("jax",), "mlx-fast": ("mlx",)}
    rows = []
    for name in NAMES:
        report, _ = reports()[name]
        more = packages.get(name, ())
        more += ("keras",) if name in KERAS else ("transformers",) if name in TRANSFORMERS else ()
        versions = report.versions | {x: PEERS["versions"][x] for x in more}
        listed = ", ".join(f"{x} {version}" for x, version in sorted(versions.items()) if x != "jaxlib")
        rows.append((title(name), f"`{name}`", listed, report.date))
    return markdown(("attention", "NAME", "versions", "measured on"), rows)


def at_a_glance() -> str:
    """A mark for each corner and attention, of its first column."""
    families = {"ours (exact)": OURS[:1], "ours (tiled)": TILED[:1]}
    names = [*(name for name in NAMES if name not in (*OURS, *TILED)), *(name for x in families.values() for name in x)]
    titles = [title(name).replace("Transformers", "HF") for name in names[: -len(families)]] + list(families)
    rows = []
    for corner_name, corner in CORNERS.items():
        words = corner_name.replace("-", " ").replace("nan", "NaN")
        marks = (mark(phrases(name, corner, corner.columns[0][1])) for name in names)
        rows.append((f"[{words}](#{corner_name})", *marks))
    return markdown(("corner", *titles), rows)


def mark(found: Iterable[str]) -> str:
    """What an attention does: as Flax, another answer, not taken, or more than one of these."""
    return " ".join(sorted({"✓" if x in AS_FLAX else DASH if x.startswith("does not take") else "≠" for x in found}))


def matrix() -> str:
    """Case groups against attentions."""
    return to_markdown([reports()[name][0] for name in NAMES if name not in TILED])


TABLES: dict[str, Callable[[], str]] = {"attentions": attentions, "at-a-glance": at_a_glance, "matrix": matrix}
TABLES |= {name: (lambda corner=x: of_corner(corner)) for name, x in CORNERS.items()}
TABLES |= {name: (lambda question=x: of_question(question)) for name, x in QUESTIONS.items()}
