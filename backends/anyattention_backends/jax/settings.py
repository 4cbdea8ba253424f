"""The settings of calls as part of the key under which JAX finds what it has traced."""

from typing import Any

import jax

# A new context makes JAX trace everything again, once: so this module is imported where settings first change.
_context = jax.make_user_context() if hasattr(jax, "make_user_context") else None


def trace_under(settings: Any) -> None:
    """Let what is traced on this thread from now on be found again under these settings alone."""
    if _context is not None:
        _context(settings).__enter__()
