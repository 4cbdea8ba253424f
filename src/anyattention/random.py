"""JAX's threefry2x32 random numbers, bit for bit, for every library.

A key is two 32-bit words: ``uint32[2]`` in any library, or ``int64[2]`` in PyTorch, whose uint32 has no arithmetic.
Keys may be passed to `dot_product_attention` with arrays of any library, and raw uint32 keys to JAX.
"""

from anyattention._src.threefry import bernoulli, fold_in, key, split

__all__ = ["bernoulli", "fold_in", "key", "split"]
