"""What an engine is: a vendor's kernel, which serves a call where the call keeps its meaning."""

from collections.abc import Callable
from typing import Any

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

    def attention(self, request: Request, fallback: Callable[[Array, Array, Array], Array]) -> Array:
        """The output, ``[batch..., q_length, num_heads, v_depth]``.

        `fallback` computes the same from query, key and value in any mode of differentiation.
        """
        raise NotImplementedError
