"""Any conforming library works: the smoke set on array-api-strict, Dask and MLX, none of which has a backend."""

import importlib

import array_api_strict
import numpy as np
import pytest

import anyattention as aa
from anyattention.extend import Tiles
from anyattention_conformance import FORMS, flax_answer, flax_attention, truth, within_c2, within_c3


@pytest.fixture(params=["array_api_strict", "dask.array", "mlx.core"])
def xp(request):
    if request.param == "array_api_strict":
        with array_api_strict.ArrayAPIStrictFlags(
            boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
        ):
            yield array_api_strict
    else:
        yield importlib.import_module(request.param)


def put(xp, x):
    return xp.from_array(x) if xp.__name__ == "dask.array" else xp.array(x) if "mlx" in xp.__name__ else xp.asarray(x)


def put_all(xp, arguments):
    return {
        name: put(xp, x) if isinstance(x, np.ndarray) and name != "dropout_rng" else x for name, x in arguments.items()
    }


# A row without a finite logit is NaN, as in Flax; strict and Dask hand on the warning of the NumPy beneath them.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_matches_flax(xp, case):
    arguments = case.inputs()
    arrays = put_all(xp, arguments)
    actual = aa.dot_product_attention(**arrays)
    assert type(actual) is type(arrays["query"])
    assert not within_c2(np.asarray(actual), flax_attention(**arguments), arguments, "float32")


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_tiled_and_its_gradients(xp, case, monkeypatch):
    monkeypatch.setattr(Tiles, "sizes", lambda self, block, ruled: (16, 16) if case.id == "large-logits" else (2, 3))
    arguments = case.inputs()
    expected = flax_attention(**arguments)
    cotangent = np.random.default_rng(0).standard_normal(expected.shape, dtype=np.float32)
    flax, (exact, size) = flax_answer(arguments, cotangent), truth(arguments, "float32", cotangent)
    arrays = put_all(xp, arguments)
    output, pullback = aa.dot_product_attention_vjp(**arrays)
    assert type(output) is type(arrays["query"])
    assert not within_c3(np.asarray(output), flax.output, exact.output, size.output, "float32")
    for name, gradient in zip(("query", "key", "value", "bias"), pullback(put(xp, cotangent)), strict=True):
        if name in arguments:
            answers = (x.gradients[name] for x in (flax, exact, size))
            assert not within_c3(np.asarray(gradient), *answers, "float32"), name


def test_dask_stays_lazy():
    import dask
    import dask.array as da

    x = da.ones((2, 3, 2, 4), chunks=(1, 3, 1, 4))

    def refuse(*args, **kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        y = aa.dot_product_attention(x, x, x, is_causal=True, dropout_rng=aa.random.key(0), dropout_rate=0.1)
    assert isinstance(y, da.Array)
