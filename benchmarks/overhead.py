"""What a call costs beside the library's own operations: ``python benchmarks/overhead.py``.

Attention of 1x8x1x8 in float32, where the work is next to nothing, against the same operations written out by hand;
ours and theirs take turns, and the fastest of many runs counts.
"""

import timeit

import numpy as np
import torch

from anyattention import dot_product_attention

ROUNDS, CALLS = 30, 500


def numpy_by_hand(query, key, value):
    query = query / np.float32(8**0.5)
    logits = query.swapaxes(1, 2) @ key.transpose(0, 2, 3, 1)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights @ value.swapaxes(1, 2)).swapaxes(1, 2)


def torch_by_hand(query, key, value):
    query = query / 8**0.5
    logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
    return (torch.softmax(logits, dim=-1) @ value.transpose(1, 2)).transpose(1, 2)


def main():
    """Print a line for each library."""
    torch.set_num_threads(1)
    x = np.random.default_rng(0).standard_normal((1, 8, 1, 8), dtype=np.float32)
    for by_hand, array in ((numpy_by_hand, x), (torch_by_hand, torch.tensor(x))):
        np.testing.assert_allclose(dot_product_attention(array, array, array), by_hand(array, array, array), atol=1e-6)
        times = {function: [] for function in (dot_product_attention, by_hand)}
        for _ in range(ROUNDS):
            for function, seconds in times.items():
                seconds.append(timeit.timeit(lambda f=function, a=array: f(a, a, a), number=CALLS) / CALLS)
        ours, theirs = (min(seconds) * 1e6 for seconds in times.values())
        name = type(array).__module__
        print(f"{name:6} {ours:5.1f} us, by hand {theirs:5.1f} us, difference {ours - theirs:5.1f} us")


if __name__ == "__main__":
    main()
