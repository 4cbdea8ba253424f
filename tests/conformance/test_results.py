"""What a report comes to: two verdicts, by its scope, and in which order failures are told."""

import json

import pytest

from anyattention_conformance import Report, Result
from anyattention_conformance.results import ALL, BUG, CONFORMS, ORDINARY, UNSUPPORTED, Diagnosis

INF = float("inf")


def result(case="plain", group="layout", verdict=CONFORMS, **fields):
    return Result(case, group, "float32", "output", verdict, **fields)


def report(*results, **fields):
    return Report("mine", "numpy", "C3", "smoke", "Flax", "2026-11-27", {}, results=list(results), **fields)


RIGHT, WRONG = result(ratio=0.1), result("mask", "mask", BUG, ratio=20.0)
CORNER_RIGHT = result("depth-0", "depth", ratio=0.1, corner="no depth")
CORNER_WRONG = result("depth-0", "depth", BUG, ratio=INF, corner="no depth")


@pytest.mark.parametrize(
    ("results", "scope", "verdict", "status"),
    [
        ([RIGHT, CORNER_RIGHT], ORDINARY, "conforms to C3", 0),
        ([RIGHT, CORNER_RIGHT], ALL, "conforms to C3", 0),
        ([RIGHT, CORNER_WRONG], ORDINARY, "ordinary calls conform to C3; corners: 1 of 1 differ", 0),
        ([RIGHT, CORNER_WRONG], ALL, "does not conform to C3: ordinary calls conform; corners: 1 of 1 differ", 1),
        ([RIGHT, WRONG], ORDINARY, "does not conform to C3: ordinary calls: 1 of 2 results fail", 1),
        (
            [RIGHT, WRONG, CORNER_WRONG],
            ORDINARY,
            "does not conform to C3: ordinary calls: 1 of 2 results fail; corners: 1 of 1 differ",
            1,
        ),
        ([CORNER_WRONG], ORDINARY, "was not compared with anything", 2),
        ([result(verdict=UNSUPPORTED)], ALL, "was not compared with anything", 2),
    ],
)
def test_two_verdicts_and_the_exit_status(results, scope, verdict, status):
    found = report(*results, scope=scope)
    assert (found.verdict, found.exit_status, found.passes) == (verdict, status, status == 0)


def test_a_selection_never_conforms():
    assert report(RIGHT, CORNER_RIGHT, selection=["plain", "depth"]).verdict == "selection of 2 cases passes"
    assert report(RIGHT, WRONG, selection=["m*"]).verdict == "selection of 2 cases fails"
    assert report(RIGHT, selection=["plain"]).verdict == "selection of 1 case passes"


def test_a_claim_that_did_not_come_true_counts_in_every_scope():
    found = report(RIGHT, problems=["never"], scope=ORDINARY)
    assert found.exit_status == 1
    assert found.verdict == "does not conform to C3: ordinary calls conform; 1 claim did not come true"


def test_the_order_of_failures():
    """Ordinary before corners, no answer before far off before less far, then the simplest; no parameter last."""
    missing = result("bias", "bias", BUG, kind="missing")
    less = result("depth-24", "depth", BUG, ratio=3.0)
    far = [result("large", "lengths", BUG, ratio=11.0, size=9), result("small", "lengths", BUG, ratio=30.0, size=3)]
    nothing = result("dropout", "dropout", BUG, kind="raised")
    found = report(missing, CORNER_WRONG, less, *far, nothing, RIGHT)
    assert found.failures == [nothing, *reversed(far), less, missing, CORNER_WRONG]


def test_json_has_the_verdict_and_reads_what_was_written_before():
    found = report(RIGHT, CORNER_WRONG, scope=ORDINARY, diagnosis=[Diagnosis("no scale", "why", "how")])
    data = json.loads(found.to_json())
    assert data["verdict"]["exit_status"] == 0
    assert data["verdict"]["sentence"] == found.verdict
    assert (data["verdict"]["ordinary"]["BUG"], data["verdict"]["corners"]["BUG"]) == (0, 1)
    assert Report.from_json(found.to_json()) == found
    for name in ("verdict", "selection", "scope", "inferred", "diagnosis"):
        del data[name]
    assert Report.from_json(json.dumps(data)).scope == ALL
