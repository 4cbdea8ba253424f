"""Sinks beside kernels: as kernels take them, and beside fully masked rows.

A sink is a logit in the sum of a softmax, and has no value. Where a kernel returns the logarithm of its sum, lse, the
output with the sink is that without, times sigmoid(lse - sink). A fully masked row of Flax has logits of finfo.min:
beside these a sink has all the weight, unless it is as low as they are, so that the row is zero.
"""

import math
from collections.abc import Iterator
from typing import Any

from anyattention._src import dtypes
from anyattention._src.call import Call

Array = Any


def refusals(call: Call, by_row: bool) -> Iterator[str]:
    """What an engine that has sinks lacks of these; `by_row` says whether each query may have its own."""
    sinks, dtype = call.operands.sinks, call.options.dtype
    wide = dtypes.promote(dtype, call.backend.arrays.dtype_name(sinks))
    if wide not in (dtype, "float32"):
        yield f"the sinks make logits {wide}"
    if not by_row and sinks.ndim > 1 and sinks.shape[-1] != 1:
        yield "its sinks are the same for all queries"


def column(call: Call) -> Array:
    """The sinks as a column of the logits, ``[..., num_heads or 1, q_length or 1, 1]``, in float32."""
    return call.backend.arrays.cast(call.sinks, "float32")


def of_heads(call: Call) -> Array:
    """Sinks that are the same for all queries, ``[batch, num_heads]``, of all batch axes in one, in float32."""
    xp, heads = call.backend.xp, call.operands.query.shape[-2]
    return xp.reshape(xp.broadcast_to(column(call), (*call.batch, heads, 1, 1)), (-1, heads))


def share_of_hidden(call: Call) -> Array:
    """The part of a fully masked row's weights that keys get, as `column`: sigmoid of how far they are above the sink.

    By tanh, of which every derivative is finite.
    """
    above = math.log(call.lengths[1]) - (column(call) - float(call.backend.steps.lowest(call.options.dtype)))
    return 0.5 + 0.5 * call.backend.xp.tanh(0.5 * above)
