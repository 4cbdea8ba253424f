"""Defaults of the calls: which implementation, and which engines; from the environment or a context manager."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, get_args

from anyattention._src.registry import ENGINES, compiling, engine_names, trace_under

Name = Literal["exact", "tiled", "fused"]  # every implementation there is; "fused" is one of the engines
IMPLEMENTATIONS: tuple[Name, ...] = get_args(Name)
Exchanges = Literal["ring", "gather", "reduce"]


class Settings(NamedTuple):
    """What calls take that say nothing themselves."""

    implementation: Name | None = None
    engines: tuple[str, ...] | None = None  # in order of preference; None for all
    sequence_axis: Any = None  # over which devices the sequence is spread
    exchange: str | None = None  # how its keys and queries meet there; None to choose


def check_implementation(name: str | None) -> Name | None:
    """The name. ValueError if no implementation has it."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: pass None or one of {', '.join(IMPLEMENTATIONS)}")
    return name


def check_engines(names: Iterable[str] | None) -> tuple[str, ...] | None:
    """Names of engines in order of preference, where names such as "-cudnn" mean all but these.

    Raises:
        TypeError: a string in place of several.
        ValueError: an unknown name, or names with and without "-".
    """
    if isinstance(names, str):
        raise TypeError(f"engines={names!r} is one string: pass several names, as in engines=({names!r},)")
    if names is None:
        return None
    names = tuple(names)
    plain = [name.removeprefix("-") for name in names]
    for name in plain:
        if name not in ENGINES and name not in engine_names():
            raise ValueError(f"there is no engine {name!r}: pass some of {', '.join(engine_names())}")
    without = [name.startswith("-") for name in names]
    if not any(without):
        return names
    if not all(without):
        raise ValueError(f"engines={names!r} mixes names with and without '-': use one form")
    return tuple(name for name in engine_names() if name not in plain)


def _check_exchange(name: str) -> str:
    if name not in get_args(Exchanges):
        raise ValueError(f"exchange={name!r} is unknown: pass one of {', '.join(get_args(Exchanges))}")
    return name


def from_environment() -> Settings:
    """``ANYATTENTION_IMPLEMENTATION`` and ``ANYATTENTION_ENGINES``, names parted by commas, read once at import."""
    try:
        engines = os.environ.get("ANYATTENTION_ENGINES", "").replace(" ", "")
        return Settings(
            check_implementation(os.environ.get("ANYATTENTION_IMPLEMENTATION") or None),
            check_engines(engines.split(",")) if engines else None,
        )
    except ValueError as error:
        raise ValueError(f"environment variable ANYATTENTION_IMPLEMENTATION or ANYATTENTION_ENGINES: {error}") from None


_DEFAULT = from_environment()
_settings: ContextVar[Settings] = ContextVar("anyattention", default=_DEFAULT)
#: Those that were set last, on whatever thread: torch.compile cannot trace a ContextVar, but compiles anew where this
#: changes. Equal settings are one object, since it compares objects.
_last = _DEFAULT
_known = {_DEFAULT: _DEFAULT}


def current() -> Settings:
    """The settings in force."""
    return _last if compiling() else _settings.get()


def _tell_compilers(settings: Settings) -> None:
    """Let torch.compile and JAX compile anew what was compiled under other settings."""
    global _last
    _last = _known.setdefault(settings, settings)
    trace_under(None if settings == _DEFAULT else settings)


@contextmanager
def config(
    implementation: Name | None = None,
    engines: list[str] | tuple[str, ...] | None = None,
    sequence_axis: Any = None,
    exchange: Exchanges | None = None,
) -> Iterator[None]:
    """Settings for the calls inside, where they do not say it themselves; None leaves a setting as it is.

    What `torch.compile` and `jax.jit` compiled under other settings is compiled again. What was compiled ahead of time
    stays as it is, as does all that a JAX without `jax.make_user_context` compiled. Programs of `torch.compile` know no
    threads: they follow what was set last on any.

    Args:
        implementation: "exact", "tiled" or "fused", as if passed by name.
        engines: those that may serve "fused", in order of preference; ("-cudnn",) means all but this one, () none.
        sequence_axis: as the argument of `dot_product_attention`, for models that call it deep inside.
        exchange: how keys and queries on several devices meet: "ring", "gather" or "reduce", as `explain` names them.
            Of PyTorch's ranks, "reduce" says that each has all queries.

    Examples:
        >>> import numpy as np, anyattention
        >>> x = np.ones((2, 1, 4))
        >>> with config(implementation="tiled"):
        ...     print(anyattention.explain(x, x, x).implementation)
        tiled
    """
    before = current()
    within = Settings(
        check_implementation(implementation) or before.implementation,
        before.engines if engines is None else check_engines(engines),
        before.sequence_axis if sequence_axis is None else sequence_axis,
        before.exchange if exchange is None else _check_exchange(exchange),
    )
    token = _settings.set(within)
    _tell_compilers(within)
    try:
        yield
    finally:
        _settings.reset(token)
        _tell_compilers(before)
