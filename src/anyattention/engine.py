"""What an engine is: a vendor's kernel, which serves a call where the call keeps its meaning."""

from collections.abc import Callable, Sequence
from typing import Any

from anyattention import masks, settings
from anyattention.backend import Backend
from anyattention.request import Request

Array = Any
SWITCH = (
    "Switch it off with anyattention.config(engines=('-{0}',)) or ANYATTENTION_ENGINES=-{0}, or pass "
    "implementation='tiled'."
)


LOW = "where a query's biases are all far below zero, which is seen when the call runs, tiled computes it"


class Engine:
    """One kernel. Subclasses live in modules of their own in ``anyattention_backends``."""

    name: str

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def refusals(self, request: Request) -> list[str]:
        """Why the kernel cannot serve the request, a line each; nothing where it can."""
        raise NotImplementedError

    def remarks(self, request: Request) -> list[str]:
        """What else `explain` says of a request that the kernel serves, a line each."""
        return []

    def rank(self, request: Request) -> int:
        """Its place among the engines that can serve the request: the least does."""
        return 0

    def attention(self, request: Request, fallback: Callable[[Request], Array]) -> Array:
        """The output, ``[batch..., q_length, num_heads, v_depth]``.

        `fallback` serves the same request, whatever its values, in any mode of differentiation.
        """
        raise NotImplementedError


def find(engines: Sequence[Engine], request: Request) -> tuple[Engine | None, list[str]]:
    """The engine that serves a request, in the order of the settings; or why each of them cannot, a line each."""
    chosen = settings.current().engines
    order = engines if chosen is None else [x for name in chosen for x in engines if x.name == name]
    refusals = {engine: engine.refusals(request) for engine in order}
    able = [engine for engine in order if not refusals[engine]]
    if len(able) > 1 and chosen is None:
        return min(able, key=lambda engine: engine.rank(request)), []
    if able:
        return able[0], []
    reasons = [f"{engine.name}: {', '.join(found)}" for engine, found in refusals.items()]
    return None, reasons + [f"{engine.name}: it is switched off" for engine in engines if engine not in refusals]


def least_bias(dtype: str) -> float:
    """The least that the largest bias of a query may be, for its gradient to be right.

    Kernels keep the logarithm of a sum, the largest logit included, and find the weights again from it: beyond this it
    is rounded by more than the dtype of the call is worth, and at the dtype's minimum the sum is lost.
    """
    return -(2.0**10) if "16" in dtype else -(2.0**7)


def fits(request: Request) -> bool:
    """Whether bias and mask have no axes, and no sizes, but those of query and key."""
    query, key = request.query, request.key
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    for part in (request.bias, *masks.conjunction(request.mask)):
        if hasattr(part, "shape") and not isinstance(part, masks.Mask):
            sizes = zip(reversed(part.shape), reversed(shape), strict=False)
            if len(part.shape) > len(shape) or any(size not in (1, whole) for size, whole in sizes):
                return False
    return True


def pairs(xp: Any, x: Array, batch: Sequence[int]) -> Array:
    """A bias or mask of four axes, as kernels take them: the first is the whole batch, or 1."""
    x = xp.reshape(x, (1,) * (len(batch) + 3 - x.ndim) + tuple(x.shape))
    if len(batch) == 1:
        return x
    if all(size == 1 for size in x.shape[: len(batch)]):
        return xp.reshape(x, (1, *x.shape[-3:]))
    return xp.reshape(xp.broadcast_to(x, (*batch, *x.shape[-3:])), (-1, *x.shape[-3:]))
