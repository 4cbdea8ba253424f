"""The model in training, by what it prints."""

import re

import pytest

pytestmark = pytest.mark.needs("jax", "flax")


@pytest.mark.slow
def test_one_argument_swaps_attention_and_memory_falls(printed):
    text = printed("train_flax")
    assert re.search(r"^implementation +tiled$", text, re.MULTILINE)
    row = r"^(Flax|ours|ours, exact) +([\d.]+) MiB +\d+ ms +(.*)$"
    memory, losses = {}, {}
    for name, mebibytes, found in re.findall(row, text, re.MULTILINE):
        memory[name], losses[name] = float(mebibytes), [float(x) for x in found.split()]
    assert memory["ours, exact"] == pytest.approx(memory["Flax"], rel=0.01)
    assert memory["ours"] < memory["Flax"] / 5
    assert losses["Flax"][-1] < losses["Flax"][0] - 1.5
    apart = dict(re.findall(r"^(.*): losses differ from Flax's by at most (.*)$", text, re.MULTILINE))
    assert float(apart["ours"]) < 1e-4
    assert float(apart["ours, exact"]) == 0
