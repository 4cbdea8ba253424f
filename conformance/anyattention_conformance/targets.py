"""What is certified: a function with Flax's parameter names, or some of them, for arrays of one library."""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anyattention_conformance.adapters import ADAPTERS
from anyattention_conformance.case import Case
from anyattention_conformance.cases import CASES
from anyattention_conformance.frameworks import Framework, framework, quiet
from anyattention_conformance.inference import UnclearError, infer
from anyattention_conformance.signatures import Signature, read
from anyattention_conformance.truth import NAMES

Array = Any
# Exceptions of a program that is wrong in itself, whatever it is given.
MISTAKES = {"NameError", "AttributeError", "ImportError", "SyntaxError"}
NO_CALL = re.compile(r"keyword argument|missing \d+ required|positional argument")  # the call itself is refused


class TargetError(Exception):
    """The target cannot be run at all; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a target did with one case.

    `kind` is "answer", "missing" (it does not take an argument), "unplaced" (it does, by a place that cannot be seen),
    "impossible" (its library does not have the arrays), "raised", "failed" (raised where Flax refuses, but for another
    reason), "changed" (an argument), or "died" (with its process, or by the time limit). `raised` has the names of the
    exception's classes. `gradients` is None where none were asked for or taken.
    """

    kind: str
    message: str = ""
    output: Array = None
    gradients: dict[str, Array] | None = None
    no_gradients: str = ""  # why there are none
    raised: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # the arguments that it does not take
    advice: tuple[str, str] | None = None  # cause and mend, where a parameter has another name


@dataclass(frozen=True)
class Target:
    """A function under test. `vjp` has its signature and returns the output and a pullback, for libraries without."""

    name: str
    function: Callable[..., Any]
    framework: Framework
    vjp: Callable[..., Any] | None = None
    inferred: str = ""  # why this framework, where it was not asked for

    @cached_property
    def signature(self) -> Signature:
        """How the function takes its arguments; where this cannot be seen, a plain call by name tells."""
        found = read(self.function)
        return found if found.by_place is not None else replace(found, by_place=not self._runs_by_name(found))

    def _runs_by_name(self, signature: Signature) -> bool:
        try:
            with quiet():
                arrays = {name: self.framework.put(x) for name, x in CASES[0].inputs().items()}
                signature.call(self.function, arrays)
        except Exception:  # the target's own, of any class; if it fails by place too, that call reports it
            return False
        return True

    @property
    def about(self) -> dict[str, Any]:
        """What it runs on, as far as a report has it."""
        found = {"framework": self.framework.name, "inferred": self.inferred, "versions": self.framework.versions}
        return found | {"offers": self.signature.offers}

    def run(self, case: Case, dtype: str, gradients: bool) -> Outcome:
        """Call the function on one case.

        An exception where Flax refuses the shapes is a refusal only if it is not a mistake in the code, and if the same
        call with shapes that fit has an answer; else it would be raised for another reason.
        """
        outcome = self._run(case, dtype, gradients)
        if not case.error or outcome.kind != "raised":
            return outcome
        if {*outcome.raised} & MISTAKES or ("TypeError" in outcome.raised and NO_CALL.search(outcome.message)):
            return replace(outcome, kind="failed", message=f"{outcome.message}: this is no refusal of the shapes")
        fitting = self._run(case.fitting, dtype, False)
        if fitting.kind != "answer":
            why = f"with shapes that fit it raises as well ({fitting.message})"
            return replace(
                outcome, kind="failed", message=f"{outcome.message}: this is no refusal of the shapes, since {why}"
            )
        return outcome

    def _run(self, case: Case, dtype: str, gradients: bool) -> Outcome:
        if not case.available(dtype):
            return Outcome("missing", "NumPy has no bfloat16")
        arguments = self.signature.fitted(case.inputs(dtype))
        if missing := self.signature.missing(arguments):
            advice = self.signature.advice(missing)
            return Outcome("missing", f"takes no {' and no '.join(missing)}", advice=advice, names=tuple(missing))
        try:
            with quiet(), self.framework.scope(dtype):
                return self._call(case, dtype, arguments, gradients)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if missing := self.signature.refused(error, arguments):
                message = f"takes no {' and no '.join(missing)} by name ({said[:400]})"
                return Outcome("missing", message, advice=self.signature.advice(missing), names=tuple(missing))
            if self.signature.open and "positional-only arguments passed as keyword" in said:
                why = "takes arguments by places that cannot be seen: show its signature, as functools.wraps does"
                return Outcome("unplaced", f"{why} ({said[:400]})")
            return Outcome("raised", said[:500], raised=tuple(x.__name__ for x in type(error).__mro__))

    def _call(self, case: Case, dtype: str, arguments: dict[str, Any], gradients: bool) -> Outcome:
        try:
            placed = {
                name: self.framework.put(x.copy()) if isinstance(x, np.ndarray) and name != "dropout_rng" else x
                for name, x in arguments.items()
            }
        except Exception as error:
            return Outcome("impossible", f"{self.framework.name} has no {dtype} here: {error}"[:300])
        given = {name: x for name, x in placed.items() if isinstance(arguments[name], np.ndarray)}
        outcome = self._answer(case, placed, gradients)
        for name, x in given.items():
            if name != "dropout_rng" and not _same(self.framework.get(x), arguments[name]):
                return Outcome("changed", f"changed its argument {name}")
        return outcome

    def _answer(self, case: Case, placed: dict[str, Any], gradients: bool) -> Outcome:
        query = placed["query"]
        wanted = [name for name in NAMES if name in placed] if gradients else []
        if not wanted:
            output = self._apply(**placed)
            self.framework.like(output, query)
            return Outcome("answer", output=self.framework.get(output))
        arrays = {name: placed.pop(name) for name in wanted}
        if self.framework.differentiates:
            output, pullback = self.framework.vjp(lambda **arrays: self._apply(**arrays, **placed), arrays)
        elif self.vjp is not None:
            output, (_, pull) = self._apply(**arrays, **placed), read(self.vjp).call(self.vjp, arrays | placed)
            pullback = lambda cotangent: dict(zip(NAMES, pull(cotangent), strict=False))  # noqa: E731
        else:
            output = self._apply(**arrays, **placed)
            self.framework.like(output, query)
            why = f"{self.framework.name} has no gradients, and the function no attribute `vjp`"
            return Outcome("answer", output=self.framework.get(output), no_gradients=why)
        self.framework.like(output, query)
        answer = self.framework.get(output)
        cotangent = self.framework.put(case.cotangent(answer.shape, answer.dtype))
        try:
            found = {name: self.framework.get(x) for name, x in pullback(cotangent).items() if name in arrays}
        except Exception as error:
            return Outcome("answer", output=answer, no_gradients=f"{type(error).__name__}: {error}"[:500])
        return Outcome("answer", output=answer, gradients=found)

    def _apply(self, **arguments: Any) -> Array:
        return self.signature.call(self.function, arguments)


def _same(x: Array, y: Array) -> bool:
    """Whether two arrays hold the same numbers, NaN among them, whatever its bits."""
    return np.array_equal(x.astype(np.float64), y.astype(np.float64), equal_nan=True)


def load(name: str, framework_name: str | None = None) -> Target:
    """The target ``module:callable`` or ``path/to/file.py:callable``, or an adapter. TargetError if there is none."""
    adapter = ADAPTERS.get(name)
    where, _, path = (adapter.target if adapter else name).rpartition(":")
    framework_name = adapter.framework if adapter else framework_name
    if not where or not path:
        known = f"module:callable or path/to/file.py:callable, or one of {', '.join(ADAPTERS)}"
        raise TargetError(f"{name!r} is no target: write {known}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except BaseException as error:  # also SystemExit
        raise TargetError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    function: Any = module
    for attribute in path.split("."):
        if not hasattr(function, attribute):
            raise TargetError(f"{where} has no {path}: it is {getattr(module, '__file__', 'built in')}")
        function = getattr(function, attribute)
    return make(function, framework_name, name)


def make(function: Callable[..., Any], framework_name: str | None = None, name: str = "") -> Target:
    """The target of a function, whose framework is inferred where none is named.

    Its attribute `vjp`, if it has one, gives gradients where the library does not.
    """
    name = name or f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}"
    if not callable(function):
        raise TargetError(f"{name} is {type(function).__name__}, which cannot be called")
    if isinstance(function, type):
        raise TargetError(f"{name} is a class: name a function, or an instance that can be called")
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__, getattr(function, "forward", None)))):
        raise TargetError(f"{name} is asynchronous: name a function that returns the output, not a coroutine")
    inferred = ""
    if framework_name is None:
        try:
            framework_name, inferred = infer(function)
        except UnclearError as error:
            raise TargetError(
                f"it cannot be seen which arrays {name} takes ({error}): pass --framework (in Python framework=) with "
                "numpy, jax, torch, mlx, or a module that follows the array API standard"
            ) from None
    try:
        library = framework(framework_name)
    except Exception as error:
        raise TargetError(f"the framework {framework_name} cannot be imported: {error}") from error
    return Target(name, function, library, getattr(function, "vjp", None), inferred)


def _import_file(path: Path) -> Any:
    """The module in a file, under a name of its own: a file torch.py must not take the place of PyTorch."""
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    name = f"attention_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no file that Python imports")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.parent.resolve()))  # behind the libraries, for the same reason
    spec.loader.exec_module(module)
    return module
