"""The port and its mistake, by what the example prints."""

import re

import pytest

pytestmark = pytest.mark.needs("jax", "flax", "torch")

NAMES = {"query", "key", "value", "attention", "out"}
NAMES |= {f"gradient of {layer} {part}" for layer in NAMES - {"attention"} for part in ("kernel", "bias")}


def rows(text):
    """Names and results of the indented lines."""
    return dict(re.findall(r"^  (.+?)  +(.*)$", text, re.MULTILINE))


@pytest.mark.slow
def test_the_port_is_flax_and_the_mistake_is_named(printed):
    _, port, by_hand, kit, mended = re.split(r"^\d\. ", printed("port_to_torch"), flags=re.MULTILINE)
    assert set(rows(port)) == NAMES
    assert max(map(float, rows(port).values())) < 1e-6
    differs = {name for name, found in rows(by_hand).items() if found.endswith("differs")}
    assert differs == NAMES - {"query", "key", "value", "gradient of key bias"}
    assert "✗ It hides the keys where the mask is true." in kit
    assert "does not conform" in kit
    assert mended.strip().endswith("✓ mended has Flax's numbers in ordinary calls")
