"""The kit within a test file: the assertion, the class, the plugin."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anyattention_conformance import Claims, Difference, assert_matches_flax, reproduce
from anyattention_conformance.adapters import ours
from anyattention_conformance.reference import attention

SAMPLES = Path(__file__).with_name("samples.py")


def wrong(query, key, value, mask=None):
    """Without the scale."""
    return attention(query * np.asarray(query.shape[-1] ** 0.5, query.dtype), key, value, mask=mask)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_right_function_passes(framework):
    assert_matches_flax(
        ours.exact, framework, contract="C2", unsupported=["dropout rate 1"], only=["layout", "dropout"]
    )


def test_a_wrong_function_fails_with_a_report():
    with pytest.raises(AssertionError, match=r"(?s)BUG layout  plain.*expected.*actual.*reproduce\("):
        assert_matches_flax(wrong, unsupported=["bias", "dropout"], only=["layout", "mask"])


def test_claims_may_be_given():
    claims = Claims(unsupported=frozenset({"dropout"}))
    with pytest.raises(AssertionError, match="takes no dropout_rate"):
        assert_matches_flax(wrong, only=["dropout"])
    with pytest.raises(AssertionError, match="did not occur: dropout"):
        assert_matches_flax(attention, claims=claims, only=["dropout"])


def test_a_failure_can_be_reproduced(capsys):
    report = reproduce(wrong, "plain")
    first, cause, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith(":wrong: plain in float32 differs, C3")
    assert cause == "✗ It does not divide the logits by the root of the depth."
    assert any("output: BUG" in line for line in rest)
    assert len(rest) < 15
    assert [x.quantity for x in report.failures] == ["output"]
    reproduce(wrong, "plain", inputs=True)
    assert "query =" in capsys.readouterr().out
    assert reproduce(attention, "plain").conforms
    assert capsys.readouterr().out.startswith("✓ ")
    with pytest.raises(ValueError, match="there is no case 'absent'"):
        reproduce(wrong, "absent")


def run_pytest(*arguments, cwd):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


def test_the_class(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "from anyattention_conformance import AttentionConformance\n"
        "from anyattention_conformance.reference import attention\n"
        "def wrong(query, key, value, mask=None):\n"
        "    return attention(query, key, value, mask=None if mask is None else 1 - mask.astype('f4'))\n"
        "class TestRight(AttentionConformance):\n"
        "    target = attention\n"
        "    contract = 'C2'\n"
        "class TestWrong(AttentionConformance):\n"
        "    framework = 'numpy'\n"
        "    target = staticmethod(wrong)\n"
        "    unsupported = ('bias', 'dropout', 'force_fp32_for_softmax', 'dtype')\n"
    )
    done = run_pytest(cwd=tmp_path)
    assert done.returncode == 1
    assert "TestRight" not in done.stdout
    assert "TestWrong::test_case[mask-float32]" in done.stdout
    assert "TestWrong::test_case[bias-float32]" not in done.stdout


def test_without_asserts_a_claim_that_does_not_occur_fails_as_well(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "from anyattention_conformance import AttentionConformance\n"
        "from anyattention_conformance.reference import attention\n"
        "class TestRight(AttentionConformance):\n"
        "    target = attention\n"
        "    unsupported = ('dropout',)\n"
    )
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "claims"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300)
    assert done.returncode == 1
    assert "declared, but did not occur: dropout" in done.stdout


def test_the_plugin(tmp_path):
    plugin = ("-p", "anyattention_conformance.plugin", "--attention-target")
    done = run_pytest(*plugin, f"{SAMPLES}:right", "--attention-contract", "C2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    done = run_pytest(
        *plugin, f"{SAMPLES}:zero_rows", "--attention-unsupported", "dropout", "--attention-scope", "all", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "test_case[mask-hidden-row-float32]" in done.stdout
    assert "anyattention_conformance/testing.py" not in done.stdout
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    done = run_pytest(*plugin, f"{SAMPLES}:right", "test_other.py", "-k", "plain or other", cwd=tmp_path)
    assert "4 passed" in done.stdout  # three dtypes of plain, and the other test


def test_a_failure_shows_no_line_of_the_kit(tmp_path):
    """Of the assertion, of the class, of what cannot run: the first lines say what is wrong."""
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from anyattention_conformance.reference import attention\n"
        "def wrong(query, key, value):\n"
        "    return attention(query * np.asarray(query.shape[-1] ** 0.5, query.dtype), key, value)\n"
    )
    (tmp_path / "test_mine.py").write_text(
        "from anyattention_conformance import AttentionConformance, assert_matches_flax\n"
        "from mine import wrong\n"
        "def test_one():\n"
        "    assert_matches_flax(wrong, unsupported=['bias', 'mask', 'dropout'])\n"
        "def test_two():\n"
        "    assert_matches_flax(wrong, unsupported=['bais'])\n"
        "def test_three():\n"
        "    assert_matches_flax(len)\n"
        "class TestWrong(AttentionConformance):\n"
        "    target = staticmethod(wrong)\n"
        "    unsupported = ('bias', 'mask', 'dropout')\n"
        "class TestUnclear(AttentionConformance):\n"
        "    target = staticmethod(len)\n"
    )
    done = run_pytest("-k", "one or two or three or plain or claims", "-p", "no:randomly", cwd=tmp_path)
    assert done.returncode == 1
    assert not re.findall(r"^\S*anyattention_conformance/\S+\.py:\d+", done.stdout, re.MULTILINE)
    assert "__tracebackhide__" not in done.stdout
    assert "It does not divide the logits by the root of the depth." in done.stdout
    assert "did you mean 'bias'" in done.stdout
    assert done.stdout.count("pass --framework") >= 3


def test_differences_may_be_given_as_in_a_file(tmp_path):
    def flat(query, key, value, bias=None, mask=None):
        output = attention(query, key, value, bias, mask)
        return output if query.shape[-1] else output * np.float32("nan")

    entry = {"cases": ["depth-0"], "because": "the scale is 1 / 0"}
    with pytest.raises(AssertionError, match="nan instead of"):
        assert_matches_flax(flat, "numpy", only=["depth-0"])
    assert_matches_flax(flat, "numpy", only=["depth-0"], differs=[entry])
    assert_matches_flax(flat, "numpy", only=["depth-0"], differs=[Difference("so it is", ("depth-0",))])
    with pytest.raises(AssertionError, match="did not occur"):
        assert_matches_flax(attention, only=["depth-0"], differs=[entry])
    with pytest.raises(ValueError, match="did you mean 'depth"):
        assert_matches_flax(flat, "numpy", differs=[{"cases": ["dept-0"], "because": "x"}])


def test_a_corner_fails_where_all_count():
    with pytest.raises(AssertionError, match="does not conform to C3: ordinary calls conform; corners"):
        assert_matches_flax(zeros_for_hidden_rows, scope="all", unsupported=["dropout"])
    assert_matches_flax(zeros_for_hidden_rows, unsupported=["dropout"])


def zeros_for_hidden_rows(query, key, value, bias=None, mask=None):
    output = attention(query, key, value, bias, mask)
    if mask is None or 0 in output.shape:
        return output
    shape = (*output.shape[:-3], output.shape[-2], output.shape[-3], key.shape[-3])
    seen = np.broadcast_to(np.asarray(mask, bool), shape).any(axis=-1)
    return np.where(np.swapaxes(seen, -1, -2)[..., None], output, output.dtype.type(0))
