"""The kernel regression: against its formula, and what it prints."""

import numpy as np
import pytest

pytestmark = pytest.mark.needs("jax", "torch", "array_api_strict", "dask", "matplotlib")


def test_attention_is_nadaraya_watsons_estimate(load):
    example = load("terrain")
    draw = np.random.default_rng(0)
    places, samples, heights = draw.normal(size=(7, 2)), draw.normal(size=(9, 2)), draw.normal(size=9)
    for bandwidth in (0.3, 2.0):
        distances = np.linalg.norm(places[:, None] - samples, axis=-1)
        weights = np.exp(-((distances / bandwidth) ** 2) / 2)
        expected = weights @ heights / weights.sum(axis=1)
        for library in example.LIBRARIES.values():
            with example.jax.enable_x64(True):
                given = [library.asarray(x) for x in (places, samples, heights)]
                actual = np.asarray(example.smooth(*given, bandwidth))
            np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.slow
def test_every_library_makes_the_same_map(printed):
    table, _, picture = printed("terrain").partition("\nthe truth")
    rows = {row[:18].strip(): row[18:].split() for row in table.splitlines()[3:]}
    *libraries, nearest, differences = rows.values()
    assert list(rows)[:5] == ["numpy", "torch", "jax", "array-api-strict", "dask"]
    kinds, bandwidths, _, errors, _, apart, _, slopes = zip(*libraries, strict=True)
    assert kinds == ("numpy.ndarray", "torch.Tensor", "jaxlib.ArrayImpl", "array_api_strict.Array", "dask.Array")
    assert len(set(bandwidths)) == len(set(errors)) == 1
    assert max(map(float, apart)) < 1e-9
    assert 0 < float(errors[0]) < 0.9 * float(nearest[-2])
    np.testing.assert_allclose([float(x) for x in slopes], float(differences[-1]), rtol=1e-5)
    assert len(picture.splitlines()) == 18
