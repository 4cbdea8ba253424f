"""What is measured: calls with the shapes of real models, and who makes them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One call: ``[batch, q_length, heads, depth]`` queries over ``kv_length`` keys."""

    name: str
    batch: int
    q_length: int
    heads: int
    depth: int
    kv_length: int = 0  # 0: as many as queries
    kind: str = "full"  # full, causal, padding, dropout
    dtype: str = "float32"
    gradient: bool = False

    @property
    def keys(self) -> int:
        return self.kv_length or self.q_length

    @property
    def flops(self) -> int:
        """Of the products, all pairs counted."""
        pairs = self.batch * self.heads * self.q_length * self.keys
        return pairs * self.depth * 2 * (7 if self.gradient else 2)


CASES = (
    Case("prefill 4096", 1, 4096, 8, 64),
    Case("prefill 4096, causal", 1, 4096, 8, 64, kind="causal"),
    Case("prefill 2048, depth 128", 1, 2048, 8, 128),
    Case("batch of 512", 8, 512, 8, 64),
    Case("batch of 512, padded", 8, 512, 8, 64, kind="padding"),
    Case("bfloat16 1024", 2, 1024, 8, 64, dtype="bfloat16"),
    Case("dropout 1024", 2, 1024, 8, 64, kind="dropout"),
    Case("decode over 4096", 16, 1, 8, 64, kv_length=4096),
    Case("training 4096", 1, 4096, 4, 64, gradient=True),
    *(Case(f"length {length}", 1, length, 8, 64) for length in (256, 512, 1024, 2048, 4096, 8192)),
)

#: name: (framework, what it calls). Ours come first of each framework.
CONTESTANTS = {
    "anyattention, NumPy": ("numpy", "ours"),
    "np.einsum": ("numpy", "einsum"),
    "anyattention, JAX": ("jax", "ours"),
    "flax.linen": ("jax", "flax"),
    "jax.nn": ("jax", "jax.nn"),
    "anyattention, PyTorch": ("torch", "ours"),
    "torch SDPA": ("torch", "sdpa"),
}
