"""What an engine is: a vendor's kernel, which serves a call where the call keeps its meaning."""

from collections.abc import Callable, Sequence
from typing import Any

from anyattention import settings
from anyattention.backend import Backend
from anyattention.request import Request

Array = Any


class Engine:
    """One kernel. Subclasses live in modules of their own in ``anyattention_backends``."""

    name: str

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def refusals(self, request: Request) -> list[str]:
        """Why the kernel cannot serve the request, a line each; nothing where it can."""
        raise NotImplementedError

    def rank(self, request: Request) -> int:
        """Its place among the engines that can serve the request: the least is asked first."""
        return 0

    def attention(self, request: Request, fallback: Callable[[Array, Array, Array], Array]) -> Array:
        """The output, ``[batch..., q_length, num_heads, v_depth]``.

        `fallback` computes the same from query, key and value in any mode of differentiation.
        """
        raise NotImplementedError


def find(engines: Sequence[Engine], request: Request) -> tuple[Engine | None, list[str]]:
    """The engine that serves a request, in the order of the settings; or why each of them cannot, a line each."""
    chosen = settings.current().engines
    if chosen is None:
        order = sorted(engines, key=lambda engine: engine.rank(request)) if len(engines) > 1 else engines
    else:
        order = [engine for name in chosen for engine in engines if engine.name == name]
    reasons = []
    for engine in order:
        refusals = engine.refusals(request)
        if not refusals:
            return engine, []
        reasons.append(f"{engine.name}: {', '.join(refusals)}")
    reasons += [f"{engine.name}: it is switched off" for engine in engines if engine not in order]
    return None, reasons
