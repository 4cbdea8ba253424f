"""Steps that several mutants take."""

import numpy as np

from anyattention_conformance.reference import Array, Call, DType, divided, rounded, visible, wide


def sees(call: Call, logits: Array) -> Array:
    """Whether each query sees any key, ``[..., q_length, 1]``."""
    return np.any(np.broadcast_to(visible(call.mask), logits.shape), axis=-1, keepdims=True)


def fits(x: Array, logits: Array) -> bool:
    """Whether it broadcasts with the logits."""
    return all(a == b or 1 in (a, b) for a, b in zip(np.shape(x)[::-1], logits.shape[::-1], strict=False))


def drops(call: Call) -> bool:
    """Whether there is dropout."""
    return not call.deterministic and call.dropout_rate > 0.0


def counts(shape: tuple[int, ...]) -> Array:
    """The low words of the counts of an array; the high ones are zero."""
    return np.arange(int(np.prod(shape)), dtype=np.uint32)


def below(bits: Array, call: Call) -> Array:
    """True where the number that JAX makes of these 32 bits is below the probability to be kept."""
    return (bits >> 9) * np.float32(2.0**-23) < np.float32(1.0 - call.dropout_rate)


def top(logits: Array) -> Array:
    """The largest logit of each row, in float64."""
    return np.max(wide(logits), axis=-1, keepdims=True, initial=-np.inf)


def powers(logits: Array) -> Array:
    """The exponentials of a row, as Flax rounds them."""
    return rounded(np.exp(wide(rounded(wide(logits) - top(logits), logits.dtype))), logits.dtype)


def normalised(powers: Array, dtype: DType) -> Array:
    """Weights of exponentials, as Flax rounds them."""
    powers = rounded(powers, dtype)
    return divided(powers, rounded(np.sum(wide(powers), axis=-1, keepdims=True), dtype))


def truncated(x: Array, dtype: DType) -> Array:
    """Rounded towards zero, if to bfloat16."""
    if dtype.name == "bfloat16":
        x = (rounded(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded(x, dtype)


def eleven_bits(x: Array) -> Array:
    """With the significand of float16; 16-bit numbers are what they were."""
    fraction, exponent = np.frexp(wide(x))
    return np.ldexp(np.rint(fraction * 2**11), exponent - 11)
