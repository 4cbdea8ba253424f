"""What a call costs beside the library's own operations: ``python benchmarks/overhead.py``.

Attention of 1x8x1x8 in float32, where the work is next to nothing, against the same operations written out by hand;
and fused attention of 1x64x1x8 on PyTorch against SDPA called directly, with and without the gradient. One thread.
"""

import timeit
from functools import partial

import numpy as np
import torch

from anyattention import dot_product_attention

ROUNDS, CALLS = 30, 500
QUERY, COTANGENT = (torch.randn(1, 64, 1, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


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


def sdpa(query, key, value, is_causal=False):
    four = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*four, is_causal=is_causal).transpose(1, 2)


def with_gradient(function):
    """The function, differentiated by its arrays."""

    def call(*arrays):
        return torch.autograd.grad(function(*arrays), arrays, COTANGENT)

    return call


def compare(name, ours, theirs, arrays):
    """Print what a call of ours costs more than theirs; they take turns, and the fastest counts."""
    times = {ours: [], theirs: []}
    for _ in range(ROUNDS):
        for function, seconds in times.items():
            seconds.append(timeit.timeit(lambda f=function: f(*arrays), number=CALLS) / CALLS)
    ours, theirs = (min(seconds) * 1e6 for seconds in times.values())
    print(f"{name:24} {ours:5.1f} us, by hand {theirs:5.1f} us, difference {ours - theirs:5.1f} us")


def main():
    """Print a line for each library, and for the way to PyTorch's own kernel."""
    torch.set_num_threads(1)
    x = np.random.default_rng(0).standard_normal((1, 8, 1, 8), dtype=np.float32)
    for by_hand, array in ((numpy_by_hand, x), (torch_by_hand, torch.tensor(x))):
        np.testing.assert_allclose(dot_product_attention(array, array, array), by_hand(array, array, array), atol=1e-6)
        compare(type(array).__module__, dot_product_attention, by_hand, [array] * 3)
    for causal in (False, True):
        fused = partial(dot_product_attention, is_causal=causal, implementation="fused")
        kernel, name = partial(sdpa, is_causal=causal), "causal" if causal else "plain"
        compare(f"torch, fused, {name}", fused, kernel, [QUERY.detach()] * 3)
        leaves = [QUERY.detach().clone().requires_grad_() for _ in range(3)]
        compare(f"torch, {name}, gradient", with_gradient(fused), with_gradient(kernel), leaves)


if __name__ == "__main__":
    main()
