"""Which keys a query sees by their positions alone: an offset, and a window."""

from typing import Any

import numpy as np

Array = Any


def seen(offset: Any, window: tuple[int, int] | None, q_length: int, kv_length: int) -> Array:
    """Bool, ``[q_length, kv_length]``, or ``[batch..., 1, q_length, kv_length]`` where the offset has batch axes.

    Query i stands at position ``p = i + offset``. It sees key j where ``j <= p``, or with a window ``(left, right)``
    where ``p - left <= j <= p + right``. The offset is an integer or an array of integers, ``[]`` or ``[batch...]``.
    """
    offset = np.asarray(0 if offset is None else offset, np.int64)
    position = np.arange(q_length)[:, None] + offset[..., None, None]
    key = np.arange(kv_length)
    if window is None:
        found = key <= position
    else:
        found = (position - window[0] <= key) & (key <= position + window[1])
    return found[..., None, :, :] if offset.ndim else found


def dense(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with what an offset and a window hide in their `mask`, for those that take nothing else."""
    if arguments.get("offset") is None and arguments.get("window") is None:
        return arguments
    rest = {name: x for name, x in arguments.items() if name not in ("offset", "window", "mask")}
    lengths = (arguments[name].shape[-3] for name in ("query", "key"))
    mask = seen(arguments.get("offset"), arguments.get("window"), *lengths)
    if arguments.get("mask") is not None:
        mask = mask & np.asarray(arguments["mask"]).astype(bool)
    return rest | {"mask": mask}
