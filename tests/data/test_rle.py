from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convmask.data.errors import DatasetError
from convmask.data.rle import checked_polygons, checked_rle, run_lengths


def _runs_of(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F").astype(np.int8)
    borders = [*np.flatnonzero(np.diff(flat, prepend=0)).tolist(), flat.size]
    return np.diff([0, *borders]).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_run_lengths_are_those_of_pycocotools(height: int, width: int, seed: int, share: float):
    mask = np.random.default_rng(seed).random((height, width)) < share
    encoded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert run_lengths(encoded["counts"]).tolist() == _runs_of(mask)
    assert run_lengths(encoded["counts"].decode()).tolist() == _runs_of(mask)
    for counts in (encoded["counts"].decode(), _runs_of(mask)):
        checked = checked_rle({"size": [height, width], "counts": counts}, height, width)
        assert np.array_equal(mask_util.decode(checked), mask)


def test_long_runs():
    mask = np.zeros((3000, 4000), dtype=np.uint8)
    mask[5:2000, 7:3900] = 1
    encoded = mask_util.encode(np.asfortranarray(mask))
    assert run_lengths(encoded["counts"]).sum() == mask.size


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_runs_or_an_error(counts: bytes):
    try:
        checked = checked_rle({"size": [5, 4], "counts": counts}, 5, 4)
    except DatasetError:
        return
    assert mask_util.decode(checked).shape == (5, 4)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"counts": [20]}, "RLE size is None"),
        ({"size": [4, 5], "counts": [20]}, "RLE size is [4, 5], the image has height and width [5, 4]"),
        ({"size": [5, 4], "counts": [3, 4]}, "RLE counts cover 7 pixels, the image has 20"),
        ({"size": [5, 4], "counts": [30, -10]}, "negative run (-10)"),
        ({"size": [5, 4], "counts": [1.5, 18.5]}, "not a list of integers"),
        ({"size": [5, 4], "counts": [[20]]}, "not a list of integers"),
        ({"size": [5, 4], "counts": None}, "RLE counts are NoneType"),
        ({"size": [5, 4], "counts": "äö"}, "not ASCII"),
        ({"size": [5, 4], "counts": "P" * 9}, "no compressed RLE"),
        ({"size": [5, 4], "counts": [2**47] * 20}, "the image has 20"),
        ({"size": [5, 4], "counts": [2**80]}, "not a list of integers"),
    ],
)
def test_wrong_rle_is_refused(segmentation, message):
    with pytest.raises(DatasetError) as error:
        checked_rle(segmentation, 5, 4)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("polygons", "message"),
    [
        ([[0, 0, 1, 1, float("nan"), 3]], "NaN or infinite"),
        ([[0, 0, 1, 1, float("inf"), 3]], "NaN or infinite"),
        ([[0, 0, 1, 1, 1e9, 3]], "reaches from 0 to 1000000000.0"),
        ([[0, 0, 1, 1, "2", 3]], "something that is not a number"),
        ([7], "is not a list of coordinates"),
    ],
)
def test_wrong_polygons_are_refused(polygons, message):
    with pytest.raises(DatasetError) as error:
        checked_polygons(polygons, 20, 30)
    assert message in str(error.value)


def test_polygons_under_three_points_are_dropped():
    assert checked_polygons([[1, 1, 2, 2], [0, 0, 5, 0, 5, 5], [1, 2, 3]], 9, 9) == [[0, 0, 5, 0, 5, 5]]
