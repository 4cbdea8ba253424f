"""What is to be done as soon as a module is imported, which Python has no word for."""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class WhenImported(MetaPathFinder):
    """Calls a function after the first import of a module; it finds nothing itself."""

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        self.name, self.function = name, function

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and isinstance(loader := spec.loader, Loader):
            run = loader.exec_module

            def run_then(module: Any) -> None:
                run(module)
                with suppress(Exception):  # which the first call that needs the function's work raises again
                    self.function()

            loader.exec_module = run_then  # type: ignore[method-assign]
        return spec


def when_imported(name: str, function: Callable[[], Any]) -> None:
    """Call the function after the module of this name is imported, once."""
    if not any(isinstance(finder, WhenImported) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, WhenImported(name, function))
