"""Our attention in models of other packages, through their own extension points: a module for each package.

A module here may import the package that it serves, when it is called and not before. Nothing else of anyattention
imports a framework.
"""

from anyattention.integrations import huggingface

__all__ = ["huggingface"]
