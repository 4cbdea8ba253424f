"""Our attention in models of other packages, through their own extension points: a module for each package.

Nothing else of anyattention imports a framework. `huggingface` does so when it is called; `keras` and `equinox` when
they are imported, as ``import anyattention.integrations.keras``.
"""

from anyattention.integrations import huggingface

__all__ = ["huggingface"]
