"""What masks and biases by rule have in common: they are made of numbers and arrays, and find the arrays' library."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

Array = Any
Self = TypeVar("Self", bound="ByRule")
PAIRS = ("batch", "heads", "rows", "columns")  # the axes of logits, and of what is broadcast to them


class AnyArray(Protocol):
    """An array of any library, as type checkers see it."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


class Convertible(Protocol):  # what JAX takes for an array, such as a parameter of Flax
    def __jax_array__(self) -> Any: ...


@dataclass(frozen=True, eq=False, repr=False)
class ByRule:
    """Something that is computed a tile at a time from numbers, arrays, functions and other rules: its fields."""

    #: Set by the registry, which stands above: what finds the library of arrays, what makes them this library's, and
    #: what hears of each class of rules when one is made.
    _home: ClassVar[Callable[..., Any]]
    _made: ClassVar[Callable[[type], None]]
    #: The fields that are arrays, which may not be missing.
    _arrays: ClassVar[tuple[str, ...]] = ()
    _of: ClassVar[str] = "numbers"  # that are in arrays
    #: What the axes of each array mean: "batch", which stands for any number of axes, "heads", "rows" and "columns" as
    #: in the logits; other names are of axes that no part of a whole cuts.
    _axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    #: Those that are integers, and those that may be arrays of integers too.
    _integers: ClassVar[tuple[str, ...]] = ()
    _offsets: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        ByRule._made(type(self))
        for name in self._arrays:
            if (x := getattr(self, name)) is None or isinstance(x, str | type | ByRule):
                raise TypeError(f"{name} of {type(self).__name__} must be an array of {self._of}, got {x!r}")
        for name in (*self._integers, *self._offsets):
            if type(x := getattr(self, name)) is int or (name in self._offsets and _is_array(x)):
                continue
            try:
                if isinstance(x, bool):
                    raise TypeError
                object.__setattr__(self, name, operator.index(x))
            except TypeError:
                kind, also = type(x).__name__, " or an array of integers, [batch...]" if name in self._offsets else ""
                raise TypeError(f"{name} of {type(self).__name__} must be an integer{also}, got {kind}") from None

    kind: ClassVar[str] = ""  # of argument of a call
    _joint: ClassVar[str] = ""  # how two of this kind are joined
    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to us

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self} is no array: write `{self._joint}` to join it with another {self.kind}, or expand it with "
            "to_array(q_length, kv_length)"
        )

    __array__ = __bool__ = __len__ = __iter__ = _refuse
    ndim = property(_refuse)  # asked for by Flax's combine_masks, as in its decode path

    def __repr__(self) -> str:
        values = [getattr(self, field.name) for field in fields(self)]
        defaults = [field.default for field in fields(self)]
        while len(values) > 1 and values[-1] is defaults[-1]:
            values.pop()
            defaults.pop()
        return f"{type(self).__name__}({', '.join(map(shown, values))})"

    def _identity(self) -> tuple[Any, ...]:
        """What is equal in equal rules: numbers by value, arrays and functions by identity."""
        return type(self), *(_identity(getattr(self, field.name)) for field in fields(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByRule) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def arrays(self) -> list[Array]:
        """The arrays that the rule was made from."""
        found: list[Array] = []

        def take(x: Array) -> Array:
            found.append(x)
            return x

        self.with_arrays(take)
        return found

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """The functions of the caller's that are part of it."""
        found: list[Callable[..., Any]] = []
        for field in fields(self):
            x = getattr(self, field.name)
            for part in x if isinstance(x, tuple) else (x,):
                found += [part] if field.name == "function" else part.functions if isinstance(part, ByRule) else []
        return found

    def with_arrays(
        self: Self, function: Callable[[Array], Array], dense: Callable[[Array], Array] | None = None
    ) -> Self:
        """The rule with the function applied to each of its arrays; to those given as lists too.

        `dense`, where given, is for dense masks and biases instead.
        """
        return self._mapped(lambda rule, name, x: (dense or function)(x) if name == "array" else function(x))

    def part(self: Self, cut: Callable[[Array, tuple[str, ...]], Array]) -> Self:
        """The rule of a part of the whole: `cut` gives the part of each array, and is told what its axes mean.

        Positions count from the origin of the part, see `Lowering`.
        """
        return self._mapped(lambda rule, name, x: cut(x, rule._axes[name]))

    def _mapped(self: Self, function: Callable[["ByRule", str, Array], Array]) -> Self:
        """The rule with the function applied to each of its arrays, beside the rule and the field it is of."""
        changed = {}
        for name in [field.name for field in fields(self)]:  # not `vars`, which PyTorch 2.11 cannot compile
            x = getattr(self, name)
            if name == "array":  # which may be a scalar
                y: Any = function(self, name, x)
            elif x is None or isinstance(x, int | float | str) or name == "function":
                continue
            elif isinstance(x, ByRule):
                y = x._mapped(function)
            elif isinstance(x, tuple):
                parts = [p._mapped(function) if isinstance(p, ByRule) else function(self, name, p) for p in x]
                y = x if list(map(id, x)) == list(map(id, parts)) else tuple(parts)
            else:
                y = function(self, name, x)
            if y is not x:
                changed[name] = y
        return replace(self, **changed) if changed else self

    def within_32_bits(self, is_wide: Callable[[Array], bool]) -> "ByRule":
        """The same without integers beyond 32 bits, of which `is_wide` tells the arrays that have some.

        Offsets become as large as 32 bits can tell: no array is longer. Dense masks and biases stay.

        Raises:
            TypeError: numbers, or what a function is given, of which JAX would keep the last 32 bits.
        """
        changed: dict[str, Any] = {}
        for name in [field.name for field in fields(self) if field.name not in ("array", "function")]:
            x = getattr(self, name)
            if isinstance(x, ByRule):
                changed[name] = x.within_32_bits(is_wide)
            elif isinstance(x, tuple):
                parts = enumerate(x)
                changed[name] = tuple(
                    p.within_32_bits(is_wide) if isinstance(p, ByRule) else self._narrow(f"{name}[{n}]", p, is_wide)
                    for n, p in parts
                )
            elif name in self._offsets and is_wide(x):
                changed[name] = x.clip(-(2**31), 2**31 - 1).astype("int32")
            elif name in self._arrays:
                self._narrow(name, x, is_wide)
        return replace(self, **changed) if changed else self

    def _narrow(self, name: str, x: Array, is_wide: Callable[[Array], bool]) -> Array:
        if is_wide(x):
            raise TypeError(
                f"{name} of {self} has integers beyond 32 bits, which JAX has under jax_enable_x64 alone: pass smaller "
                "ones, or an array of JAX's"
            )
        return x


def _identity(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_identity, x))
    return x if x is None or isinstance(x, int | float | str | ByRule) else id(x)


def _is_array(x: Any) -> bool:
    """Whether it is an array, but for a scalar of NumPy's, which is known when a rule is made."""
    has_axes = isinstance(x, list) or hasattr(x, "__jax_array__") or hasattr(x, "shape")
    return has_axes and not (type(x).__module__ == "numpy" and x.shape == ())


def shown(x: Any) -> str:
    """A field as it stands in the text of a rule."""
    if isinstance(x, tuple):
        return f"({', '.join(map(shown, x))}{',' * (len(x) == 1)})"
    if callable(x) and hasattr(x, "__name__"):
        return str(x.__name__)
    return f"array{tuple(x.shape)}" if hasattr(x, "shape") else repr(x)
