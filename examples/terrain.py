"""Kernel regression written once: spot heights become a map, on NumPy, PyTorch, JAX, array-api-strict and Dask.

    pip install -e ".[jax,torch,strict,dask]" matplotlib
    python examples/terrain.py

The Nadaraya-Watson estimate of a height is the mean of all spot heights, each weighted by a Gaussian of its distance.
These weights are a softmax, so the estimate is attention from places to samples. The terrain is real: the elevation
model of the Jacksboro fault in Tennessee, which matplotlib ships. The estimator sees 1000 of its 138632 heights.
"""

import array_api_strict
import dask.array
import jax
import numpy as np
import torch
from array_api_compat import array_namespace
from matplotlib.cbook import get_sample_data
from scipy.optimize import brentq

from anyattention import dot_product_attention, dot_product_attention_vjp

LIBRARIES = {"numpy": np, "torch": torch, "jax": jax.numpy, "array-api-strict": array_api_strict, "dask": dask.array}


def as_attention(places, samples, heights, bandwidth):
    """Query, key, value and bias. For each place, exp(-|p - s|² / 2) is proportional to exp(p·s - |s|² / 2)."""
    xp = array_namespace(places, samples, heights)
    query = places[:, None, :] * (2**0.5 / bandwidth)  # attention divides by the square root of the depth, which is 2
    key = samples[:, None, :] / bandwidth
    bias = xp.sum(key * key, axis=-1) / -2
    return query, key, heights[:, None, None], xp.permute_dims(bias, (1, 0))[:, None, :]


def smooth(places, samples, heights, bandwidth):
    """Heights at `places` [n, 2] from `heights` [m] of `samples` [m, 2]: any array in, the same kind of array out."""
    query, key, value, bias = as_attention(places, samples, heights, bandwidth)
    return dot_product_attention(query, key, value, bias)[:, 0, 0]


def left_out(samples, heights, bandwidth):
    """Mean squared error of each sample's height estimated from all others, and its derivative by log(bandwidth)."""
    xp = array_namespace(samples, heights)
    query, key, value, bias = as_attention(samples, samples, heights, bandwidth)
    others = ~np.eye(heights.shape[0], dtype=bool)
    output, pullback = dot_product_attention_vjp(query, key, value, bias, mask=others)
    error = output - value
    dquery, dkey, _, dbias = pullback(2 * error / heights.shape[0])
    slope = xp.sum(dquery * query) + xp.sum(dkey * key) + 2 * xp.sum(dbias * bias)
    return float(xp.mean(error * error)), -float(slope)


def rms(error):
    """The root of the mean square."""
    return np.sqrt(np.mean(error**2))


def picture(heights, shape):
    """Lines of text, darker where it is higher."""
    shades = np.array(list(" .:-=+*#%@"))[np.clip(heights / 100 - 2, 0, 9).astype(int)]
    return ["".join(line) for line in shades.reshape(shape)]


def main():
    """Learn the bandwidth, make the map and compare it with the truth, on each library."""
    jax.config.update("jax_enable_x64", True)
    elevation = get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype(np.float64)
    kilometres = np.stack(np.indices(elevation.shape), axis=-1) * [0.0925, 0.0745] - [16, 15]
    samples = np.random.default_rng(0).permutation(elevation.size)[:1000]
    given = kilometres.reshape(-1, 2)[samples], elevation.reshape(-1)[samples]
    grid = elevation[10::20, 5::9]
    places, truth = kilometres[10::20, 5::9].reshape(-1, 2), grid.reshape(-1)

    print(f"From {given[1].size} spot heights to a map of {truth.size} other places\n")
    titles = f"{'bandwidth':>9}{'rms error':>12}{'from NumPy':>13}{'slope at 1 km':>16}"
    print(f"{'library':<18}{'type of the map':<24}{titles}")
    maps = []
    for name, library in LIBRARIES.items():
        arrays = [library.asarray(x) for x in given]
        bandwidth = brentq(lambda h, arrays=arrays: left_out(*arrays, h)[1], 0.2, 2, xtol=1e-6)
        result = smooth(library.asarray(places), *arrays, bandwidth)
        kind = f"{type(result).__module__.partition('.')[0]}.{type(result).__name__}"
        maps.append(np.asarray(result))
        error, apart = rms(maps[-1] - truth), np.max(np.abs(maps[-1] - maps[0]))
        slope = left_out(*arrays, 1.0)[1]
        print(f"{name:<18}{kind:<24}{bandwidth:>6.3f} km{error:>10.2f} m{apart:>11.0e} m{slope:>16.2f}")

    nearest = given[1][np.argmin(np.linalg.norm(places[:, None] - given[0], axis=-1), axis=1)]
    above, below = (left_out(*given, h)[0] for h in (1.001, 1 / 1.001))
    print(f"{'for comparison: the nearest spot height':<51}{rms(nearest - truth):>10.2f} m")
    print(f"{'for comparison: central differences':<75}{(above - below) / (2 * np.log(1.001)):>15.2f}")
    print(f"\n{'the truth':<{grid.shape[1]}}   the map")
    for rows in zip(picture(truth, grid.shape), picture(maps[0], grid.shape), strict=True):
        print("   ".join(rows))


if __name__ == "__main__":
    main()
