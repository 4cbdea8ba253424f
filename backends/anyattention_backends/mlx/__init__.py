"""MLX: all as the standard has it, with its own kernel."""

import mlx.core as xp

from anyattention.extend import Backend
from anyattention_backends.mlx.arrays import MLXArrays
from anyattention_backends.mlx.sdpa import MLXFast

backend = Backend(xp, MLXArrays)
backend.engines = (MLXFast(),)
