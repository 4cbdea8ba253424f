"""What attention needs of an array library: small interfaces, in terms of the array API standard alone.

`Arrays` makes, casts and places arrays, `Steps` are those of the exact implementation, and `Tiles` are the products,
row statistics and loops of the tiled one. `Exchange` is for those whose arrays may lie on several devices.
The defaults of the others serve every conforming library. A library that needs something else has a folder in
``anyattention_backends``, with a file for each interface that it changes.
"""

from collections.abc import Callable
from typing import Any

from anyattention._src.interfaces.arrays import Arrays, Function, is_floating, permute, place, unknown
from anyattention._src.interfaces.exchange import Axis, Exchange
from anyattention._src.interfaces.steps import Steps
from anyattention._src.interfaces.tiles import OfTiles, Pair, Step, Tiles, join_rows

__all__ = [
    "Arrays",
    "Axis",
    "Backend",
    "Exchange",
    "Function",
    "OfTiles",
    "Pair",
    "Step",
    "Steps",
    "Tiles",
    "is_floating",
    "join_rows",
    "permute",
    "place",
    "unknown",
]

Array = Any


class Backend:
    """One array library, as attention sees it."""

    def __init__(
        self, xp: Any, arrays: type[Arrays] = Arrays, steps: type[Steps] = Steps, tiles: type[Tiles] = Tiles
    ) -> None:
        self.xp = xp
        self.arrays = arrays(xp)
        self.steps, self.tiles = steps(self.arrays), tiles(self.arrays)
        self.name = self.arrays.name
        self.engines: tuple[Any, ...] = ()
        """Kernels of vendors, the best first: see `anyattention.extend.Fused`."""
        self.symbolic: Callable[[Any], bool] = lambda size: not isinstance(size, int)
        """Whether a size is a symbol, on which no choice may depend."""
        self.vjp: Callable[..., tuple[Array, Callable[[Array], tuple[Array, ...]]]] | None = None
        """From a function and arrays its output and pullback, where the library differentiates functions."""
        self.axis: Callable[[Any, Array, Array], Axis | None] = self._no_axis
        """Where the sequence of a query and key is, by `sequence_axis`, or where that is None as far as arrays say."""
        self.localized: Callable[[Any, Axis | None], tuple[Any, Axis | None]] = lambda call, axis: (call, axis)
        """From a call that of the parts which this process has, where arrays say how they are spread, and its axis."""

    def _no_axis(self, axis: Any, query: Array, key: Array) -> None:
        if axis is not None:
            raise TypeError(
                f"sequence_axis={axis!r}: arrays of {self.name} are on one device. It is the name of a mesh axis for "
                "JAX, a process group or one-dimensional DeviceMesh for PyTorch; Dask's arrays say how they are cut"
            )
