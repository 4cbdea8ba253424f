"""A mask as kernels know it: a band, lengths, segments and an array, all of which let a query see a key."""

from typing import Any, NamedTuple

from anyattention.masks import CausalMask, LengthMask, LocalMask, Mask, SegmentMask, conjunction

Array = Any


class Structure(NamedTuple):
    """What a query must pass to see a key; None for what is not there."""

    left: int | None = None  # i - left <= j
    right: int | None = None  # j <= i + right
    kv_lengths: Array | None = None  # j < kv_length, [batch...]
    query_lengths: Array | None = None  # i < query_length, [batch...]
    query_ids: Array | None = None  # equal to kv_ids, [batch..., q_length]
    kv_ids: Array | None = None  # [batch..., kv_length]
    array: Array | None = None  # truthy, broadcastable to [batch..., heads, q_length, kv_length]

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


def structure(mask: Any) -> Structure | None:
    """The structure of a mask, which is an array, a mask by rule or None; None where it is another combination."""
    found = Structure()
    for part in conjunction(mask):
        more: dict[str, Any] = {}
        if isinstance(part, CausalMask):
            more["right"] = part.offset if found.right is None else min(found.right, part.offset)
        elif isinstance(part, LocalMask):
            more["left"] = part.left if found.left is None else min(found.left, part.left)
            more["right"] = part.right if found.right is None else min(found.right, part.right)
        elif isinstance(part, LengthMask) and found.kv_lengths is None:
            more = {"kv_lengths": part.kv_lengths, "query_lengths": part.query_lengths}
        elif isinstance(part, SegmentMask) and found.kv_ids is None:
            more = {"query_ids": part.query_ids, "kv_ids": part.kv_ids}
        elif not isinstance(part, Mask) and found.array is None:
            more["array"] = part
        else:
            return None
        found = found._replace(**more)
    return found
