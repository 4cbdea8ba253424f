from typing import Any

from anyattention.extend import Steps

Array = Any


class DaskSteps(Steps):
    def contract(self, equation: str, x: Array, y: Array, precision: Any = None, dot_general: Any = None) -> Array:
        """NumPy sums bfloat16 in bfloat16, where a thousand ones make 256."""
        for name in map(self.arrays.dtype_name, (x, y)):
            if "16" in name:
                raise TypeError(f"exact has no {name} on Dask: pass implementation='tiled', or dtype='float32'")
        return super().contract(equation, x, y, precision, dot_general)
