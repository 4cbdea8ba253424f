"""The README's example and its commands."""

import re
from pathlib import Path

import numpy as np

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_gives_one_answer_on_three_libraries(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 10
    exec(code, {})
    kinds, sums = zip(*(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines()), strict=True)
    assert [re.search(r"'(\w+)", kind)[1] for kind in kinds] == ["numpy", "jaxlib", "torch"]
    np.testing.assert_allclose(np.asarray(sums, dtype=float), float(sums[0]), atol=1e-4)


def test_two_commands_and_no_more():
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()
    ]
    assert len(commands) == 2
    assert "examples/semantic_search.py" in commands[0]
    assert "pytest" in commands[1]
