"""A call whose arguments are checked."""

from typing import Any, NamedTuple

Array = Any


class Dropout(NamedTuple):
    """Dropout that is switched on: a key, the probability to keep a weight, whether one mask serves all heads."""

    key: Any
    keep_prob: Any
    broadcast: bool


class Request(NamedTuple):
    """What is asked of an implementation: arrays of one library, query, key and value of one dtype."""

    dtype: str
    query: Array
    key: Array
    value: Array  # None where only the weights are wanted
    bias: Any
    mask: Any  # an array or a mask by rule, with causality
    dropout: Dropout | None
    precision: Any
    force_fp32: bool
