from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
from hypothesis import given, settings
from hypothesis import strategies as st

from convmask.utils.label_runs import common_runs, encode_masks, encode_runs, position_of

label_maps = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5)).map(
    lambda args: np.random.default_rng(args[0]).integers(0, args[3], size=args[1:3])
)


@settings(max_examples=50, deadline=None)
@given(label_map=label_maps)
def test_runs_decode_to_the_map(label_map):
    for view in (label_map, label_map.T, label_map[::-1]):
        runs = encode_runs(view)
        np.testing.assert_array_equal(runs.decode(), view)
        assert (runs.values[1:] != runs.values[:-1]).all()
        assert runs.lengths.sum() == view.size


@settings(max_examples=50, deadline=None)
@given(label_map=label_maps, seed=st.integers(0, 1000))
def test_common_runs_pair_every_pixel(label_map, seed):
    other = np.random.default_rng(seed).integers(0, 3, size=label_map.shape)
    a, b = encode_runs(label_map), encode_runs(other)
    run_a, run_b, lengths = common_runs(a, b)
    np.testing.assert_array_equal(np.repeat(a.values[run_a], lengths), label_map.reshape(-1))
    np.testing.assert_array_equal(np.repeat(b.values[run_b], lengths), other.reshape(-1))


@settings(max_examples=50, deadline=None)
@given(label_map=label_maps)
def test_masks_equal_those_of_pycocotools(label_map):
    ids = [4, 0, 2, 9]
    masks = encode_masks(label_map, ids)
    for identity, mask in zip(ids, masks, strict=True):
        expected = mask_util.encode(np.asfortranarray(label_map == identity, dtype=np.uint8))
        assert mask == {"size": list(expected["size"]), "counts": expected["counts"].decode()}


def test_encode_masks_of_nothing():
    assert encode_masks(np.zeros((3, 4), dtype=np.int32), []) == []


def test_position_of():
    assert position_of(np.array([7, 0, 3, 99, 3]), np.array([99, 3])).tolist() == [-1, -1, 1, 0, 1]
    assert position_of(np.array([7]), np.array([], dtype=np.int64)).tolist() == [-1]
