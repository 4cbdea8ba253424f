"""JAX's random bits in NumPy: threefry2x32 over 64-bit counts, as `jax.random.bernoulli` draws them by default."""

from typing import Any

import numpy as np

Array = Any
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def bernoulli(key: Array, probability: float, shape: tuple[int, ...]) -> Array:
    """True with this probability, bit for bit as ``jax.random.bernoulli(key, probability, shape)`` with x64 off.

    `key` is raw key data, uint32 ``[2]``. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    count: Array = np.arange(int(np.prod(shape)), dtype=np.uint64)
    bits = np.bitwise_xor(*threefry2x32(key, (count >> 32).astype(np.uint32), count.astype(np.uint32)))
    uniform = ((bits >> 9) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    return (uniform < np.float32(probability)).reshape(shape)


def threefry2x32(key: Array, high: Array, low: Array) -> tuple[Array, Array]:
    """Twenty rounds of Threefry-2x32 over the words of some counts: two random words for each."""
    first, second = (np.asarray([int(x)], dtype=np.uint32) for x in key)
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    x, y = high + keys[0], low + keys[1]
    for step in range(5):
        for rotation in ROTATIONS[step % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation)))
        x = x + keys[(step + 1) % 3]
        y = y + keys[(step + 2) % 3] + np.uint32(step + 1)
    return x, y
