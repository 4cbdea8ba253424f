"""Claims that the kit writes: with them the target passes, and each asks a person to check it."""

import re
import tomllib

import numpy as np
import pytest

from anyattention_conformance import Claims, Golden, beyond, suite, targets
from anyattention_conformance.claims import parse
from anyattention_conformance.drafts import Draft
from anyattention_conformance.reference import attention

GOLDEN = Golden()


def plain(query, key, value, bias=None, mask=None):
    return attention(query, key, value, bias, mask)


def picky(query, key, value, mask=None):
    """Raises for some, answers otherwise for others: minus infinity hides, and depth 0 gives NaN."""
    if query.ndim != 4 or query.dtype != key.dtype or key.dtype != value.dtype or query.dtype.kind in "ib":
        raise ValueError("not for me")
    bias = None
    if mask is not None:
        bias = np.where(np.asarray(mask, bool), 0.0, -np.inf).astype(query.dtype)
    output = attention(query, key, value, bias)
    return output if query.shape[-1] else output * query.dtype.type(np.nan)


def inverted(query, key, value, mask=None):
    return attention(query, key, value, None, None if mask is None else ~np.asarray(mask, bool))


def outcomes(function):
    target = targets.make(function, "numpy")
    return [(run, target.run(*run)) for run in suite.runs("smoke")]


@pytest.mark.parametrize("function", [plain, picky, inverted, attention])
def test_with_the_claims_it_passes(function):
    found = outcomes(function)
    text = Draft(Claims(), found, GOLDEN).to_toml("mine", "smoke")
    claims = parse(tomllib.loads(text))
    report = suite.certify("mine", "numpy", found, [run for run, _ in found], claims=claims, oracle=GOLDEN)
    assert (report.scope, report.conforms, report.exit_status) == ("all", True, 0)
    entries = re.findall(r'^    "|^fill|^empty|^\[\[differs', text, re.MULTILINE)
    assert len(re.findall("# check: ", text)) == len(entries)


def test_words_for_what_raises_and_differences_for_what_answers():
    claims = parse(tomllib.loads(Draft(Claims(), outcomes(picky), GOLDEN).to_toml("mine", "smoke")))
    assert {"bias", "dropout", "mixed dtypes", "no batch", "several batch dimensions"} <= claims.unsupported
    assert not {"mask", "depth 0", "float32"} & claims.unsupported
    assert claims.meaning.fill == -np.inf
    assert "depth-0" in {name for x in claims.differs for name in x.cases}


def test_an_ordinary_mistake_is_not_hidden():
    text = Draft(Claims(), outcomes(inverted), GOLDEN).to_toml("mine", "smoke")
    assert "# check: ORDINARY calls, so this is probably a mistake to mend" in text
    assert "# check: ORDINARY" not in Draft(Claims(), outcomes(plain), GOLDEN).to_toml("mine", "smoke")


def test_what_is_beyond_flax_and_never_answered_is_dropped():
    def scaled(query, key, value, bias=None, mask=None, scale=None):
        return beyond.attention(query, key, value, bias, mask, scale=scale)

    target, supports = targets.make(scaled, "numpy"), frozenset({"scale", "sinks"})
    found = [(run, target.run(*run)) for run in suite.runs("smoke", supports=supports)]
    text = Draft(Claims(supports=supports), found, GOLDEN).to_toml("mine", "smoke")
    claims = parse(tomllib.loads(text))
    assert claims.supports == {"scale"}
    assert "sinks" not in text


def test_what_was_declared_stays():
    declared = Claims(title="theirs", contract="C2", unsupported=frozenset({"dropout"}))
    found = [(run, outcome) for run, outcome in outcomes(plain)]
    draft = Draft(declared, found, GOLDEN)
    assert draft.claims.unsupported >= {"dropout"}
    assert 'title = "theirs"\ncontract = "C2"' in draft.to_toml("mine", "smoke")
