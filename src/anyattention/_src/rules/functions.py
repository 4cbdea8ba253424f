"""Masks by a function of positions, for what no other rule says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from anyattention._src.rules.lowering import Expression, Lowering
from anyattention._src.rules.masks import Mask

Array = Any


@dataclass(frozen=True, eq=False, repr=False)
class Rule(Mask):
    """Key j is visible to query i where ``function(i, j, *query_arrays, *key_arrays)`` is truthy.

    The function is called for a tile at a time, and gets that tile's part of everything: positions i,
    ``[..., rows, 1]``, and j, ``[..., 1, columns]``, int32, which count from the first query and key of the whole; then
    each of `query_arrays` as ``[..., rows, 1]`` and each of `key_arrays` as ``[..., 1, columns]``. It returns an array
    of any dtype that can be broadcast to ``[..., rows, columns]``. It may be called often, with other sizes each time,
    on NumPy from several threads at once, and must depend on nothing but its arguments.

    Args:
        function: written for arrays of the call's library, with operators or the library's functions. Rules are equal
            whose function and arrays are the same objects. JAX traces it anew if it is another object, as a lambda is
            that stands within a loop or a function that is called again.
        query_arrays: a tuple of arrays ``[batch..., q_length]``, of any dtype.
        key_arrays: a tuple of arrays ``[batch..., kv_length]``. Arrays that JAX traces or `vmap` maps have to come this
            way: tiled refuses a function that has them from elsewhere.

    Raises:
        TypeError: no function, or no tuples of arrays; in a call, a function that returns no array.
        ShapeError: in a call, arrays of another length or batch, or a result of another shape.

    Under `torch.compile` and `torch.export` exact alone has it, with all logits.

    Examples:
        >>> from anyattention.masks import CausalMask
        >>> every_third = Rule(lambda i, j: (i - j) % 3 == 0)
        >>> (every_third & CausalMask()).to_array(2, 4).tolist()
        [[True, False, False, False], [False, True, False, False]]

        Query i and key j at times of their own:

        >>> import numpy as np
        >>> times = np.array([0.0, 0.1, 0.7])
        >>> Rule(lambda i, j, ti, tj: abs(ti - tj) < 0.5, (times,), (times,)).to_array(3, 3)[0].tolist()
        [[True, True, False], [True, True, False], [False, False, True]]
    """

    function: Callable[..., Any]
    query_arrays: tuple[Array, ...] = ()
    key_arrays: tuple[Array, ...] = ()
    _axes: ClassVar = {"query_arrays": ("batch", "rows"), "key_arrays": ("batch", "columns")}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_function(self)

    def lower(self, to: Lowering) -> Expression:
        positions = to.position(-2), to.position(-1)
        arrays = *to.along(self, "query_arrays", -2), *to.along(self, "key_arrays", -1)
        return "function", self.function, *positions, *arrays


def check_function(rule: Any) -> None:
    """Raise TypeError unless a rule, in the making, has a function, and tuples or lists of arrays."""
    name = type(rule).__name__
    if not callable(rule.function):
        raise TypeError(f"function of {name} must be a function(i, j, *arrays), got {rule.function!r}")
    try:
        hash(rule.function)
    except TypeError as error:
        raise TypeError(f"function of {name} must be hashable, got {rule.function!r}: pass a plain function") from error
    for field in ("query_arrays", "key_arrays"):
        given = getattr(rule, field)
        if not isinstance(given, tuple | list) or not all(isinstance(x, list) or hasattr(x, "shape") for x in given):
            kind = f"array of shape {tuple(given.shape)}" if hasattr(given, "shape") else repr(given)
            raise TypeError(f"{field} of {name} must be a tuple of arrays, got {kind}: pass (array, ...)")
        object.__setattr__(rule, field, tuple(given))
