"""Attentions of other libraries under Flax's parameter names, each with what it does differently.

``anyattention conform NAME`` certifies one of them; `FOLDER/NAME.toml` has its claims.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Adapter:
    """Where an attention is, and what its arrays are."""

    target: str
    framework: str


HERE = "anyattention_conformance.adapters"
OURS = f"{HERE}.ours:exact"
ADAPTERS = {
    "anyattention-numpy": Adapter(f"{HERE}.ours:exact", "numpy"),
    "anyattention-jax": Adapter(f"{HERE}.ours:exact", "jax"),
    "anyattention-torch": Adapter(f"{HERE}.ours:exact", "torch"),
    "anyattention-mlx": Adapter(f"{HERE}.ours:exact", "mlx"),
    "anyattention-numpy-tiled": Adapter(f"{HERE}.ours:tiled", "numpy"),
    "anyattention-jax-tiled": Adapter(f"{HERE}.ours:tiled", "jax"),
    "anyattention-torch-tiled": Adapter(f"{HERE}.ours:tiled", "torch"),
    "anyattention-torch-fused": Adapter(f"{HERE}.ours:fused", "torch"),
    "flax-linen": Adapter(f"{HERE}.flax_linen:attention", "jax"),
    "flax-nnx": Adapter(f"{HERE}.flax_nnx:attention", "jax"),
    "huggingface-eager": Adapter(f"{HERE}.huggingface:eager", "torch"),
    "huggingface-sdpa": Adapter(f"{HERE}.huggingface:sdpa", "torch"),
    "jax-nn": Adapter(f"{HERE}.jax_nn:attention", "jax"),
    "keras-jax": Adapter(f"{HERE}.keras_jax:attention", "jax"),
    "keras-numpy": Adapter(f"{HERE}.keras_numpy:attention", "numpy"),
    "keras-torch": Adapter(f"{HERE}.keras_torch:attention", "torch"),
    "mlx-fast": Adapter(f"{HERE}.mlx_fast:attention", "mlx"),
    "torch-flex": Adapter(f"{HERE}.torch_flex:attention", "torch"),
    "torch-sdpa": Adapter(f"{HERE}.torch_sdpa:attention", "torch"),
}
