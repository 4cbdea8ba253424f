"""How devices that hold the shards of one sequence hear of each other: what a library needs beneath `ring`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Array = Any


class Axis(NamedTuple):
    """Where the sequence of a call is: the devices in a row, each with a shard, and what the call's arrays are."""

    axis: Any
    """What the library knows it by: the name of a mesh axis, a process group. Hashable."""
    size: int
    """Number of devices."""
    name: str
    """As messages say it, "mesh axis 'seq'" for example."""
    index: Any = 0
    """The position of this device in the row, where arrays are its own: an integer, or an array of JAX."""
    local: bool = False
    """Whether queries, keys and values are this device's parts; else they are the whole."""
    whole_queries: bool = False
    """Of parts: whether every device has all queries, and the keys alone are spread."""
    others: tuple[str, ...] = ()
    """Of parts: along what else of the devices they may be parts, as messages say it; where is not known."""
    exchanges: tuple[str, ...] = ("ring", "reduce")
    """How keys may meet queries here, see `spread`; "gather" first, if it is for short keys without being asked for."""
    asked: bool = True
    """Whether the caller named it; else the arrays say it, and what can do without it may."""


class Exchange:
    """The devices in a row, as one of them sees the others; the last is followed by the first.

    A subclass says what its library does differently from integers, slices and Python's own loops.
    """

    def __init__(self, size: int, index: Any) -> None:
        self.size, self.index = size, index

    def send(self, arrays: Sequence[Array]) -> Any:
        """Start to send arrays to the next device; what `receive` takes."""
        raise NotImplementedError

    def receive(self, pending: Any) -> list[Array]:
        """What the device before has sent, once it is here."""
        raise NotImplementedError

    def arrived(self, arrays: Sequence[Array]) -> Any:
        """What `receive` takes for arrays that are here already."""
        raise NotImplementedError

    def permuted(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        """What this device is sent if each sends its array from source to destination, a permutation."""
        raise NotImplementedError

    def sum(self, x: Array) -> Array:
        """The sum over the devices, on each."""
        raise NotImplementedError

    def maximum(self, x: Array) -> Array:
        """The maximum over the devices, on each; a constant to differentiation."""
        raise NotImplementedError

    def gather(self, x: Array, axis: int) -> Array:
        """The arrays of all devices, joined in their order along an axis."""
        raise NotImplementedError

    def shared(self, gradient: Array) -> Array:
        """The gradient of what is the same on every device, from what each adds to it."""
        return self.sum(gradient)

    def uniform(self, tree: Any) -> Any:
        """Arrays that each device may have others of, where a library tells those from the same on all."""
        return tree

    def placed(self, x: Array, like: Array) -> Array:
        """An array that lies as another does along what else the devices share, where a library tells that."""
        return x

    def repeat(self, step: Callable[[Any, Any], Any], carry: Any, count: int) -> Any:
        """The carry after ``carry = step(carry, turn)`` for so many turns."""
        for turn in range(count):
            carry = step(carry, turn)
        return carry

    def choose(self, predicate: Array, then: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
        """``then(*args)`` where the predicate holds, else ``otherwise(*args)``, whose results are alike."""
        return then(*args) if bool(predicate) else otherwise(*args)

    def pick(self, predicate: Any, x: Array, y: Array) -> Array:
        """One of two arrays, by what follows from the index."""
        return x if predicate else y

    def cut(self, x: Array, start: Any, size: int, axis: int) -> Array:
        """So many elements along one of the last two axes, from a start that follows from the index."""
        return x[..., start : start + size] if axis == -1 else x[..., start : start + size, :]

    def add(self, x: Array, part: Array, start: Any, axis: int) -> Array:
        """The array with a part of it added there; may overwrite it."""
        raise NotImplementedError
