"""Equinox' ``MultiheadAttention`` with this attention in place of Equinox' own.

Equinox has no argument for it, and its modules are not made to be subclassed. What Equinox offers is surgery: a module
of another class takes the place of a layer in a model, by ``equinox.tree_at``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax

import anyattention
from anyattention._src.settings import Name
from anyattention.masks import Mask

__all__ = ["MultiheadAttention"]

Array = Any


class MultiheadAttention(eqx.Module):  # type: ignore[misc]
    """A layer of Equinox' called with this attention; its projections, its dropout and its arguments stay.

    Dropout draws a key for each head, as Equinox does, and drops the same weights.

    Args:
        layer: the ``equinox.nn.MultiheadAttention`` whose projections and dropout are used.
        implementation: as in `anyattention.dot_product_attention`.

    Examples:
        >>> import equinox as eqx, jax
        >>> layer = eqx.nn.MultiheadAttention(num_heads=2, query_size=8, key=jax.random.key(0))
        >>> model = {"attention": layer}
        >>> model = eqx.tree_at(lambda model: model["attention"], model, replace_fn=MultiheadAttention)
        >>> x = jax.numpy.ones((5, 8))
        >>> model["attention"](x, x, x, mask=anyattention.masks.CausalMask()).shape
        (5, 8)
    """

    layer: eqx.nn.MultiheadAttention
    implementation: Name | None = eqx.field(static=True, default=None)

    def __call__(
        self,
        query: Array,
        key_: Array,
        value: Array,
        mask: Array | Mask | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        process_heads: Callable[[Array, Array, Array], tuple[Array, Array, Array]] | None = None,
    ) -> Array:
        """The output, ``[q_length, output_size]``.

        Args:
            query: ``[q_length, query_size]``.
            key_: ``[kv_length, key_size]``.
            value: ``[kv_length, value_size]``.
            mask: true where a query may see a key, ``[q_length, kv_length]`` or ``[num_heads, q_length, kv_length]``;
                or a mask by rule.
            key: a key of JAX, for dropout.
            inference: no dropout; None takes what the layer's dropout says.
            process_heads: takes the heads of query, key and value, ``[length, num_heads, depth]`` each, and returns
                them changed, as a rotation by positions does.

        Raises:
            ValueError: dropout without a key.
            ShapeError: as `anyattention.dot_product_attention`.
        """
        layer = self.layer
        projections = (layer.query_proj, query), (layer.key_proj, key_), (layer.value_proj, value)
        heads: Sequence[Array] = [jax.vmap(proj)(x).reshape(x.shape[0], layer.num_heads, -1) for proj, x in projections]
        heads = heads if process_heads is None else process_heads(*heads)
        attend: Callable[..., Array] = partial(anyattention.dot_product_attention, implementation=self.implementation)
        inference = layer.dropout.inference if inference is None else inference
        if inference or layer.dropout.p == 0:
            output = attend(*heads, mask=mask)
        else:
            if key is None:
                raise ValueError("dropout needs a key: pass key=jax.random.key(seed), or inference=True")
            output = self._dropped(attend, heads, mask, jax.random.split(key, layer.num_heads))
        return jax.vmap(layer.output_proj)(output.reshape(query.shape[0], -1))

    def _dropped(self, attend: Callable[..., Array], heads: Sequence[Array], mask: Any, keys: Array) -> Array:
        """Attention with dropout by a key for each head."""

        def head(query: Array, key: Array, value: Array, mask: Any, dropout_rng: Array) -> Array:
            arrays = (x[:, None] for x in (query, key, value))
            return attend(*arrays, mask=mask, dropout_rng=dropout_rng, dropout_rate=self.layer.dropout.p)[:, 0]

        mapped = 0 if getattr(mask, "shape", ())[2:] and not isinstance(mask, Mask) else None
        return jax.vmap(head, in_axes=(1, 1, 1, mapped, 0), out_axes=1)(*heads, mask, keys)
