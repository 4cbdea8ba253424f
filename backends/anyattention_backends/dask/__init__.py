"""Dask: arrays in chunks, larger than memory, whose attention is a graph of tasks.

Exact is that of the standard. Tiled is a task for each pair of chunks that may see each other, in the chunks' library.
"""

import array_api_compat.dask.array as xp

from anyattention.extend import Backend
from anyattention_backends.dask.arrays import DaskArrays
from anyattention_backends.dask.steps import DaskSteps
from anyattention_backends.dask.tiles import DaskTiles

backend = Backend(xp, DaskArrays, DaskSteps, DaskTiles)
backend.symbolic = lambda size: False  # what is unknown raises
