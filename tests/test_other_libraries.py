"""Any conforming library works: the smoke set on array-api-strict, Dask and MLX, whose backend has a kernel alone."""

import importlib

import array_api_strict
import numpy as np
import pytest

import anyattention as aa
from anyattention.biases import Alibi, Relative, Rule
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


# A row without a finite logit is NaN, as in Flax; Dask hands on the warning of NumPy, which computes later.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:dask")
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_matches_flax(xp, case):
    arguments = case.inputs()
    arrays = put_all(xp, arguments)
    actual = aa.dot_product_attention(**arrays)
    assert type(actual) is type(arrays["query"])
    assert not within_c2(np.asarray(actual), flax_attention(**arguments), arguments, "float32")


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning:dask")
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


# --- array-api-strict: devices, dtypes that it does not promote, and arrays that change in place ---

X = np.random.default_rng(0).standard_normal((2, 7, 2, 4), dtype=np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_that_the_library_lacks(dtype):
    x = array_api_strict.asarray(X)
    with pytest.raises(TypeError, match=f"dtype='{dtype}': array_api_strict has no dtype {dtype}; 'float32' is one"):
        aa.dot_product_attention(x, x, x, dtype=dtype)


OTHER, NARROW = (array_api_strict.Device(name) for name in ("device1", "no_float64"))
tiled_and_exact = pytest.mark.parametrize("implementation", ["exact", "tiled"])


def back(x):
    return np.asarray(x.to_device(array_api_strict.Device("CPU_DEVICE")))


@tiled_and_exact
@pytest.mark.parametrize("key", ["guest", "on the default device", "beside the query"])
def test_dropout_beside_another_device(implementation, key):
    x, words = array_api_strict.asarray(X, device=OTHER), aa.random.key(3)
    if key != "guest":
        words = array_api_strict.asarray(words, device=OTHER if "query" in key else None)
    options = {"dropout_rng": words, "dropout_rate": 0.5, "implementation": implementation}
    expected = aa.dot_product_attention(X, X, X, **options | {"dropout_rng": aa.random.key(3)})
    actual = aa.dot_product_attention(x, x, x, **options)
    assert actual.device == OTHER
    np.testing.assert_allclose(back(actual), expected, atol=1e-6)
    del options["implementation"]
    output, pullback = aa.dot_product_attention_vjp(x, x, x, **options)
    np.testing.assert_allclose(back(output), expected, atol=1e-6)
    assert all(gradient.device == OTHER for gradient in pullback(output)[:3])
    weights = aa.dot_product_attention_weights(x, x, **options)
    expected = aa.dot_product_attention_weights(X, X, **options | {"dropout_rng": aa.random.key(3)})
    np.testing.assert_allclose(back(weights), expected, atol=1e-6)


@tiled_and_exact
def test_scalars_on_another_device(implementation):
    """As in PyTorch they go where they are needed; arrays do not."""
    x, scalar = array_api_strict.asarray(X, device=OTHER), array_api_strict.asarray
    for options in ({"bias": 0.5}, {"mask": True}, {"mask": aa.masks.LengthMask(5)}):
        here = {name: aa.masks.LengthMask(scalar(5)) if name == "mask" and y is not True else scalar(y)
                for name, y in options.items()}  # fmt: skip
        actual = aa.dot_product_attention(x, x, x, **here, implementation=implementation)
        np.testing.assert_allclose(back(actual), aa.dot_product_attention(X, X, X, **options), atol=1e-6)


@tiled_and_exact
def test_guests_on_a_device_without_float64(implementation):
    """Masks keep their truth, even of numbers that float32 has not; biases and scalars become float32."""
    x, mask = array_api_strict.asarray(X, device=NARROW), np.tri(7) * 1e-300
    for options in ({"mask": mask}, {"mask": aa.masks.CausalMask() | mask}, {"bias": np.eye(7)}):
        actual = aa.dot_product_attention(x, x, x, **options, implementation=implementation)
        np.testing.assert_allclose(back(actual), aa.dot_product_attention(X, X, X, **options), atol=1e-6)
    for bias in (0.5, np.float64(0.5), np.array(0.5)):
        aa.dot_product_attention(x, x, x, bias=bias, implementation=implementation)
    with np.errstate(all="raise"):
        aa.dot_product_attention(x, x, x, bias=np.full((7, 7), 1e300), implementation=implementation)


@tiled_and_exact
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int64"])
def test_lengths_and_ids_of_every_dtype(dtype, implementation):
    x, put, largest = array_api_strict.asarray(X), array_api_strict.asarray, np.iinfo(dtype).max
    lengths = np.array([3, largest], dtype)
    ids = np.where(np.arange(7) > 3, np.array(largest, dtype), np.array(0, dtype))
    for make in (put, np.asarray):
        for mask, dense in (
            (aa.masks.LengthMask(make(lengths)), np.arange(7) < lengths[:, None, None, None]),
            (aa.masks.SegmentMask(make(ids), make(np.where(ids > 0, 0, 5))), (ids[:, None] == 0) & (ids > 0)),
        ):
            actual = aa.dot_product_attention(x, x, x, mask=mask, implementation=implementation)
            np.testing.assert_allclose(np.asarray(actual), aa.dot_product_attention(X, X, X, mask=dense), atol=1e-6)


@tiled_and_exact
def test_numpy_beneath_raises_of_nothing(implementation):
    x = array_api_strict.asarray(np.where(X > 1, 1e-50, X.astype(np.float64) * 1e300))
    low = array_api_strict.asarray(np.full((7, 7), -np.inf))
    with np.errstate(all="raise"):
        aa.dot_product_attention(x, x, x, bias=low, dtype="float32", implementation=implementation)
        output, pullback = aa.dot_product_attention_vjp(x, x, x, bias=low, dtype="float32")
        pullback(output)
        aa.make_attention_mask(x[0, :, 0, 0], x[0, :, 0, 0], dtype="float32")


def test_a_pullback_keeps_what_it_needs():
    seen = []
    for write in (False, True):
        x, bias, lengths = (array_api_strict.asarray(y.copy()) for y in (X, np.eye(7), np.array([3, 5])))
        output, pullback = aa.dot_product_attention_vjp(x, x, x, bias=bias, mask=aa.masks.LengthMask(lengths))
        if write:
            for y in (output, x, bias, lengths):
                y[...] = array_api_strict.ones_like(y)
        seen.append(pullback(array_api_strict.asarray(X)))
    for actual, expected in zip(*seen, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize("implementation", ["exact", "tiled"])
def test_biases_by_rule(xp, implementation, monkeypatch):
    """As NumPy has them, which are held to float64, in tiles of other sizes."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, n, 4, 8), dtype=np.float32) for n in (7, 11, 11))
    slopes, table = np.float32([0.5, 0.2, -0.1, 0.0]), random.standard_normal((8, 4), dtype=np.float32)
    times = random.standard_normal((2, 11), dtype=np.float32)

    def bias(put):
        rule = Rule(lambda i, j, t: 0.1 * t, key_arrays=(put(times),))
        return Alibi(put(slopes), offset=put(np.array([2, 5]))) + Relative(put(table), max_distance=8) + rule

    right, pullback = aa.dot_product_attention_vjp(q, k, v, bias=bias(np.asarray))
    *_, gradients = pullback(right)
    monkeypatch.setattr(Tiles, "sizes", lambda self, block, ruled: (2, 3))
    arrays = [put(xp, x) for x in (q, k, v)]
    found = aa.dot_product_attention(*arrays, bias=bias(lambda x: put(xp, x)), implementation=implementation)
    np.testing.assert_allclose(np.asarray(found), right, atol=2e-6)
    if implementation == "tiled":
        output, pullback = aa.dot_product_attention_vjp(*arrays, bias=bias(lambda x: put(xp, x)))
        for ours, theirs in zip(pullback(output)[3], gradients, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-5)
