"""The model in training, by what it prints."""

import re

import pytest

pytestmark = pytest.mark.needs("jax", "flax")


@pytest.mark.slow
def test_one_argument_swaps_attention_and_memory_falls(printed):
    text = printed("train_flax")
    assert re.search(r"^implementation +tiled$", text, re.MULTILINE)
    memory, losses, apart = {}, {}, {}
    for name, mebibytes, found in re.findall(r"^(Flax|ours|ours, exact) +([\d.]+) MiB +(.*)$", text, re.MULTILINE):
        *losses[name], apart[name] = (float(x) for x in found.split())
        memory[name] = float(mebibytes)
    assert memory["ours, exact"] == pytest.approx(memory["Flax"], rel=0.01)
    assert memory["ours"] < memory["Flax"] / 5
    assert losses["Flax"][-1] < losses["Flax"][0] - 1.5
    assert apart["ours, exact"] == 0
    assert 0 < apart["ours"] < 1e-4
