"""Masks as kernels read them."""

import numpy as np
import pytest

from anyattention._src.rules import CausalMask, LengthMask, LocalMask, SegmentMask, as_mask
from anyattention._src.structure import Structure, structure

IDS, LENGTHS, ARRAY = np.array([[0, 0, 1, 1, 2], [3, 4, 4, 5, 5]]), np.array([3, 4]), np.eye(5) + np.eye(5)[::-1] > 0
SEGMENTS = SegmentMask(IDS, IDS)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, {}),
        (ARRAY, {"rest": (ARRAY,)}),
        (CausalMask(2), {"right": 2}),
        (LocalMask(1, 3), {"left": 1, "right": 3}),
        (CausalMask() & LocalMask(1, 3) & LocalMask(2, 2), {"left": 1, "right": 0}),
        (LengthMask(LENGTHS), {"kv_lengths": LENGTHS}),
        (LengthMask(LENGTHS, LENGTHS[::-1]), {"kv_lengths": LENGTHS, "query_lengths": LENGTHS[::-1]}),
        (SEGMENTS & (ARRAY & CausalMask()), {"query_ids": IDS, "kv_ids": IDS, "rest": (ARRAY,), "right": 0}),
    ],
    ids=str,
)
def test_structure(mask, expected):
    found = structure(mask)
    assert {name for name, x in found._asdict().items() if x is not None and np.size(x)} == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(getattr(found, name), x)


def test_bands_whose_offsets_are_arrays():
    """Their ends are not known, so that they are among the rest."""
    moved, window = CausalMask(LENGTHS), LocalMask(2, 0, LENGTHS)
    found = structure(moved & CausalMask(1) & ARRAY & window & ~moved)
    assert (found.left, found.right) == (None, 1)
    assert found.moved == (moved, window)
    assert len(found.rest) == 4


@pytest.mark.parametrize(
    ("mask", "rest"),
    [
        (~CausalMask(), 1),
        (CausalMask() | LocalMask(1, 1), 1),
        (SEGMENTS & SEGMENTS, 1),
        (LengthMask(LENGTHS) & CausalMask() & LengthMask(LENGTHS), 1),
        ((ARRAY & CausalMask()) & ARRAY, 2),
        (CausalMask() & ~SEGMENTS & ARRAY, 2),
        (CausalMask(LENGTHS) & CausalMask(), 1),
        (CausalMask() & LocalMask(2, 1) & LengthMask(LENGTHS, LENGTHS) & SEGMENTS, 0),
    ],
    ids=str,
)
def test_the_rest(mask, rest):
    """Whatever is moved there, all of it together shows the same."""
    found = structure(mask)
    assert len(found.rest) == rest
    alone = found.without(
        *["band"] * found.banded,
        *["lengths"] * (found.kv_lengths is not None),
        *["segments"] * (found.kv_ids is not None),
    )
    assert alone == Structure(rest=alone.rest)
    same = as_mask(alone.joined).to_array(5, 5)
    np.testing.assert_array_equal(
        np.broadcast_to(same, (2, 1, 5, 5)), np.broadcast_to(mask.to_array(5, 5), (2, 1, 5, 5))
    )


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
