"""What is measured: as many tokens in every call, in shorter or longer sequences, of heads of three depths."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks import cases

DTYPES, DEPTHS = ("bfloat16", "float16"), (128, 64, 256)
#: "lengths" is `LengthMask`, "keys" the same as an array ``[batch, 1, 1, kv_length]``, "bias" is
#: ``[1, heads, q_length, kv_length]``.
KINDS = ("full", "causal", "lengths", "keys", "bias")


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    tokens: int = 16384  # batch times length
    hidden: int = 2048  # heads times depth
    lengths: tuple[int, ...] = (1024, 4096, 16384)
    matrix: int = 8192  # of the product that the card's peak is taken from
    reading: float = 0.02  # seconds


CARD = Scale()
PRETEND = Scale(tokens=256, hidden=256, lengths=(64, 128, 256), matrix=256, reading=0.001)


@dataclass(frozen=True)
class Case(cases.Case):
    """One call, forward, or forward and backward."""

    @property
    def flops(self) -> int:
        """Of the products: all pairs, padding too, but half of them if causal; backward takes 2.5 times forward."""
        return super().flops // (2 if self.kind == "causal" else 1)

    @property
    def logits(self) -> int:
        """Their number."""
        return self.batch * self.heads * self.q_length * self.keys


def every(scale: Scale, quick: bool) -> Iterator[Case]:
    """The cases, the most telling first. Quick: bfloat16 of one depth; bias and padding in one length."""
    dtypes, depths = (DTYPES[:1], DEPTHS[:1]) if quick else (DTYPES, DEPTHS)
    middle = scale.lengths[len(scale.lengths) // 2]
    for dtype, depth, gradient, length, kind in product(dtypes, depths, (False, True), scale.lengths, KINDS):
        if quick and length != middle and kind not in ("full", "causal"):
            continue
        batch, heads = scale.tokens // length, scale.hidden // depth
        name = f"{dtype} {batch}x{length}x{heads}x{depth} {kind}{' gradient' if gradient else ''}"
        yield Case(name, batch, length, heads, depth, kind=kind, dtype=dtype, gradient=gradient)
