"""Regions of one image, predicted and true, and which of them belong together.

Predictions in descending order of score take, whatever its class is, the free true region with which they have the
largest IoU, if that reaches 0.5; of equal ones one of their own class. Without scores, pairs are formed in descending
order of IoU. So a right region with a wrong label is told from one that is not there at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util


@dataclass(frozen=True)
class Region:
    """An object, or a segment of stuff.

    Attributes:
        category_id: the dataset's.
        code: its mask, compressed run-length code.
        score: of a prediction that has one.
        crowd: a true region that is neither found nor missed.
    """

    category_id: int
    code: Mapping[str, Any]
    score: float | None = None
    crowd: bool = False


def box_code(box: Sequence[float], height: int, width: int) -> Mapping[str, Any]:
    """The run-length code of what a box (x, y, width, height) covers of an image."""
    x1, x2 = (min(max(value, 0.0), float(width)) for value in (box[0], box[0] + box[2]))
    y1, y2 = (min(max(value, 0.0), float(height)) for value in (box[1], box[1] + box[3]))
    # clipped first: pycocotools takes memory in proportion to the outline
    clipped = np.array([[x1, y1, max(x2 - x1, 0.0), max(y2 - y1, 0.0)]], dtype=np.float64)
    code: Mapping[str, Any] = mask_util.frPyObjects(clipped, height, width)[0]
    return code


@dataclass(frozen=True)
class RegionMatches:
    """What became of the regions of one image.

    Attributes:
        pairs: (prediction, true region, IoU) of each pair.
        false: predictions without a partner; not those that lie on crowd, or where nothing is annotated.
        missed: true regions without a partner.
        right, confused: how many pairs are of one class, and of two.
    """

    pairs: tuple[tuple[int, int, float], ...]
    false: tuple[int, ...]
    missed: tuple[int, ...]
    right: int
    confused: int
    iou: float

    @property
    def quality(self) -> float:
        """Sum of the IoUs of right pairs over TP + FP/2 + FN/2 (panoptic quality of the image, all classes together).

        A confused pair is both a false positive and a false negative. 1 where there is nothing and nothing is found.
        """
        errors = len(self.false) + len(self.missed) + 2 * self.confused
        return self.iou / (self.right + errors / 2) if self.right + errors else 1.0

    @property
    def errors(self) -> int:
        """How many predictions are false, objects missed, and pairs confused."""
        return len(self.false) + len(self.missed) + self.confused


def match_regions(
    found: Sequence[Region], truth: Sequence[Region], threshold: float = 0.5, void: bool = False
) -> RegionMatches:
    """Matches the regions of one image by the rules of this module.

    Args:
        found: predictions.
        truth: annotations.
        threshold: least IoU of a pair.
        void: pixels that no true region has are not annotated: a prediction of which more than half lies there is no
            error. So it is with panoptic annotations.
    """
    pairs: list[tuple[int, int, float]] = []
    shape = (len(found), len(truth))
    iou, share = (_overlaps(found, truth, crowd) for crowd in (0, 1))
    crowd = np.array([region.crowd for region in truth], dtype=bool)
    same = np.array([[x.category_id == y.category_id for y in truth] for x in found], dtype=bool).reshape(shape)
    scores = np.array([region.score or 0.0 for region in found])
    rows, columns = np.nonzero((iou >= max(threshold, 1e-12)) & ~crowd)
    order = np.lexsort((~same[rows, columns], -iou[rows, columns], -scores[rows]))
    free, unfound = np.ones(shape[0], dtype=bool), ~crowd
    for index in order:
        row, column = int(rows[index]), int(columns[index])
        if free[row] and unfound[column]:
            free[row] = unfound[column] = False
            pairs.append((row, column, float(iou[row, column])))
    for row in np.flatnonzero(free).tolist():
        ignored = share[row, crowd & same[row]].sum() + (1 - share[row].sum() if void else 0)
        free[row] = ignored <= 0.5
    right = [value for row, column, value in pairs if same[row, column]]
    return RegionMatches(
        tuple(pairs),
        tuple(np.flatnonzero(free).tolist()),
        tuple(np.flatnonzero(unfound).tolist()),
        len(right),
        len(pairs) - len(right),
        sum(right),
    )


def _overlaps(found: Sequence[Region], truth: Sequence[Region], crowd: int) -> np.ndarray:
    """(P, G) IoU, or with ``crowd`` the share of each prediction that is on each true region."""
    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    codes = [[region.code for region in regions] for regions in (found, truth)]
    return np.asarray(mask_util.iou(*codes, [crowd] * len(truth)))


class Confusion:
    """Counts of true against predicted classes over images.

    Attributes:
        names: K class names.
        counts: (K + 1, K + 1) int64: rows are true classes, the last one "nothing" (false positives); columns are
            predicted classes, the last one "nothing" (missed).
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        """Takes category id to name, in order."""
        self._positions = {identity: position for position, identity in enumerate(names)}
        self.names = list(names.values())
        self.counts = np.zeros((len(names) + 1, len(names) + 1), dtype=np.int64)

    def add(self, found: Sequence[Region], truth: Sequence[Region], matches: RegionMatches) -> None:
        """Adds an image."""
        nothing = len(self.names)
        for row, column, _ in matches.pairs:
            self.counts[self._positions[truth[column].category_id], self._positions[found[row].category_id]] += 1
        for row in matches.false:
            self.counts[nothing, self._positions[found[row].category_id]] += 1
        for column in matches.missed:
            self.counts[self._positions[truth[column].category_id], nothing] += 1

    def most_frequent(self, limit: int = 10) -> list[tuple[str, str, int]]:
        """True class, predicted class and number of the most frequent confusions of two classes."""
        wrong = self.counts[:-1, :-1].copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
        places = [divmod(int(index), wrong.shape[1]) for index in order]
        return [(self.names[i], self.names[j], int(wrong[i, j])) for i, j in places if wrong[i, j]]
