"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4) by the rules of panopticapi.

A predicted and a true segment of one category match if their IoU exceeds 0.5. For the union, the part of the prediction
that lies on VOID (pixels without annotation, id 0) does not count. Crowd regions are never matched and never missed. An
unmatched prediction is no false positive if more than half of it lies on VOID and on the crowd region of its category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convmask.utils.label_runs import LabelRuns, common_runs, encode_runs, position_of

VOID = 0


@dataclass
class QualityCounts:
    """What panoptic quality is made of, for each of K categories: add up over images and over processes.

    Attributes:
        iou: (K,) float64, sum of the IoUs of the matched pairs.
        true_positives, false_positives, false_negatives: (K,) int64.
    """

    iou: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray

    @classmethod
    def zeros(cls, num_categories: int) -> QualityCounts:
        """Counts of no image at all."""
        return cls(np.zeros(num_categories), *(np.zeros(num_categories, dtype=np.int64) for _ in range(3)))

    def __iadd__(self, other: QualityCounts) -> QualityCounts:
        """Adds the counts of other images."""
        self.iou += other.iou
        self.true_positives += other.true_positives
        self.false_positives += other.false_positives
        self.false_negatives += other.false_negatives
        return self

    def per_category(self) -> dict[str, np.ndarray]:
        """ "PQ", "SQ" and "RQ" of each category, (K,) each in [0, 1]; NaN for a category that occurs nowhere.

        PQ = (sum of IoUs) / (TP + FP/2 + FN/2) = SQ x RQ; SQ is 0 where nothing matches.
        """
        occurrences = self.true_positives + 0.5 * self.false_positives + 0.5 * self.false_negatives
        seen = occurrences > 0
        denominator = np.where(seen, occurrences, np.nan)
        matched_iou = np.where(self.true_positives > 0, self.iou / np.maximum(self.true_positives, 1), 0.0)
        return {
            "PQ": self.iou / denominator,
            "SQ": np.where(seen, matched_iou, np.nan),
            "RQ": self.true_positives / denominator,
        }

    def mean(self, selected: np.ndarray) -> dict[str, float]:
        """Means over those categories of the (K,) bool ``selected`` that occur.

        Returns:
            "PQ", "SQ", "RQ" in [0, 1], NaN where no category occurs; "N", how many do.
        """
        per_category = self.per_category()
        used = selected & ~np.isnan(per_category["PQ"])
        count = int(used.sum())
        means = {name: float(values[used].mean()) if count else float("nan") for name, values in per_category.items()}
        return {**means, "N": count}


@dataclass(frozen=True)
class SegmentedImage:
    """A panoptic map and its N segments.

    Attributes:
        runs: the id map; VOID is id 0.
        ids: (N,) int64, distinct, none of them 0.
        categories: (N,) int64, position of each segment's category in the list of categories.
        crowd: (N,) bool.
        areas: (N,) in pixels as the annotation states them, or None: counted in the map.
    """

    runs: LabelRuns
    ids: np.ndarray
    categories: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray | None = None


def segmented_image(
    id_map: np.ndarray, segments: Sequence[Mapping[str, Any]], category_positions: Mapping[int, int]
) -> SegmentedImage:
    """Checks and packs one panoptic map.

    Args:
        id_map: (H, W) integers, 0 where there is no segment.
        segments: each with "id" and "category_id"; "iscrowd" (0) and "area" (counted unless all have it) are optional.
        category_positions: category id -> position in the list of categories.

    Raises:
        ValueError: an id is 0 or listed twice, or a category is unknown.
    """
    ids = np.array([segment["id"] for segment in segments], dtype=np.int64)
    if (ids == VOID).any():
        raise ValueError(f"a segment has the id {VOID}, which stands for pixels without a segment")
    distinct, occurrences = np.unique(ids, return_counts=True)
    if distinct.size < ids.size:
        raise ValueError(f"the segment id {distinct[occurrences > 1][0]} is listed more than once")
    for segment in segments:
        if segment["category_id"] not in category_positions:
            raise ValueError(f"segment {segment['id']} has the unknown category_id {segment['category_id']}")
    has_areas = len(segments) > 0 and all("area" in segment for segment in segments)
    return SegmentedImage(
        runs=encode_runs(id_map),
        ids=ids,
        categories=np.array([category_positions[segment["category_id"]] for segment in segments], dtype=np.int64),
        crowd=np.array([bool(segment.get("iscrowd", 0)) for segment in segments], dtype=bool),
        areas=np.array([segment["area"] for segment in segments]) if has_areas else None,
    )


def check_ids_agree(image: SegmentedImage) -> None:
    """Checks that the map and the list of segments of a prediction hold the same ids, as panopticapi demands.

    Raises:
        ValueError: a pixel's id is not listed, or a listed segment has no pixel.
    """
    position = position_of(image.runs.values, image.ids)
    unlisted = image.runs.values[(position < 0) & (image.runs.values != VOID)]
    if unlisted.size:
        raise ValueError(f"the map holds the id {unlisted[0]}, which is not among the segments")
    empty = np.setdiff1d(np.arange(image.ids.size), position)
    if empty.size:
        raise ValueError(f"segment {image.ids[empty[0]]} is listed but has no pixel")


def overlap_counts(truth: SegmentedImage, prediction: SegmentedImage) -> np.ndarray:
    """Pixels that two segmentations of one image have in common.

    Returns:
        (G + 2, P + 2) int64 for G true and P predicted segments in their own order; the row and column before the last
        is VOID, the last takes ids that are in the map but not in the list.
    """
    rows, columns = (_with_void(image) for image in (truth, prediction))
    run_of_truth, run_of_prediction, lengths = common_runs(truth.runs, prediction.runs)
    shape = (truth.ids.size + 2, prediction.ids.size + 2)
    cell = rows[run_of_truth] * shape[1] + columns[run_of_prediction]
    # float64 weights are exact up to 2^53 pixels.
    return np.bincount(cell, weights=lengths, minlength=shape[0] * shape[1]).astype(np.int64).reshape(shape)


def _with_void(image: SegmentedImage) -> np.ndarray:
    """(R,) segment of each run: 0..N-1, N for VOID, N + 1 for an id that is not listed."""
    position = position_of(image.runs.values, image.ids)
    outside = np.where(image.runs.values == VOID, image.ids.size, image.ids.size + 1)
    return np.where(position >= 0, position, outside)


@dataclass(frozen=True)
class SegmentMatches:
    """What became of the G true and P predicted segments of one image.

    Attributes:
        rows, columns: (M,) int64, true and predicted segment of each matched pair.
        iou: (M,) of each pair.
        missed: (G,) bool, true segments that count as false negatives.
        wrong: (P,) bool, predictions that count as false positives.
        true_areas, predicted_areas: (G,) and (P,) in pixels.
    """

    rows: np.ndarray
    columns: np.ndarray
    iou: np.ndarray
    missed: np.ndarray
    wrong: np.ndarray
    true_areas: np.ndarray
    predicted_areas: np.ndarray


def count_matches(truth: SegmentedImage, prediction: SegmentedImage, num_categories: int) -> QualityCounts:
    """The counts of one image, equal to those of panopticapi's ``pq_compute_single_core``.

    Raises:
        ValueError: see :func:`find_matches`.
    """
    matches = find_matches(truth, prediction)
    return QualityCounts(
        np.bincount(truth.categories[matches.rows], weights=matches.iou, minlength=num_categories),
        np.bincount(truth.categories[matches.rows], minlength=num_categories),
        np.bincount(prediction.categories[matches.wrong], minlength=num_categories),
        np.bincount(truth.categories[matches.missed], minlength=num_categories),
    )


def find_matches(truth: SegmentedImage, prediction: SegmentedImage) -> SegmentMatches:
    """Matches the segments of one image by the rules of this module.

    Areas of true segments are those of the annotation where it states them, as in panopticapi.

    Raises:
        ValueError: the sizes differ, the prediction's map and list disagree, or a stated area is impossible.
    """
    if truth.runs.shape != prediction.runs.shape:
        raise ValueError(
            f"the prediction has {_size(prediction.runs.shape)} pixels, the ground truth {_size(truth.runs.shape)}"
        )
    check_ids_agree(prediction)
    overlap = overlap_counts(truth, prediction)
    num_truth, num_predicted = truth.ids.size, prediction.ids.size
    on_void = overlap[num_truth, :num_predicted]
    predicted_area = overlap[:, :num_predicted].sum(axis=0)
    true_area = overlap[:num_truth].sum(axis=1) if truth.areas is None else truth.areas
    intersection = overlap[:num_truth, :num_predicted]

    comparable = (truth.categories[:, None] == prediction.categories[None, :]) & ~truth.crowd[:, None]
    rows, columns = np.nonzero(comparable & (intersection > 0))
    shared = intersection[rows, columns]
    union = predicted_area[columns] + true_area[rows] - shared - on_void[columns]
    if (union <= 0).any():
        wrong = rows[union <= 0][0]
        raise ValueError(f"the true segment {truth.ids[wrong]} has the area {true_area[wrong]}, less than its pixels")
    iou = shared / union
    matched = iou > 0.5
    rows, columns, iou = rows[matched], columns[matched], iou[matched]

    missed = ~truth.crowd
    missed[rows] = False
    wrong_prediction = _on_ignored(truth, prediction, overlap) / predicted_area <= 0.5
    wrong_prediction[columns] = False
    return SegmentMatches(rows, columns, iou, missed, wrong_prediction, np.asarray(true_area), predicted_area)


def _on_ignored(truth: SegmentedImage, prediction: SegmentedImage, overlap: np.ndarray) -> np.ndarray:
    """(P,) pixels of each prediction on VOID and on the crowd region of its category.

    Where a category has several crowd regions, panopticapi takes the last one of the list only.
    """
    num_truth, num_predicted = truth.ids.size, prediction.ids.size
    ignored = overlap[num_truth, :num_predicted].copy()
    crowd_of_category = {int(truth.categories[row]): int(row) for row in np.flatnonzero(truth.crowd)}
    for category, row in crowd_of_category.items():
        of_category = prediction.categories == category
        ignored[of_category] += overlap[row, :num_predicted][of_category]
    return ignored


def image_quality(
    true_map: np.ndarray,
    true_segments: Sequence[Mapping[str, Any]],
    predicted_map: np.ndarray,
    predicted_segments: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
) -> QualityCounts:
    """Counts of one image from two (H, W) id maps and their segments (``segmented_image`` describes them).

    Args:
        category_ids: the K category ids; position k of the result belongs to the k-th.

    Raises:
        ValueError: the sizes differ, an id or a category is wrong; see ``segmented_image`` and ``count_matches``.
    """
    positions = {category: position for position, category in enumerate(category_ids)}
    truth = segmented_image(true_map, true_segments, positions)
    prediction = segmented_image(predicted_map, predicted_segments, positions)
    return count_matches(truth, prediction, len(category_ids))


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
