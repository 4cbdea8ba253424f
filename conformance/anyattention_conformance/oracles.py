"""What Flax answers: called live, or recorded."""

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol
from weakref import finalize
from zlib import crc32

import numpy as np

from anyattention_conformance import beyond
from anyattention_conformance.case import Case, numpy_dtype
from anyattention_conformance.truth import NAMES, Answer

Array = Any
GOLDEN = Path(__file__).parent / "golden" / "flax.npz"


class OracleError(Exception):
    """Flax's answers cannot be had; the message says why."""


@lru_cache(1024)
def of_the_reference(case: Case, dtype: str) -> Answer | str:
    """The answer of the kit's reference, which stands for Flax where Flax has no word for what a case needs.

    Each of its steps is rounded once. So contract C3 allows twice the error that this rounding costs, plus 4 eps, and
    C2 compares with these numbers.
    """
    arguments = case.inputs(dtype)
    try:
        output, pullback = beyond.attention.vjp(**arguments)
    except Exception as error:
        return type(error).__name__
    if not case.gradients:
        return Answer(output, {})
    gradients = dict(zip(NAMES, pullback(case.cotangent(output.shape, output.dtype)), strict=True))
    return Answer(output, {name: x for name, x in gradients.items() if x is not None})


class Oracle(Protocol):
    """Where Flax's answers come from."""

    @property
    def name(self) -> str:
        """Which Flax, and whether it is live or recorded."""

    def answer(self, case: Case, dtype: str) -> Answer | str:
        """Flax's output and gradients, or the name of the exception that it raises; see `of_the_reference`."""


class Asserting:
    """The live Flax in a process with asserts, for one without. It ends with this object, or with this process."""

    def __init__(self) -> None:
        environment = {name: x for name, x in os.environ.items() if name != "PYTHONOPTIMIZE"}
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        command = [sys.executable, "-c", code]
        self._process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        finalize(self, _end, self._process)

    def answer(self, case: Case, dtype: str) -> Answer | str:
        """Flax's answer. OracleError if its process ended."""
        try:
            pickle.dump((case, dtype), self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, OSError) as error:
            raise OracleError(f"Flax cannot be called live: its process ended with {self._process.wait()}") from error


class Live:
    """The Flax that is installed, called eagerly. Its asserts are answers: `python -O` would take them away."""

    @cached_property
    def name(self) -> str:
        try:
            import flax
            import jax
        except ImportError as error:
            raise OracleError(f"Flax cannot be called live: {error}") from error

        return f"Flax {flax.__version__} live, JAX {jax.__version__}"

    @cached_property
    def _elsewhere(self) -> Asserting:
        return Asserting()

    def answer(self, case: Case, dtype: str) -> Answer | str:
        """Flax's answer; float64 with x64 on."""
        if case.beyond:
            return of_the_reference(case, dtype)
        if sys.flags.optimize:
            return self._elsewhere.answer(case, dtype)
        arguments = case.inputs(dtype)
        with x64(dtype == "float64"):
            try:
                output = flax_attention(**arguments)
            except Exception as error:
                return type(error).__name__
            if not case.gradients:
                return Answer(output, {})
            return flax_answer(arguments, case.cotangent(output.shape, output.dtype))


def serve() -> None:
    """The life of the process of an `Asserting`: cases from the standard input, answers to the standard output."""
    source, answers, live = sys.stdin.buffer, os.fdopen(os.dup(1), "wb"), Live()
    os.dup2(2, 1)  # what is printed must not mix with the answers
    while True:
        try:
            run = pickle.load(source)
        except EOFError:
            return
        pickle.dump(live.answer(*run), answers)
        answers.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


class Golden:
    """Answers that a pinned Flax gave; needs NumPy alone, and ml_dtypes for bfloat16."""

    def __init__(self, path: Path = GOLDEN) -> None:
        self._file = np.load(io.BytesIO(path.read_bytes()))  # no file stays open
        self.about = json.loads(str(self._file["about"]))

    @property
    def name(self) -> str:
        return f"Flax {self.about['flax']} recorded, JAX {self.about['jax']}, {self.about['date']}"

    def answer(self, case: Case, dtype: str) -> Answer | str:
        """The recorded answer. OracleError where this NumPy draws other inputs than were recorded."""
        if case.beyond:
            return of_the_reference(case, dtype)
        run = f"{case.id} {dtype}"
        about = self.about["runs"].get(run)
        if about is None:
            raise OracleError(f"{run} was not recorded; record it with: python -m anyattention_conformance.golden")
        if case.gradients and "arrays" in about and len(about["arrays"]) == 1:
            raise OracleError(f"the gradients of {run} were not recorded")
        if about["inputs"] != digest(case.inputs(dtype)):
            raise OracleError(
                f"the inputs of {run} are not those that were recorded, since NumPy {np.__version__} draws other "
                "numbers; use --oracle live"
            )
        if "error" in about:
            return str(about["error"])
        arrays = {
            name: self._file[f"{run} {name}"].view(numpy_dtype(stored)) for name, stored in about["arrays"].items()
        }
        return Answer(arrays.pop("output"), arrays)


def digest(arguments: dict[str, Any]) -> int:
    """A checksum of the arrays among the arguments."""
    found = 0
    for x in arguments.values():
        if isinstance(x, np.ndarray):
            found = crc32(np.ascontiguousarray(x).view(np.uint8), found)
    return found


@contextmanager
def x64(enabled: bool) -> Iterator[None]:
    """JAX with 64-bit dtypes, or as it is."""
    if not enabled:
        yield
        return
    import jax

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


def flax_attention(**arguments: Any) -> Array:
    """``flax.linen.dot_product_attention`` on these arguments, eagerly; the answer as a NumPy array."""
    import flax.linen
    import jax.numpy as jnp

    placed = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    return np.asarray(flax.linen.dot_product_attention(**placed))


def flax_answer(arguments: dict[str, Any], cotangent: Array) -> Answer:
    """Flax's output and gradients."""
    import flax.linen
    import jax
    import jax.numpy as jnp

    arrays = {name: jnp.asarray(arguments[name]) for name in NAMES if name in arguments}
    rest = {name: x for name, x in arguments.items() if name not in arrays}
    output, pullback = jax.vjp(lambda arrays: flax.linen.dot_product_attention(**arrays, **rest), arrays)
    (gradients,) = pullback(jnp.asarray(cotangent).astype(output.dtype))
    return Answer(np.asarray(output), {name: np.asarray(x) for name, x in gradients.items()})
