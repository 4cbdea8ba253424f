"""A mask as kernels know it: a band, lengths and segments, and the rest, all of which let a query see a key."""

from functools import reduce
from operator import and_
from typing import Any, NamedTuple

from anyattention._src.rules import CausalMask, LengthMask, LocalMask, SegmentMask, as_mask, conjunction, is_band

Array = Any


class Structure(NamedTuple):
    """What a query must pass to see a key; None for what is not there."""

    left: int | None = None  # i - left <= j
    right: int | None = None  # j <= i + right
    kv_lengths: Array | None = None  # j < kv_length, [batch...]
    query_lengths: Array | None = None  # i < query_length, [batch...]
    query_ids: Array | None = None  # equal to kv_ids, [batch..., q_length]
    kv_ids: Array | None = None  # [batch..., kv_length]
    rest: tuple[Any, ...] = ()  # arrays, truthy, broadcastable to [batch..., heads, q_length, kv_length]; other masks

    @property
    def causal(self) -> bool:
        """Whether the band alone is `CausalMask()`."""
        return self.left is None and self.right == 0

    @property
    def banded(self) -> bool:
        """Whether there is a band."""
        return self.left is not None or self.right is not None

    def band_shows(self, q_length: int, kv_length: int) -> bool:
        """Whether every query sees a key, as far as the band alone decides."""
        first = self.right is None or self.right >= 0
        last = self.left is None or q_length - 1 - self.left <= kv_length - 1
        wide = self.left is None or self.right is None or self.left + self.right >= 0
        return first and last and wide

    def without(self, *names: str) -> "Structure":
        """The same with the "band", "lengths" or "segments" among the rest."""
        found, rest = self, list(self.rest)
        if "band" in names and self.right is not None:
            rest.append(CausalMask(self.right) if self.left is None else LocalMask(self.left, self.right))
            found = found._replace(left=None, right=None)
        if "lengths" in names:
            rest.append(LengthMask(self.kv_lengths, self.query_lengths))
            found = found._replace(kv_lengths=None, query_lengths=None)
        if "segments" in names:
            rest.append(SegmentMask(self.query_ids, self.kv_ids))
            found = found._replace(query_ids=None, kv_ids=None)
        return found._replace(rest=tuple(rest))

    @property
    def moved(self) -> tuple[Any, ...]:
        """The bands among the rest, whose offsets are arrays."""
        return tuple([x for x in self.rest if isinstance(x, CausalMask | LocalMask)])

    @property
    def joined(self) -> Any:
        """The rest as one mask: an array or a mask by rule; None of nothing."""
        if len(self.rest) < 2:
            return self.rest[0] if self.rest else None
        return reduce(and_, map(as_mask, self.rest))


def structure(mask: Any) -> Structure:
    """The structure of a mask, which is an array, a mask by rule or None."""
    found: dict[str, Any] = {}
    rest = []
    for part in conjunction(mask):
        if is_band(part):
            right = part.offset
            if isinstance(part, LocalMask):
                left, right = part.left - part.offset, part.right + part.offset
                found["left"] = min(found.get("left", left), left)
            found["right"] = min(found.get("right", right), right)
        elif isinstance(part, LengthMask) and "kv_lengths" not in found:
            found |= {"kv_lengths": part.kv_lengths, "query_lengths": part.query_lengths}
        elif isinstance(part, SegmentMask) and "kv_ids" not in found:
            found |= {"query_ids": part.query_ids, "kv_ids": part.kv_ids}
        else:
            rest.append(part)
    return Structure(**found, rest=tuple(rest))
