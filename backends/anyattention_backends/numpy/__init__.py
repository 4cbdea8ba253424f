"""NumPy: 16-bit floats are computed in float32 and rounded step by step, because NumPy's own rules differ.

NumPy promotes bfloat16 (from ml_dtypes) to float32 or float64 in most operations, sums it in bfloat16 (a thousand
ones make 256), and multiplies float16 matrices fifty times slower than float32 ones.
"""

import array_api_compat.numpy as xp

from anyattention.extend import Backend
from anyattention_backends.numpy.arrays import NumPyArrays
from anyattention_backends.numpy.steps import NumPySteps
from anyattention_backends.numpy.tiles import NumPyTiles

backend = Backend(xp, NumPyArrays, NumPySteps, NumPyTiles)
