"""Keras' attention layers and ``keras.ops.dot_product_attention``, with this attention in place of Keras' own.

For Keras' backends NumPy, JAX and PyTorch. The layers override ``_compute_attention``, as Keras documents "for
customized attention implementation", and inherit the rest: weights, configuration, saved files.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

import anyattention
from anyattention._src.settings import Name
from anyattention.masks import Mask

__all__ = ["DotProductAttention", "GroupedQueryAttention", "MultiHeadAttention", "dot_product_attention"]

Array = Any
_FLASH = "flash_attention chooses a kernel of Keras': pass implementation='fused' to ask for a kernel here"


class _Attends:
    """What both layers do in place of Keras' attention."""

    dropout: float
    seed: int | None
    # What `call` is given and Keras does not pass on to `_compute_attention`.
    _is_causal = _returns_weights = False

    def _prepare(self, implementation: Name | None, flash_attention: bool | None) -> None:
        if flash_attention is not None:
            raise ValueError(_FLASH)
        self.implementation = implementation
        self.seed_generator = keras.random.SeedGenerator(self.seed) if self.dropout else None

    def call(
        self,
        query: Array,
        value: Array,
        key: Array = None,
        query_mask: Array = None,
        value_mask: Array = None,
        key_mask: Array = None,
        attention_mask: Array = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """As Keras' layer, which would make an array of a causal mask, ``[1, q_length, kv_length]``."""
        self._is_causal, self._returns_weights = bool(use_causal_mask), bool(return_attention_scores)
        try:
            return super().call(  # type: ignore[misc]
                query,
                value,
                key=key,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=False,
            )
        finally:
            self._is_causal = self._returns_weights = False

    def _compute_attention(
        self,
        query: Array,
        key: Array,
        value: Array,
        attention_mask: Array = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
    ) -> tuple[Array, Array]:
        """The output, ``[batch..., q_length, heads, value_dim]``, and the weights before dropout, if asked for."""
        axes: Sequence[int] = getattr(self, "attention_axes", (1,))
        q_lengths, kv_lengths = ([x.shape[i] for i in axes] for x in (query, key))
        mask = None if attention_mask is None else _mask_of(attention_mask, query.ndim, q_lengths, kv_lengths)
        query, key, value = (_one_sequence(x, axes) for x in (query, key, value))
        masks: dict[str, Any] = {"mask": mask, "is_causal": self._is_causal}
        dropout: dict[str, Any] = {}
        if training and self.seed_generator is not None:
            words = _words(self.seed_generator.next())
            dropout = {"dropout_rng": words, "dropout_rate": self.dropout, "broadcast_dropout": False}
        output = anyattention.dot_product_attention(
            query, key, value, **masks, **dropout, implementation=self.implementation
        )
        output = _sequences(output, axes, q_lengths)
        if not self._returns_weights:
            return output, None
        weights = anyattention.dot_product_attention_weights(query, key, **masks)
        return output, ops.reshape(weights, (*weights.shape[:-2], *q_lengths, *kv_lengths))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "implementation": self.implementation}  # type: ignore[misc]


@keras.saving.register_keras_serializable(package="anyattention")
class MultiHeadAttention(_Attends, keras.layers.MultiHeadAttention):  # type: ignore[misc]
    """``keras.layers.MultiHeadAttention`` with this attention.

    Arguments as Keras' layer, whose weights and saved weights fit. `use_causal_mask` is a rule and never an array;
    padding and `sliding_window` become arrays, as in Keras. Dropout has the bits of Flax for the keys that Keras'
    `SeedGenerator` of this seed gives: on JAX they are those of Keras' layer.

    Args:
        num_heads: number of heads.
        key_dim: depth of queries and keys, for each head.
        implementation: as in `anyattention.dot_product_attention`; a part of the configuration.
        flash_attention: an error unless None, since it chooses among Keras' kernels.
        **options: as Keras' layer.

    Raises:
        ValueError: `flash_attention`; what Keras' layer refuses.

    Examples:
        >>> x = keras.random.normal((1, 5, 8))
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, implementation="tiled")
        >>> tuple(layer(x, x, use_causal_mask=True).shape)
        (1, 5, 8)
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        *,
        implementation: Name | None = None,
        flash_attention: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, **options)
        self._prepare(implementation, flash_attention)


@keras.saving.register_keras_serializable(package="anyattention")
class GroupedQueryAttention(_Attends, keras.layers.GroupQueryAttention):  # type: ignore[misc]
    """``keras.layers.GroupQueryAttention``, whose class has this name, with this attention; as `MultiHeadAttention`.

    Keras' layer repeats keys and values for each head before it calls the attention.

    Args:
        head_dim: depth of each head.
        num_query_heads: number of heads of the queries, a multiple of
        num_key_value_heads: that of keys and values.
        implementation: as in `anyattention.dot_product_attention`; a part of the configuration.
        flash_attention: an error unless None.
        **options: as Keras' layer.

    Raises:
        ValueError: `flash_attention`; what Keras' layer refuses.
    """

    def __init__(
        self,
        head_dim: int,
        num_query_heads: int,
        num_key_value_heads: int,
        *,
        implementation: Name | None = None,
        flash_attention: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(head_dim, num_query_heads, num_key_value_heads, **options)
        self._prepare(implementation, flash_attention)


@keras.saving.register_keras_serializable(package="anyattention")
class DotProductAttention(keras.Operation):  # type: ignore[misc]
    """`dot_product_attention` as an operation in Keras' functional models, and in their saved files."""

    def __init__(
        self,
        scale: float | None = None,
        is_causal: bool = False,
        attn_logits_soft_cap: float | None = None,
        implementation: Name | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self._options: dict[str, Any] = {
            "scale": scale,
            "is_causal": is_causal,
            "logits_soft_cap": attn_logits_soft_cap,
            "implementation": implementation,
        }

    def call(self, query: Array, key: Array, value: Array, bias: Array = None, mask: Array = None) -> Array:
        return anyattention.dot_product_attention(query, key, value, bias, mask, **self._options)

    def compute_output_spec(
        self, query: Array, key: Array, value: Array, bias: Array = None, mask: Array = None
    ) -> Any:
        dtype = keras.backend.result_type(query.dtype, key.dtype, value.dtype)
        return keras.KerasTensor((*query.shape[:-1], value.shape[-1]), dtype=dtype)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array = None,
    mask: Array | Mask = None,
    scale: float | None = None,
    is_causal: bool = False,
    flash_attention: bool | None = None,
    attn_logits_soft_cap: float | None = None,
    *,
    implementation: Name | None = None,
) -> Array:
    """``keras.ops.dot_product_attention`` by this attention, with the same arguments on every backend of Keras.

    Args:
        query: ``[batch..., q_length, num_heads, depth]``, an array of Keras' backend or a symbolic one.
        key: ``[batch..., kv_length, num_heads, depth]``; the query may have a multiple of its heads.
        value: ``[batch..., kv_length, num_heads, v_depth]``.
        bias: added to the logits; broadcastable to ``[batch..., num_heads, q_length, kv_length]``.
        mask: true where a query may see a key; broadcastable likewise, or a mask by rule.
        scale: of the logits; None for ``1 / sqrt(depth)``.
        is_causal: a query sees the keys at its own position and before.
        flash_attention: an error unless None, since it chooses among Keras' kernels.
        attn_logits_soft_cap: caps the logits, before bias and mask.
        implementation: as in `anyattention.dot_product_attention`.

    Returns:
        ``[batch..., q_length, num_heads, v_depth]``.

    Raises:
        ValueError: `flash_attention`.
        TypeError, ShapeError: as `anyattention.dot_product_attention`.
    """
    if flash_attention is not None:
        raise ValueError(_FLASH)
    operation = DotProductAttention(scale, is_causal, attn_logits_soft_cap, implementation)
    symbolic = any(isinstance(x, keras.KerasTensor) for x in (query, key, value, bias, mask))
    return (operation if symbolic else operation.call)(query, key, value, bias, mask)


def _words(seed: Array) -> Array:
    """A seed of Keras as a key: on PyTorch it is an int32 that stands for the same bits of an uint32."""
    if keras.backend.standardize_dtype(seed.dtype) == "uint32":
        return seed
    return ops.bitwise_and(ops.cast(seed, "int64"), 2**32 - 1)


def _one_sequence(x: Array, axes: Sequence[int]) -> Array:
    """``[batch, ..., heads, depth]`` with the axes of the sequence as one, next to the heads."""
    if tuple(axes) == (x.ndim - 3,):
        return x
    batch = [i for i in range(x.ndim - 2) if i not in axes]
    length = math.prod(x.shape[i] for i in axes)
    x = ops.transpose(x, (*batch, *axes, -2 + x.ndim, -1 + x.ndim))
    return ops.reshape(x, (*x.shape[: len(batch)], length, *x.shape[-2:]))


def _sequences(x: Array, axes: Sequence[int], lengths: Sequence[int]) -> Array:
    """The same back: the sequence as the axes that it had."""
    rank = x.ndim - 1 + len(axes)
    if tuple(axes) == (rank - 3,):
        return x
    x = ops.reshape(x, (*x.shape[:-3], *lengths, *x.shape[-2:]))
    now = [*(i for i in range(rank - 2) if i not in axes), *axes, rank - 2, rank - 1]
    return ops.transpose(x, [now.index(i) for i in range(rank)])


def _mask_of(mask: Array, rank: int, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> Array:
    """A mask ``[batch..., q_lengths..., kv_lengths...]`` with an axis for heads, and one for each sequence."""
    lengths = (*q_lengths, *kv_lengths)
    batch = tuple(mask.shape)[: mask.ndim - len(lengths)]
    ones = (1,) * (rank - 1 + len(q_lengths) - mask.ndim)  # where Keras puts them
    if len(q_lengths) == 1:
        return ops.reshape(mask, (*batch, *ones, *mask.shape[-2:]))
    mask = ops.broadcast_to(mask, (*batch, *lengths))
    return ops.reshape(mask, (*batch, *ones, math.prod(q_lengths), math.prod(kv_lengths)))
