"""Attentions that go wrong in every way, for the tests of the kit. Loaded as a file, by path."""

import os
import sys
import time

import numpy as np

from anyattention_conformance import beyond
from anyattention_conformance.reference import attention

number = 3
right = attention


def plain(query, key, value, bias=None, mask=None):
    """Right, for what it takes."""
    return attention(query, key, value, bias, mask)


def other_names(q, k, v):
    return attention(q, k, v)


def zero_rows(query, key, value, bias=None, mask=None):
    """Zero where a query sees no key."""
    output = attention(query, key, value, bias, mask)
    if mask is None or query.shape[-3] == 0:
        return output
    shape = (*output.shape[:-3], output.shape[-2], output.shape[-3], key.shape[-3])
    seen = np.broadcast_to(np.asarray(mask, bool), shape).any(axis=-1)
    return np.where(np.swapaxes(seen, -1, -2)[..., None], output, output.dtype.type(0))


def raises(query, key, value):
    raise RuntimeError("no kernel for you")


def returns_a_list(query, key, value):
    return attention(query, key, value).tolist()


def hangs(query, key, value):
    if query.shape[-3] == 1:
        time.sleep(600)
    return attention(query, key, value)


def dies(query, key, value):
    if query.shape[-3] == 1:
        sys.stderr.write("about to abort\n")
        os.abort()
    return attention(query, key, value)


def exits(query, key, value):
    raise SystemExit(0)


def changes_its_query(query, key, value, mask=None):
    output = attention(query, key, value, mask=mask)
    query *= 2
    return output


def takes_no_bias(query, key, value, mask=None):
    return attention(query, key, value, None, mask)


def unclear(query, key, value):
    return query


def inverted(query, key, value, bias=None, mask=None):
    return attention(query, key, value, bias, None if mask is None else ~np.asarray(mask, bool))


def misspelt(query, key, value):
    if len({x.shape for x in (query, key, value)}) > 2:
        raise ShapeErorr("no")  # noqa: F821  the mistake
    return attention(query, key, value)


def scaled(query, key, value, softmax_scale=None, s_aux=None):
    """Right with a scale, wrong with sinks, which it ignores."""
    return beyond.attention(query, key, value, scale=softmax_scale)


def refuses_all(query, key, value):
    raise ValueError("never")
