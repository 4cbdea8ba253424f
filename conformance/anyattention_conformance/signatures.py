"""How a function takes its arguments: what its signature shows, and where that is not all, what calls show."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from anyattention_conformance.case import ARGUMENTS
from anyattention_conformance.positions import dense
from anyattention_conformance.truth import NAMES

Parameters = tuple[inspect.Parameter, ...]
ARRAYS = NAMES[:3]
FLAX = (*NAMES[:4], "mask", "broadcast_dropout", "dropout_rng", "dropout_rate", "deterministic", "dtype", "precision")
# Names that others give to what Flax lacks, and the word for it in longer names.
OTHER_NAMES = {
    "scale": ("scaling", "softmax_scale", "sm_scale"),
    "logits_soft_cap": ("softcap", "soft_cap", "attn_logits_soft_cap"),
    "sinks": ("s_aux", "learnable_sink"),
    "offset": ("causal_offset", "query_offset", "q_offset"),
    "window": ("window_size",),
}
RENAMED = {"mask": "mask", "bias": "bias", "dropout_rate": "dropout"}  # parameters that others give longer names
RENAMED |= {"scale": "scal", "logits_soft_cap": "cap", "sinks": "sink", "offset": "offset", "window": "window"}
LAYERS = ("forward", "call")  # what layers of PyTorch and Keras call
NOT_TAKEN = re.compile(r"(unexpected|unknown|invalid|no) keyword argument", re.IGNORECASE)


@dataclass(frozen=True)
class Signature:
    """The parameters of a function that can be seen.

    It is `open` if it may take others than these: with ``**kwargs``, decorated, in C. `by_place` says whether it takes
    query, key and value by their places, or by name; None if this cannot be seen.
    """

    parameters: Parameters
    open: bool
    by_place: bool | None

    def missing(self, arguments: dict[str, Any]) -> list[str]:
        """The names of arguments that it surely does not take; query, key and value may have others."""
        return [] if self.open else self._unseen(arguments)

    def refused(self, error: Exception, arguments: dict[str, Any]) -> list[str]:
        """The names of arguments that it did not take, by the error that a call with them raised."""
        said = str(error)
        if not NOT_TAKEN.search(said):
            return []
        unseen = self._unseen(arguments)
        return unseen if "no keyword arguments" in said else [x for x in unseen if f"'{self._own_name(x)}'" in said]

    def advice(self, missing: list[str]) -> tuple[str, str] | None:
        """Cause and mend, if arguments that it does not take seem to have other names: mask and attn_mask."""
        pairs = [(name, self._alike(RENAMED[name])) for name in missing if name in RENAMED]
        pairs = [(name, other) for name, other in pairs if other]
        if not pairs:
            return None
        cause = "It has no parameter " + ", and no ".join(f"{name}, but {other}" for name, other in pairs)
        outer = ", ".join(f"{name}=None" for name, _ in pairs)
        inner = ", ".join(f"{other}={name}" for name, other in pairs)
        return f"{cause}.", (
            f"Rename it, or wrap it: lambda query, key, value, {outer}: attention(query, key, value, {inner}). Flax's "
            f"names are {', '.join(FLAX)}; query, key and value may also be the first three, under any names."
        )

    def _alike(self, word: str) -> str:
        """A parameter whose name has this word in it."""
        names = [x.name for x in self.parameters if x.name not in FLAX]
        return next((x for x in names if word in x.lower()), "")

    def fitted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with an offset and a window in the mask, where it has a parameter for this one alone."""
        names = _names(self.parameters)
        asked = [x for x in ("offset", "window") if arguments.get(x) is not None]
        takes_any = any(x.kind is x.VAR_KEYWORD for x in self.parameters)
        if "mask" in names and not takes_any and not any(self._own_name(x) in names for x in asked):
            return dense(arguments)
        return arguments

    @property
    def offers(self) -> list[str]:
        """The words for what Flax lacks, and the function has parameters for."""
        names = _names(self.parameters)
        return [word for name, word in ARGUMENTS.items() if self._own_name(name) in names]

    def _own_name(self, name: str) -> str:
        """What its parameter for this argument is called."""
        names = _names(self.parameters)
        return next((x for x in (name, *OTHER_NAMES.get(name, ())) if x in names), name)

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call a function: with names, but for what has a place alone."""
        named = {self._own_name(name): x for name, x in arguments.items()}
        by_name = {x.name for x in self.parameters if x.kind is x.KEYWORD_ONLY}
        placed = [named.pop(x) for x in _order(self.parameters) if self.by_place and x not in by_name]
        nameless = [x for x in self.parameters if x.kind is x.POSITIONAL_ONLY]
        last = max((i for i, x in enumerate(nameless) if x.name in named), default=-1)
        for x in nameless[len(placed) : last + 1]:
            if x.name not in named and x.default is x.empty:
                raise TypeError(f"missing a required argument: {x.name!r}")
            placed.append(named.pop(x.name, x.default))
        return function(*placed, **named)

    def _unseen(self, arguments: dict[str, Any]) -> list[str]:
        names = {*_names(self.parameters), *ARRAYS}
        return [x for x in arguments if self._own_name(x) not in names]


def read(function: Callable[..., Any]) -> Signature:
    """What can be seen of how a function takes its arguments.

    A decorator may show the parameters of what it wraps, and take more or less; only its own are sure.
    """
    own = _parameters(function, follow_wrapped=False)
    shown = any(hasattr(function, x) for x in ("__wrapped__", "__signature__"))
    is_open = own is None or shown or any(x.kind is x.VAR_KEYWORD for x in own)
    own = own or ()
    if not is_open or _named(own):
        return Signature(own, is_open, by_place=not _named(own))
    if isinstance(function, partial) and not function.args:
        return replace(read(function.func), open=True, by_place=None)
    for behind in (function, *(getattr(function, x, None) for x in LAYERS)):
        parameters = _parameters(behind) or () if callable(behind) else ()
        if _named(parameters) or _order(parameters) != ARRAYS:
            return Signature(parameters, is_open, by_place=None)
    return Signature(own, is_open, by_place=None)


def _parameters(function: Callable[..., Any], follow_wrapped: bool = True) -> Parameters | None:
    try:
        return tuple(inspect.signature(function, follow_wrapped=follow_wrapped).parameters.values())
    except (TypeError, ValueError):
        return None


def _names(parameters: Parameters) -> frozenset[str]:
    """The names of single arguments."""
    return frozenset(x.name for x in parameters if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL))


def _named(parameters: Parameters) -> bool:
    return _names(parameters).issuperset(ARRAYS)


def _order(parameters: Parameters) -> tuple[str, ...]:
    """Which of query, key and value the first three places take: by their initials, if these tell, else in order."""
    initials = [x.name[0].lower() for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)][:3]
    arrays = {x[0]: x for x in ARRAYS}
    return tuple(arrays[x] for x in initials) if set(initials) == set(arrays) else ARRAYS
