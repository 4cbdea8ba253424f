"""JAX's threefry2x32 random numbers, bit for bit, in plain int32 array arithmetic.

The layout is JAX's partitionable one (its default since 0.5.0): the bits of an element depend on the key and on
the element's row-major flat index alone, a 64-bit count. So a tile of a mask can be drawn without the rest.

A key is two 32-bit words: ``uint32[2]`` in any library, or ``int64[2]`` in PyTorch, whose uint32 has no
arithmetic. Keys may be passed to `dot_product_attention` with arrays of any library, and raw uint32 keys to JAX.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), and JAX's documentation.
"""

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat

from anyattention._src import dtypes

Array = Any
Words = tuple[Array, Array]  # the high and the low one, int32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# dtype of the probability: how many of the bits drawn (32, 16 and 8) are shifted out, leaving its mantissa bits
_UNIFORM = {"float32": (9, 23), "float16": (6, 10), "bfloat16": (1, 7)}


def _int32(word: int) -> int:
    """The Python integer that int32 arithmetic uses for this word."""
    return (word + 2**31) % 2**32 - 2**31


def _rotate_left(x: Array, distance: int) -> Array:
    # `>>` copies the sign in, so the copies are masked away.
    return (x << distance) | ((x >> (32 - distance)) & (2**distance - 1))


def threefry2x32(key: Words, high: Array, low: Array) -> Words:
    """Twenty rounds of Threefry-2x32: int32 words in, two int32 words out, of the broadcast shape."""
    schedule = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = high + schedule[0], low + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x = x + y
            y = _rotate_left(y, rotation) ^ x
        x, y = x + schedule[(block + 1) % 3], y + schedule[(block + 2) % 3] + (block + 1)
    return x, y


def _key_words(key: Array, xp: Any) -> Words:
    """Both words of a raw key as int32[1]: one axis, since NumPy warns when a 0-d integer wraps around."""
    shape, name = tuple(key.shape), dtypes.name_of(key.dtype)
    if name.startswith("key<"):
        raise TypeError("a key of jax.random.key goes with functions of jax.random: pass jax.random.key_data(key) here")
    allowed = ("uint32", "int64") if xp.__name__.endswith("torch") else ("uint32",)
    if name not in allowed:
        raise TypeError(
            f"a dropout key must have dtype {' or '.join(allowed)}, got {name}: make one with "
            "anyattention.random.key(seed) or jax.random.key(seed)"
        )
    if shape[-1:] != (2,):
        raise TypeError(f"a dropout key must be two words, shape (2,), got shape {shape}")
    if len(shape) != 1:
        raise ValueError(f"one key is needed, got an array of keys of shape {shape[:-1]}: pass one of them")
    words = xp.astype(key, xp.int32)
    return words[:1], words[1:]


def device_of(x: Array) -> dict[str, Any]:
    """The `device` argument that creates an array beside `x`; none where arrays have none (MLX, Dask)."""
    return {"device": x.device} if hasattr(x, "device") else {}


def _arange(xp: Any, beside: dict[str, Any], start: int, stop: int) -> Array:
    return xp.arange(start, stop, dtype=xp.int32, **beside)


def _times(xp: Any, index: Array, factor: int) -> Words:
    """The 64-bit product of int32 indices >= 0 and an integer: shifts, added with carry."""
    zero = xp.zeros_like(index)
    total = zero, zero
    for bit in range(factor.bit_length()):
        if factor >> bit & 1:
            if bit == 0:
                part = zero, index
            elif bit < 32:
                part = index >> (32 - bit), index << bit
            else:
                part = index << (bit - 32), zero
            total = _add(total, part, xp)
    return total


def _add(a: Words, b: Words, xp: Any) -> Words:
    """64-bit sum; the low word carries where, unsigned, it is less than what went in."""
    low, sign = a[1] + b[1], _int32(2**31)
    carry = xp.astype((low ^ sign) < (a[1] ^ sign), xp.int32)
    return a[0] + b[0] + carry, low


def counts(
    xp: Any, key: Array, shape: Sequence[int], origin: Any = None, whole: Any = None, beside: Any = None
) -> tuple[Any, ...]:
    """What `keep_at` needs for every element of ``[lead..., rows, columns]``, in arrays that cut as its tiles do.

    The words of the key, the (high, low) count at the start of each row, high None if all are zero, and the column.
    Of a shard, `origin` is the position of its first element in the `whole`: of row and column, before which axes of
    `lead` may stand, of which it else has all. `beside` is the `device` argument that places the counts, by default
    with the key.
    """
    shape, beside = tuple(shape), device_of(key) if beside is None else beside
    origin, whole = tuple(origin or ()), tuple(whole or ())
    first = (0,) * (len(shape) - len(origin)) + origin
    whole = shape[: len(shape) - len(whole)] + whole
    size, ones = math.prod(whole), (1,) * len(shape)
    wide = not isinstance(size, int) or size > 2**32  # a symbol of jax.export may stand for as many
    # A position that is known at run time only is added to arrays that count from zero.
    *starts, (column, column_later) = ((x, 0) if isinstance(x, int) else (0, x) for x in first)
    words = tuple(xp.reshape(word, ones) for word in _key_words(key, xp))
    high = low = xp.reshape(_arange(xp, beside, 0, 1), ones)
    for axis, ((start, later), count) in enumerate(zip(starts, shape, strict=False)):
        if start == 0 and count == 1 and isinstance(later, int):
            continue
        stride = math.prod(whole[axis + 1 :])
        index = xp.reshape(_arange(xp, beside, start, start + count), (*ones[:axis], -1, *ones[axis + 1 :])) + later
        if wide:
            high, low = _add((high, low), _times(xp, index, stride), xp)
        else:
            low = low + (index if stride == 1 else index * _int32(stride))
    columns = xp.reshape(_arange(xp, beside, column, column + shape[-1]), (*ones[1:], shape[-1])) + column_later
    return *words, high if wide else None, low, columns


def keep_at(xp: Any, p: Any, counts: tuple[Any, ...]) -> Array:
    """`bernoulli` with probability `p` at some `counts`."""
    one, two, high, low, column = counts
    if high is None:
        high, low = low * 0, low + column
    else:
        high, low = _add((high, low), (column * 0, column), xp)
    x, y = threefry2x32((one, two), high, low)
    return _below(x ^ y, p)


def keep(xp: Any, key: Array, p: Any, shape: Sequence[int]) -> Array:
    """`bernoulli` for an array of this shape."""
    shape = tuple(shape)
    return xp.reshape(keep_at(xp, p, counts(xp, key, (1,) * (2 - len(shape)) + shape)), shape)


def _below(bits: Array, p: Any) -> Array:
    """True where the uniform number that JAX makes of these bits is below `p`.

    A uniform number is ``(bits >> shift) * 2**-mantissa``, so it is below p where ``bits >> shift`` is below
    ``ceil(p * 2**mantissa)``: a comparison in integers, with no rounding to differ in.
    """
    # JAX draws in the dtype of p. A Python float and a float64 are float32 there, unless x64 is on.
    name = dtypes.name_of(getattr(p, "dtype", "float32"))
    name = name if name in _UNIFORM else "float32"
    shift, mantissa = _UNIFORM[name]
    drawn = (bits >> shift) & (2**mantissa - 1)
    return drawn < math.ceil(dtypes.round_to(float(p), name) * 2**mantissa)


def key(seed: int) -> Array:
    """The key that ``jax.random.key(seed)`` holds with x64 off, as a NumPy ``uint32[2]``.

    Raises:
        TypeError: a seed that is not an integer.

    Examples:
        >>> key(12345).tolist(), key(-1).tolist()
        ([0, 12345], [0, 4294967295])
    """
    import array_api_compat.numpy as xp  # a key is data of the host; NumPy is the one library always there

    if not hasattr(seed, "__index__"):
        raise TypeError(f"a seed must be an integer, got {type(seed).__name__}")
    return xp.asarray([0, seed.__index__() % 2**32], dtype=xp.uint32)


def split(key: Array, num: int = 2) -> Array:
    """`num` new keys, ``[num, 2]``, of the library and dtype of `key`; equal to ``jax.random.split``.

    Examples:
        >>> split(key(0)).tolist()
        [[1797259609, 2579123966], [928981903, 3453687069]]
    """
    return _derived(key, 0, num)


def fold_in(key: Array, data: int) -> Array:
    """A new key from a key and a 32-bit unsigned integer; equal to ``jax.random.fold_in``.

    Raises:
        OverflowError: `data` outside [0, 2**32).

    Examples:
        >>> fold_in(key(0), 5).tolist()
        [1524306142, 1887795613]
    """
    if not hasattr(data, "__index__"):
        raise TypeError(f"data must be an integer, got {type(data).__name__}")
    if not 0 <= data < 2**32:
        raise OverflowError(f"data must be in [0, 2**32), got {data}")
    return _derived(key, data, 1)[0]


def _namespace(key: Any) -> Any:
    if not hasattr(key, "shape"):
        raise TypeError(
            f"a key must be an array, got {type(key).__name__}: make one with anyattention.random.key(seed)"
        )
    return array_api_compat.array_namespace(key)


def _derived(key: Array, first: int, num: int) -> Array:
    """The keys, ``[num, 2]``, that a key and 32-bit counts from the first make, in the unsigned words that it has."""
    xp = _namespace(key)
    counts = _arange(xp, device_of(key), 0, num) + _int32(first)
    words = xp.stack(threefry2x32(_key_words(key, xp), counts * 0, counts), axis=1)
    if dtypes.name_of(key.dtype) == "int64":
        return xp.astype(words, xp.int64) & 0xFFFFFFFF
    return xp.astype(words, key.dtype)


def bernoulli(key: Array, p: Any = 0.5, shape: Sequence[int] = ()) -> Array:
    """True with probability `p`: a bool array of `shape` and of the key's library; equal to ``jax.random.bernoulli``.

    The dtype of `p` counts, as in JAX: a Python float draws as float32, a ``numpy.float16`` as float16. The
    bits are those of JAX with x64 off.

    Examples:
        >>> bernoulli(key(0), 0.5, (3, 5))[0].tolist()
        [False, False, True, True, False]
    """
    if isinstance(shape, int):
        raise TypeError(f"shape must be a sequence of integers, such as ({shape},), got {shape}")
    return keep(_namespace(key), key, p, shape)
