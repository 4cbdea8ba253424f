"""Type checkers find a user's mistakes by the public types, and find none in ordinary calls."""

import doctest
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

import anyattention as aa

README = Path(__file__).parents[1] / "README.md"

USER = """
from collections.abc import Callable
from functools import partial
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from numpy.typing import NDArray

import anyattention as aa
from anyattention import config, dot_product_attention, dot_product_attention_weights, explain
from anyattention.masks import CausalMask, LengthMask, LocalMask, Mask, SegmentMask

Floats = NDArray[np.float32]


def what_comes_in_comes_out(n: Floats, j: jax.Array, t: torch.Tensor) -> None:
    assert_type(dot_product_attention(n, n, n), Floats)
    assert_type(dot_product_attention(j, j, j), jax.Array)
    assert_type(dot_product_attention(t, t, t), torch.Tensor)
    assert_type(dot_product_attention_weights(n, n), Floats)
    assert_type(dot_product_attention_weights(j, j, is_causal=True), jax.Array)
    assert_type(dot_product_attention_weights(t, t, implementation="exact"), torch.Tensor)
    jax.jit(dot_product_attention)(j, j, j), torch.compile(dot_product_attention)(t, t, t)
    jax.grad(lambda x: dot_product_attention(x, j, j).sum())(j)
    _: str = dot_product_attention_weights(n, n)  # error
    of_numpy: int = dot_product_attention(n, n, n)  # error
    of_jax: int = dot_product_attention(j, j, j)  # error
    of_torch: int = dot_product_attention(t, t, t)  # error
    other: jax.Array = dot_product_attention(t, t, t)  # error
    dot_product_attention([1.0], [1.0], [1.0])  # error
    dot_product_attention(j, j)  # error
    dot_product_attention(None, t, t)  # error


def numpy_beside_jax(n: Floats, j: jax.Array) -> None:
    print(dot_product_attention(n, j, j).shape, dot_product_attention(j, n, n, qk_attn_weights_einsum=jnp.einsum).dtype)
    print(jnp.asarray(dot_product_attention(n, j, j)).sum())  # mypy knows no more of a mixed call than shape and dtype
    _: int = dot_product_attention(n, j, j)  # error


def names(t: torch.Tensor) -> None:
    dot_product_attention(t, t, t, implementation="fused", dropout_rate=0.0, dtype=torch.float32, precision="highest")
    dot_product_attention(t, t, t, implementation="flash")  # error
    dot_product_attention_weights(t, t, implementation="flash")  # error
    explain(t, t, t, implementation="flash")  # error
    dot_product_attention(t, t, t, is_casual=True)  # error
    dot_product_attention_weights(t, t, biass=None)  # error
    aa.dot_product_attention_vjp(t, t, t, implementation="tiled")  # error
    explain(t, t, t, maks=None)  # error
    dot_product_attention(t, t, t, dropout_rate="0.1")  # error
    dot_product_attention(t, t, t, dropout_rng=0, dropout_rate=0.1)  # error


def settings() -> None:
    with config(implementation="tiled"), config(engines=["-cudnn"]), config("fused", ("sdpa", "flex")), config(None):
        pass
    with config(implementation="flash"):  # error
        pass
    with config(engines="cudnn"):  # error
        pass
    with config(engine=["cudnn"]):  # error
        pass
    aa.integrations.huggingface.register()
    aa.integrations.huggingface.register("mine", implementation="tiled")
    aa.integrations.huggingface.register("mine", implementation="flash")  # error


def masks_and_bias(n: Floats, j: jax.Array, t: torch.Tensor, parameter: nnx.Param[jax.Array]) -> None:
    lengths = torch.tensor([3])
    assert_type(CausalMask() & LengthMask(lengths) & t, Mask)
    for mask in (CausalMask(1), LocalMask(2, 0) | ~SegmentMask(lengths, lengths), LengthMask([3]) & n):
        dot_product_attention(t, t, t, mask=mask)
    dot_product_attention(t, t, t, mask=t & CausalMask())
    for dense in (n, t, np.tri(3), aa.make_causal_mask(n), True, None):
        dot_product_attention(t, t, t, dense, dense)
    dot_product_attention(j, j, j, bias=parameter, mask=n > 0)
    dot_product_attention(j, j, j, bias=-1.5, mask=aa.combine_masks(n, None), dropout_rng=aa.random.key(0))
    dot_product_attention(j, j, j, dropout_rng=jax.random.key(0), dropout_rate=0.5, broadcast_dropout=False)
    dot_product_attention(t, t, t, mask="causal")  # error
    dot_product_attention(t, t, t, bias=CausalMask())  # error
    dot_product_attention(t, t, t, bias=[[1.0]])  # error
    print(CausalMask() & None)  # error
    print(CausalMask() | "local")  # error
    print(LocalMask(2))  # error
    print(CausalMask(offsets=1))  # error


def einsums(j: jax.Array, t: torch.Tensor) -> None:
    assert_type(dot_product_attention(t, t, t, qk_attn_weights_einsum=torch.einsum), torch.Tensor)
    exact = partial(jnp.einsum, precision="highest")
    dot_product_attention(j, j, j, qk_attn_weights_einsum=exact, attn_weights_value_einsum=jnp.einsum)
    dot_product_attention(j, j, j, einsum_dot_general=jax.lax.dot_general)
    dot_product_attention_weights(j, j, einsum=lambda spec, query, key: jnp.einsum(spec, query, key))
    dot_product_attention_weights(j, j, einsum="bqhd,bkhd->bhqk")  # error


def gradients(n: Floats, t: torch.Tensor) -> None:
    output, pullback = aa.dot_product_attention_vjp(n, n, n, is_causal=True)
    assert_type(output, Floats)
    by_query, _, by_value, _ = pullback(output)
    assert_type(by_query, Floats), assert_type(by_value, Floats)
    pullback(t)  # error
    print(aa.dot_product_attention_vjp(t, t, t).shape)  # error


def plans(j: jax.Array, t: torch.Tensor) -> None:
    assert_type(explain(t, t, t).engine, str | None)
    shape = jax.ShapeDtypeStruct((1, 2, 3, 4), jnp.float32)
    print(explain(shape, shape, shape, mask=CausalMask()).reasons, explain(shape, j, j, bias=shape), aa.RULES)
    print(explain(t, t, t).engines)  # error
    print(explain(t, t, t).implementation == "tiled")
    print(explain(t, t, t).implementation == "flash")  # error


def modules() -> None:
    linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=dot_product_attention)
    linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=partial(dot_product_attention, implementation="tiled"))
    nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), attention_fn=dot_product_attention)
    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = dot_product_attention
    number: Callable[[jax.Array, jax.Array, jax.Array], int] = dot_product_attention  # error
"""


def examples():
    """The README's first example and those of all public docstrings, each as a function of a user's file."""
    yield re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    parser = doctest.DocTestFinder(exclude_empty=True)
    for module in (aa, aa.masks, aa.random, aa.extend):
        for public in (getattr(module, name) for name in module.__all__):
            if inspect.isroutine(public) or inspect.isclass(public):
                found = parser.find(public, module=False, globs={})
                yield from ("".join(example.source for example in test.examples) for test in found if test.examples)


def mypy(folder):
    """Lines with an error, by file and number, as strict mypy tells them in another process."""
    # jax.ShapeDtypeStruct has no annotations, which strict mypy would hold against whoever makes one.
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\nuntyped_calls_exclude = jax\n")
    command = ["--config-file=mypy.ini", "--cache-dir=cache", "--no-error-summary", "--hide-error-context"]
    done = run(folder, "mypy", *command, "user.py", "examples.py")
    for file, line, message in re.findall(r"^(\w+\.py):(\d+): error: (.*)$", done.stdout, flags=re.MULTILINE):
        yield (file, int(line)), message


def pyright(folder):
    """The same as Pyright tells them."""
    settings = {"typeCheckingMode": "standard", "reportUnnecessaryComparison": "error"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    done = run(folder, "pyright", "--outputjson", "--pythonpath", sys.executable, "user.py", "examples.py")
    for found in json.loads(done.stdout)["generalDiagnostics"]:
        if found["severity"] == "error":
            yield (Path(found["file"]).name, found["range"]["start"]["line"] + 1), found["message"]


def run(folder, checker, *arguments):
    """A type checker that has found something, and has not failed itself."""
    command = [sys.executable, "-m", checker, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda checker: checker.__name__)
def test_a_user_is_told(checker, tmp_path):
    every = list(dict.fromkeys(examples()))
    assert len(every) > 10
    lines = ["from anyattention import *", "from anyattention.masks import *", "from anyattention.random import *"]
    lines += ["from anyattention.biases import Alibi"]  # not all, since both have a Rule
    lines += [f"def example_{i}() -> None:\n{indent(source, '    ')}" for i, source in enumerate(every)]
    (tmp_path / "examples.py").write_text("\n".join(lines))
    (tmp_path / "user.py").write_text(USER)
    expected = {("user.py", i) for i, line in enumerate(USER.split("\n"), 1) if line.endswith("# error")}
    assert len(expected) > 30
    found = dict(checker(tmp_path))
    assert {place: message for place, message in found.items() if place not in expected} == {}
    assert expected - set(found) == set()
