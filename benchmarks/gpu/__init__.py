"""Right first, then fast, on an NVIDIA GPU: ``python -m benchmarks.gpu``."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

COPIES = ("_external", "_lib")  # in SciPy, by version


def find_requirements() -> None:
    """Where they are not installed, take array-api-compat from SciPy, which JAX brings, and do without threadpoolctl.

    The latter serves NumPy's tiles alone, of which none are computed here.
    """
    if not find_spec("threadpoolctl"):
        sys.modules["threadpoolctl"] = ModuleType("threadpoolctl")
        sys.modules["threadpoolctl"].ThreadpoolController = None
    if find_spec("array_api_compat") or not (scipy := find_spec("scipy")):
        return
    for folder in (Path(scipy.origin).parent / copy / "array_api_compat" for copy in COPIES):
        if (folder / "__init__.py").exists():
            spec = spec_from_file_location("array_api_compat", folder / "__init__.py")
            sys.modules["array_api_compat"] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules["array_api_compat"])
            return


find_requirements()
