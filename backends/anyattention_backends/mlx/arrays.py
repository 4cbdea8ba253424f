import mlx.core as mx

from anyattention.extend import Arrays


class MLXArrays(Arrays):
    def platform(self, x: mx.array) -> str:
        """MLX computes on the device that is its default when the call is made."""
        return "gpu" if mx.default_device().type == mx.gpu else "cpu"
