"""What is measured: calls with the shapes of real models, and who makes them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One call: ``[batch, q_length, heads, depth]`` queries over ``kv_length`` keys of ``kv_heads``."""

    name: str
    batch: int
    q_length: int
    heads: int
    depth: int
    kv_length: int = 0  # 0: as many as queries
    kv_heads: int = 0  # 0: as many as of queries
    kind: str = "full"  # full, causal, padding, dropout; or the name of a model
    dtype: str = "float32"
    gradient: bool = False

    @property
    def keys(self) -> int:
        return self.kv_length or self.q_length

    @property
    def of_model(self) -> bool:
        """Whether it is an attention of Gemma 2 or gpt-oss, see `benchmarks.models`."""
        return self.kv_heads > 0

    @property
    def flops(self) -> int:
        """Of the products, all pairs counted."""
        pairs = self.batch * self.heads * self.q_length * self.keys
        return pairs * self.depth * 2 * (7 if self.gradient else 2)


_MODELS = ((1024, False), (4096, False), (1024, True))


def _of_model(model: str, length: int, heads: int, kv_heads: int, depth: int, gradient: bool) -> Case:
    name = f"{model}, {length}{', training' if gradient else ''}"
    return Case(name, 1, length, heads, depth, kv_heads=kv_heads, kind=model, gradient=gradient)


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
    *(_of_model("Gemma 2", length, 8, 4, 256, gradient) for length, gradient in _MODELS),
    # At 4096 a quarter of gpt-oss's heads: `eager` holds their logits several times, 4 GiB each.
    *(_of_model("gpt-oss", n, *((64, 8) if n < 4096 else (16, 2)), 64, gradient) for n, gradient in _MODELS),
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
    "Transformers eager": ("torch", "eager"),
}
