from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import pytest

from convmask.analysis.dataset import size_ranges
from convmask.analysis.regions import Confusion, Region, box_code, match_regions


def region(category: int, box: tuple[int, int, int, int], score: float | None = None, crowd: bool = False) -> Region:
    mask = np.zeros((40, 60), dtype=np.uint8, order="F")
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = 1
    return Region(category, mask_util.encode(mask), score, crowd)


BOX = (5, 5, 25, 25)


def test_pairs_are_formed_whatever_the_class_is() -> None:
    found = [region(1, BOX, 0.9), region(2, (30, 5, 50, 25), 0.8), region(1, (5, 30, 10, 35), 0.7)]
    truth = [region(1, BOX), region(1, (30, 5, 50, 24)), region(2, (50, 30, 60, 40))]
    matches = match_regions(found, truth)
    assert [pair[:2] for pair in matches.pairs] == [(0, 0), (1, 1)]
    assert (matches.false, matches.missed, matches.right, matches.confused) == ((2,), (2,), 1, 1)
    assert matches.quality == pytest.approx(1 / (1 + (1 + 1 + 2) / 2)) and matches.errors == 3
    confusion = Confusion({1: "a", 2: "b"})
    confusion.add(found, truth, matches)
    assert confusion.counts.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert confusion.most_frequent() == [("a", "b", 1)]


def test_the_higher_score_comes_first_then_the_overlap_then_the_right_class() -> None:
    near = (5, 5, 25, 24)
    truth = [region(1, BOX)]
    assert match_regions([region(1, BOX, 0.1), region(2, near, 0.9)], truth).pairs[0][0] == 1
    assert match_regions([region(2, near), region(1, BOX)], truth).pairs[0][0] == 1
    assert match_regions([region(2, BOX), region(1, BOX)], truth).pairs[0][0] == 1
    two = [region(2, BOX), region(1, BOX), region(1, near)]
    assert match_regions([region(1, BOX, 0.9)], two).pairs[0][1] == 1


def test_crowd_is_neither_missed_nor_false() -> None:
    truth = [region(1, (0, 0, 30, 40), crowd=True)]
    assert match_regions([region(1, BOX, 0.9)], truth).errors == 0
    assert match_regions([region(2, BOX, 0.9)], truth).false == (0,)
    assert match_regions([region(1, (20, 0, 50, 40), 0.9)], truth).false == (0,)


def test_what_lies_on_void_is_no_error_where_there_is_void() -> None:
    truth = [region(1, (30, 0, 60, 40))]
    found = [region(1, (0, 0, 40, 10), 0.9)]
    assert match_regions(found, truth, void=True).false == ()
    assert match_regions(found, truth).false == (0,)


def test_nothing() -> None:
    assert match_regions([], []).quality == 1
    assert match_regions([region(1, BOX, 0.5)], []).quality == 0
    assert match_regions([], [region(1, BOX)]).quality == 0


def test_parts_of_equal_number() -> None:
    ranges = size_ranges(np.arange(1, 101), 4)
    assert [sum(low <= area <= high for area in range(1, 101)) for low, high in ranges.values()] == [25] * 4
    assert list(size_ranges(np.full(9, 5), 4).values()) == [(0.0, 5.5), (5.5, 1e10)]
    assert size_ranges(np.zeros(0), 4) == {}


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((5, 5, 10, 4), 40),
        ((-5, -5, 10, 10), 25),
        ((-1e12, 0, 2e12, 1e12), 2400),
        ((70, 5, 10, 10), 0),
        ((5, 5, 0, 9), 0),
    ],
)
def test_boxes_are_clipped_to_the_image(box: tuple[float, ...], pixels: int) -> None:
    assert mask_util.decode(box_code(box, 40, 60)).sum() == pixels
