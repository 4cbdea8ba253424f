"""Any conforming library works: the smoke set on array-api-strict, Dask and MLX, none of which has a backend."""

import importlib

import array_api_strict
import numpy as np
import pytest

import anyattention as aa
from anyattention_conformance import SMOKE, flax_attention, within_c2

# What a library cannot do, by the ids of the cases.
LACKING = {
    "array_api_strict": {},
    "dask.array": {"q-length-0": "Dask has no maximum of an array without elements"},
    "mlx.core": {},
}


@pytest.fixture(params=list(LACKING))
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


# A row without a finite logit is NaN, as in Flax; strict and Dask hand on the warning of the NumPy beneath them.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.id)
def test_matches_flax(xp, case):
    if case.id in LACKING[xp.__name__]:
        pytest.skip(LACKING[xp.__name__][case.id])
    arguments = case.inputs()
    arrays = {
        name: put(xp, x) if isinstance(x, np.ndarray) and name != "dropout_rng" else x for name, x in arguments.items()
    }
    actual = aa.dot_product_attention(**arrays)
    assert type(actual) is type(arrays["query"])
    assert not within_c2(np.asarray(actual), flax_attention(**arguments), arguments, "float32")


def test_dask_stays_lazy():
    import dask
    import dask.array as da

    x = da.ones((2, 3, 2, 4), chunks=(1, 3, 1, 4))

    def refuse(*args, **kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        y = aa.dot_product_attention(x, x, x, is_causal=True, dropout_rng=aa.random.key(0), dropout_rate=0.1)
    assert isinstance(y, da.Array)
