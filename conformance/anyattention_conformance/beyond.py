"""Flax's attention with what today's models ask beside: the reference, with a step for each word that Flax lacks.

- scale: the query times this number, rounded to the compute dtype, in place of the division by the root of the depth.
- soft cap: ``cap * tanh(logits / cap)``, before bias and mask, as in Gemma 2 (arXiv:2408.00118).
- sinks: a logit more in each softmax, whose weight goes to no value, as in gpt-oss (arXiv:2508.10925).
- offset and window: `positions.seen`, and-ed with the mask.
- grouped heads: each key head serves as many query heads, one after the other (arXiv:2305.13245).

For cases that need these words the oracle is this reference: it stands for a Flax that has them. Its error against the
truth in float64 is the yardstick of contract C3, and its answer is what C2 compares with. So its products of float32
are not rounded once alone, but at each term, as those of Flax are: else large logits would be held to half of Flax's
error, where Flax's own steps, put together by hand, fail.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyattention_conformance import positions, reference
from anyattention_conformance.reference import Array, DType, divided, promoted, reduced, rounded, visible, wide


@dataclass
class Call(reference.Call):
    """One call, with the arguments that Flax lacks. It is the `call` of each step of `Attention`."""

    scale: float | None = None
    logits_soft_cap: float | None = None
    sinks: Array = None
    offset: Any = None
    window: tuple[int, int] | None = None

    group: int = 1  # how many query heads each key head serves
    bent: Array = 0.0  # the hyperbolic tangent of the soft cap
    sink_weights: Array = 0.0
    dsinks: Array = None


class Attention(reference.Attention):
    """`dot_product_attention` with all words. To make a mistake, override a step."""

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | float | None = None,
        mask: Array | bool | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DType = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        *,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        sinks: Array | None = None,
        offset: Any = None,
        window: tuple[int, int] | None = None,
    ) -> Array:
        """As the reference. `sinks` are ``[num_heads]``, or broadcast to ``[batch..., num_heads, q_length]``."""
        named = dict(locals())
        del named["self"]
        return self.run(Call(**named)).output

    def vjp(self, **arguments: Any) -> tuple[Array, Callable[[Array], tuple[Any, ...]]]:
        """The output, and the function from its cotangent to the gradients: of query, key, value, bias and sinks."""
        call = self.run(Call(**arguments))

        def pullback(cotangent: Array) -> tuple[Any, ...]:
            found = self.pulled_back(call, arguments, cotangent)
            return *found, None if call.sinks is None else reduced(_turned(call.dsinks, call.sinks), call.sinks)

        return call.output, pullback

    def run(self, call: Any) -> Any:
        """All steps forward."""
        if call.offset is not None or call.window is not None:
            seen = self.seen(call)
            call.mask = seen if call.mask is None else visible(call.mask) & seen
        super().run(call)
        return call

    def seen(self, call: Any) -> Array:
        """What the positions alone leave visible."""
        return positions.seen(call.offset, call.window, np.shape(call.query)[-3], np.shape(call.key)[-3])

    def check(self, call: Any) -> None:
        """Flax's assertions, but for heads of which each serves several others."""
        heads, kv_heads = call.query.shape[-2:-1], call.key.shape[-2:-1]
        if heads != kv_heads == call.value.shape[-2:-1] and kv_heads > (0,) and heads[0] % kv_heads[0] == 0:
            call.group = heads[0] // kv_heads[0]
            call.key, call.value = self.spread(call, call.key), self.spread(call, call.value)
        super().check(call)

    def spread(self, call: Any, x: Array) -> Array:
        """Keys or values with as many heads as the query: each as often as it serves, one after the other."""
        return np.repeat(x, call.group, axis=-2)

    def scale(self, call: Any, query: Array) -> Array:
        """The query times the scale, before the product."""
        if call.scale is None:
            return super().scale(call, query)
        return rounded(wide(query) * self.factor(call), call.dtype)

    def factor(self, call: Any) -> Array:
        """What the query is multiplied with."""
        return 1.0 / wide(self.root(call)) if call.scale is None else wide(rounded(call.scale, call.dtype))

    def logits(self, call: Any, query: Array) -> Array:
        """The products, capped."""
        logits = _summed(query, call.key) if call.dtype == np.float32 else super().logits(call, query)
        return logits if call.logits_soft_cap is None else self.cap(call, logits)

    def cap(self, call: Any, logits: Array) -> Array:
        """Each operation rounded to the dtype of the logits."""
        cap = rounded(call.logits_soft_cap, logits.dtype)
        call.bent = rounded(np.tanh(wide(divided(logits, cap))), logits.dtype)
        return rounded(wide(cap) * wide(call.bent), logits.dtype)

    def softmax(self, call: Any, logits: Array) -> Array:
        """Over the keys and the sink, in the wider dtype of the two."""
        if call.sinks is None:
            return super().softmax(call, logits)
        dtype = promoted(logits.dtype, np.asarray(call.sinks).dtype)
        column = rounded(np.broadcast_to(self.column(call), (*logits.shape[:-1], 1)), dtype)
        weights = super().softmax(call, np.concatenate((rounded(logits, dtype), column), axis=-1))
        call.sink_weights = weights[..., -1:]
        return weights[..., :-1]

    def column(self, call: Any) -> Array:
        """The sinks as one more column of the logits, ``[..., num_heads, q_length or 1, 1]``."""
        return (call.sinks[:, None] if call.sinks.ndim == 1 else call.sinks)[..., None]

    # --- backward ---

    def softmax_gradient(self, call: Any, dweights: Array) -> Array:
        """Of the logits; that of the sinks is kept."""
        terms = wide(call.softmax) * dweights
        call.dsinks = -wide(call.sink_weights) * np.sum(terms, axis=-1, keepdims=True)
        return super().softmax_gradient(call, dweights)

    def cap_gradient(self, call: Any, dlogits: Array) -> Array:
        """Of the logits before the cap."""
        return dlogits * (1.0 - wide(call.bent) ** 2)

    def query_gradient(self, call: Any, dlogits: Array) -> Array:
        found = super().query_gradient(call, self.cap_gradient(call, dlogits))
        return found if call.scale is None else found * wide(self.root(call)) * self.factor(call)

    def key_gradient(self, call: Any, dlogits: Array) -> Array:
        return self.gathered(call, super().key_gradient(call, self.cap_gradient(call, dlogits)))

    def value_gradient(self, call: Any, cotangent: Array) -> Array:
        return self.gathered(call, super().value_gradient(call, cotangent))

    def gathered(self, call: Any, x: Array) -> Array:
        """The sum over the query heads that a key head serves."""
        *lead, heads, depth = x.shape
        return x.reshape((*lead, heads // call.group, call.group, depth)).sum(axis=-2)


def _summed(query: Array, key: Array) -> Array:
    """Products of queries and keys, ``[batch..., num_heads, q_length, kv_length]``, rounded to float32 at each term."""
    query, key = (np.swapaxes(wide(x), -2, -3) for x in (query, key))
    found = np.zeros((*query.shape[:-1], key.shape[-2]), np.float32)
    for term in range(query.shape[-1]):
        product = query[..., term, None] * key[..., None, :, term]
        found = (found + product).astype(np.float32)
    return found


def _turned(x: Array, sinks: Array) -> Array:
    """``[batch..., num_heads, q_length, 1]`` with axes as those of the sinks."""
    x = x[..., 0]
    return x.sum(axis=-1) if sinks.ndim == 1 else x


attention = Attention()
