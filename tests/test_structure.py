"""Masks as kernels read them."""

import numpy as np
import pytest

from anyattention.masks import CausalMask, LengthMask, LocalMask, SegmentMask
from anyattention.structure import Structure, structure

IDS, LENGTHS, ARRAY = np.zeros((2, 5), int), np.array([3, 4]), np.ones((5, 5), bool)
SEGMENTS = SegmentMask(IDS, IDS)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, {}),
        (ARRAY, {"array": ARRAY}),
        (CausalMask(2), {"right": 2}),
        (LocalMask(1, 3), {"left": 1, "right": 3}),
        (CausalMask() & LocalMask(1, 3) & LocalMask(2, 2), {"left": 1, "right": 0}),
        (LengthMask(LENGTHS), {"kv_lengths": LENGTHS}),
        (LengthMask(LENGTHS, LENGTHS[::-1]), {"kv_lengths": LENGTHS, "query_lengths": LENGTHS[::-1]}),
        (SEGMENTS & (ARRAY & CausalMask()), {"query_ids": IDS, "kv_ids": IDS, "array": ARRAY, "right": 0}),
    ],
    ids=str,
)
def test_structure(mask, expected):
    found = structure(mask)
    assert {name for name, x in found._asdict().items() if x is not None} == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(getattr(found, name), x)


@pytest.mark.parametrize(
    "mask",
    [
        ~CausalMask(),
        CausalMask() | LocalMask(1, 1),
        SEGMENTS & SEGMENTS,
        LengthMask(LENGTHS) & CausalMask() & LengthMask(LENGTHS),
        (ARRAY & CausalMask()) & ARRAY,
        CausalMask() & ~SEGMENTS,
    ],
    ids=str,
)
def test_other_combinations_are_none(mask):
    assert structure(mask) is None


def test_where_a_band_shows_every_query_a_key():
    for left in (None, 0, 1, 2, 3):
        for right in (None, -2, -1, 0, 1):
            for q_length, kv_length in ((3, 3), (4, 2), (2, 5), (1, 1)):
                i, j = np.arange(q_length)[:, None], np.arange(kv_length)
                band = (left is None or i - left <= j) & (right is None or j <= i + right) & (i + j >= 0)
                found = Structure(left=left, right=right)
                assert found.band_shows(q_length, kv_length) == band.any(axis=1).all(), (left, right)
    assert (Structure(right=0).causal, Structure(left=3, right=0).causal, Structure(right=1).causal) == (
        True,
        False,
        False,
    )
    assert (Structure().banded, Structure(left=2).banded, Structure(right=2).banded) == (False, True, True)
