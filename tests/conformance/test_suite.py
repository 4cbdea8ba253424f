"""The suite: verdicts from outcomes, by contract and claims."""

import numpy as np
import pytest

from anyattention_conformance import Claims, Difference, Golden, Meaning, suite, targets
from anyattention_conformance.claims import ClaimError, parse
from anyattention_conformance.reference import Attention, attention

GOLDEN = Golden()


def certify(function, only, **claims):
    declared = Claims(**claims)
    chosen = suite.runs("smoke", declared.contract, only)
    return suite.certify_here(targets.make(function, "numpy"), chosen, claims=declared, oracle=GOLDEN)


def verdicts(report):
    return {x.verdict for x in report.results}


class Changed:
    """The right attention, with its answer changed."""

    def __init__(self, change):
        self.change = change

    def __call__(self, query, key, value, bias=None, mask=None):
        return self.change(attention(query, key, value, bias, mask))


def test_runs():
    assert {run.case.id for run in suite.runs("smoke", only=["mask-hid*", "depth"])} >= {"mask-hidden-row", "depth-24"}
    assert {run.dtype for run in suite.runs("full", dtypes=["float64"])} == {"float64"}
    assert len(suite.runs("full")) > 4 * len(suite.runs("smoke")) > 400
    assert {run.case.id for run in suite.runs("smoke", "C2")} > {run.case.id for run in suite.runs("smoke", "C3")}


def test_gradients_need_a_library_or_vjp():
    assert {x.quantity for x in certify(attention, ["plain"]).results} == {"output", "dq", "dk", "dv"}
    report = certify(Changed(lambda x: x), ["plain"])
    assert next(x.message for x in report.results if x.quantity == "dq").endswith("no attribute `vjp`")
    assert verdicts(report) == {"conforms", "unsupported"}


def test_a_wrong_gradient_is_found():
    class Wrong(Attention):
        def query_gradient(self, call, dlogits):
            return -super().query_gradient(call, dlogits)

    report = certify(Wrong(), ["plain"])
    assert {x.quantity for x in report.failures} == {"dq"}
    assert report.failures[0].rows is not None


@pytest.mark.parametrize("change", [lambda x: x.astype(np.float64), lambda x: x[None], lambda x: x.swapaxes(-2, -3)])
def test_dtype_and_shape_are_compared(change):
    report = certify(Changed(change), ["plain"])
    assert all("instead of" in x.message for x in report.failures)
    assert {x.dtype for x in report.failures} == {"float32", "bfloat16", "float16"}


def test_what_hides_behind_a_mask_may_show_or_not():
    """A NaN in a hidden value shows in Flax; who does not claim its steps may leave it out."""

    def clean(query, key, value, bias=None, mask=None):
        seen = True if mask is None else np.asarray(mask, bool).any(axis=(-3, -2))[..., None, None]
        return attention(query, key, np.where(seen, value, value.dtype.type(0)), bias, mask)

    for function in (clean, attention):
        assert not certify(function, ["hidden-nan-value"]).failures
    assert certify(clean, ["hidden-nan-value"], contract="C2").failures
    assert not certify(attention, ["hidden-nan-value"], contract="C2").failures


def test_the_contract_met_is_said():
    report = certify(attention, ["weights"])
    assert {x.contract for x in report.results if x.dtype == "bfloat16"} == {"C1"}
    report = certify(Changed(lambda x: x * x.dtype.type(1 + 2**-7)), ["weights"])
    assert {x.contract for x in report.results if x.dtype == "bfloat16" and x.quantity == "output"} == {"C3"}


def test_what_flax_lacks_is_asked_of_those_that_declare_it():
    assert not any(run.case.beyond for run in suite.runs("full"))
    asked = {run.case.id: run.case.beyond for run in suite.runs("full", supports=["scale"]) if run.case.beyond}
    assert "scale-0" in asked
    assert set(asked.values()) == {frozenset({"scale"})}
    with pytest.raises(ClaimError, match="did you mean 'soft cap'"):
        parse({"supports": ["softcap"]})
    assert parse({"supports": ["soft cap"]}).supports == {"soft cap"}


def test_what_is_declared_to_be_supported_must_be_there():
    def plain(query, key, value):
        return attention(query, key, value)

    supports = frozenset({"scale"})
    runs = suite.runs("smoke", only=["scale"], supports=supports)[:1]
    report = suite.certify_here(targets.make(plain, "numpy"), runs, claims=Claims(supports=supports), oracle=GOLDEN)
    (failure,) = report.failures
    assert failure.message == "takes no scale, which it is declared to support"
    assert not report.diagnosis


def test_claims():
    zero = Changed(lambda x: np.zeros_like(x))
    assert certify(zero, ["plain"], differs=(Difference("always zero", ("plain",)),)).conforms
    report = certify(attention, ["plain"], differs=(Difference("always zero", ("plain",)),))
    assert report.problems == ["declared, but did not occur: plain: always zero"]
    assert not report.conforms
    report = certify(zero, ["plain"], differs=(Difference("always zero", ("plain",), ("float32",)),))
    assert {x.dtype for x in report.failures} == {"bfloat16", "float16"}
    report = certify(attention, ["plain", "dropout"], unsupported=frozenset({"dropout"}))
    (problem,) = report.problems
    assert problem.startswith("declared, but did not occur: dropout (the target does not raise")


def test_a_meaning_is_held_to():
    """Zero for hidden rows is declared: then zero it must be, and the other rows are as ever."""
    zero = Meaning(fill=float("-inf"), empty=0.0)

    def rows(output, query, key, mask):
        shape = (*output.shape[:-3], output.shape[-2], output.shape[-3], key.shape[-3])
        seen = np.broadcast_to(np.asarray(mask, bool), shape).any(axis=-1)
        return np.where(np.swapaxes(seen, -1, -2)[..., None], output, output.dtype.type(0))

    def declared(query, key, value, bias=None, mask=None):
        return rows(attention(query, key, value, bias, mask), query, key, mask)

    def worse(query, key, value, bias=None, mask=None):
        return rows(attention(query, key, value, bias, mask) * query.dtype.type(1.25), query, key, mask)

    chosen = ["mask-hidden-row"]
    report = certify(declared, chosen, meaning=zero)
    assert report.conforms
    assert "differs as declared" in verdicts(report)
    assert certify(worse, chosen, meaning=zero).failures
    assert certify(attention, chosen, meaning=zero).failures


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"unsuported": []}, "'unsuported' is not a claim"),
        ({"unsupported": ["speed"]}, "'speed' is not something to support"),
        ({"contract": "C4"}, "'C4' is not a contract"),
        ({"meaning": {"fill": "lots"}}, "fill is a number or 'minimum', not 'lots'"),
        ({"differs": [{"cases": ["plain"]}]}, "needs `cases` and `because`"),
        ({"differs": [{"cases": ["plian"], "because": "x"}]}, "no case and no group is called 'plian'"),
        ({"differs": [{"cases": ["plain"], "because": "x", "dtypes": ["float8"]}]}, "'float8' is not a dtype"),
    ],
)
def test_claims_that_mean_nothing_are_refused(data, message):
    with pytest.raises(ClaimError, match=message):
        parse(data)


def test_a_report_survives_json():
    report = certify(Changed(lambda x: x * np.nan), ["plain"])
    again = type(report).from_json(report.to_json())
    assert again.counts() == report.counts()
    assert again.failures[0].ratio == float("inf")
    assert np.isnan(again.failures[0].rows.actual).all()
