"""MLX: all as the standard has it, with its own kernel."""

import mlx.core as xp

from anyattention.backend import Backend
from anyattention_backends.mlx_sdpa import MLXFast


class MLXBackend(Backend):
    """What MLX adds."""

    def platform(self, x: xp.array) -> str:
        return "gpu" if xp.default_device().type == xp.gpu else "cpu"


backend = MLXBackend(xp)
backend.engines = (MLXFast(backend),)
