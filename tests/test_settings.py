"""Defaults from a context manager and from the environment."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import anyattention as aa

X = np.zeros((2, 1, 4), np.float32)


def implementation(**options):
    return aa.explain(X, X, X, **options).implementation


def test_config():
    with aa.config(implementation="tiled"):
        assert implementation() == "tiled"
        assert implementation(implementation="exact") == "exact"
        with aa.config(engines=["sdpa"]):
            assert implementation() == "tiled"
        with aa.config(implementation="exact"):
            assert implementation() == "exact"
    assert implementation() == "exact"


def test_config_is_of_one_thread_and_ends_with_an_error():
    seen = []

    def call():
        thread = threading.Thread(target=lambda: seen.append(implementation()))
        thread.start()
        thread.join()
        seen.append(implementation())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), aa.config(implementation="tiled"):
        call()
    assert (*seen, implementation()) == ("exact", "tiled", "exact")


def test_as_if_asked_for_by_name():
    """It runs or raises."""
    with aa.config(implementation="fused"), pytest.raises(NotImplementedError, match="no engine for numpy"):
        aa.dot_product_attention(X, X, X)
    with aa.config(implementation="tiled"), pytest.raises(NotImplementedError, match="module"):
        aa.dot_product_attention(X, X, X, module=object())
    with aa.config(implementation="tiled"):
        assert aa.dot_product_attention_weights(X, X).shape == (1, 2, 2)


def test_engines():
    torch = pytest.importorskip("torch")
    x = torch.zeros(1, 300, 1, 8)
    assert aa.explain(x, x, x).engine == "sdpa"
    for engines in (["-sdpa"], [], ["cudnn"]):
        with aa.config(engines=engines):
            plan = aa.explain(x, x, x)
            assert (plan.implementation, plan.engine) == ("exact", None)
            assert "sdpa: it is switched off" in str(plan)
            with pytest.raises(NotImplementedError, match="sdpa: it is switched off"):
                aa.dot_product_attention(x, x, x, implementation="fused")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"implementation": "flash"}, ValueError, "unknown: pass None or one of exact, tiled, fused"),
        ({"engines": ["cudn"]}, ValueError, "no engine 'cudn': pass some of cudnn, tokamax"),
        ({"engines": ["cudnn", "-sdpa"]}, ValueError, "mixes names with and without"),
        ({"engines": "cudnn"}, TypeError, "pass several names"),
    ],
    ids=["implementation", "engine", "both", "string"],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message), aa.config(**options):
        pass


@pytest.mark.parametrize(
    ("variables", "output"),
    [
        ({"ANYATTENTION_IMPLEMENTATION": "tiled"}, "tiled None"),
        ({"ANYATTENTION_ENGINES": "sdpa, cudnn"}, "exact ('sdpa', 'cudnn')"),
        ({"ANYATTENTION_ENGINES": "-sdpa,-flex"}, "exact ('cudnn', 'tokamax', 'splash', 'mlx', 'onnx')"),
        ({"ANYATTENTION_IMPLEMENTATION": "flash"}, "ANYATTENTION_ENGINES: implementation='flash' is unknown"),
        ({"ANYATTENTION_ENGINES": "flash"}, "there is no engine 'flash'"),
    ],
    ids=str,
)
def test_environment(variables, output):
    program = (
        "import numpy as np, anyattention as aa; from anyattention._src import settings; x = np.zeros((2, 1, 4));"
        "print(aa.explain(x, x, x).implementation, settings.current().engines)"
    )
    environment = {name: x for name, x in os.environ.items() if not name.startswith("ANYATTENTION_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | variables, capture_output=True, text=True, timeout=100
    )
    assert output in done.stdout + done.stderr
    assert done.returncode == (1 if "flash" in variables.values() else 0)
