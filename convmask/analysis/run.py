"""One run: AP and PQ by class and by size, what is taken for what, and how well each image came out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from convmask.analysis.dataset import size_ranges
from convmask.analysis.regions import Confusion, Region, RegionMatches, match_regions
from convmask.analysis.saved_results import SavedResults
from convmask.evaluation.coco import evaluate_detections
from convmask.evaluation.panoptic_quality import QualityCounts, SegmentMatches, find_matches

# COCO's sizes, in pixels.
COCO_RANGES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}

TITLES = {"segm": "instances (masks)", "bbox": "instances (boxes)", "panoptic_seg": "panoptic"}

Row = dict[str, Any]
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class ImageScore:
    """How well an image came out; see :class:`convmask.analysis.regions.RegionMatches`."""

    quality: float
    right: int
    confused: int
    false: int
    missed: int

    @classmethod
    def of(cls, matches: RegionMatches) -> ImageScore:
        """Takes the numbers of an image's matches."""
        return cls(matches.quality, matches.right, matches.confused, len(matches.false), len(matches.missed))

    @property
    def errors(self) -> int:
        """How many."""
        return self.confused + self.false + self.missed


@dataclass(frozen=True)
class KindAnalysis:
    """The results of one kind, "instances" or "panoptic".

    Attributes:
        task: what is measured, as evaluators name it: "segm" or "bbox" for instances, "panoptic_seg".
        measure: the main number of a row: "AP" or "PQ".
        totals: of the whole dataset, in percent.
        by_class: a row for each category: "name", "objects", and measures in percent, NaN without objects.
        by_size: a row for each range of areas: "name", "low", "high", "objects", and measures in percent.
        confusion: of all images.
        images: by image id.
        threshold: predictions with a lower score have no part in confusion and images; None: all have.
    """

    kind: str
    task: str
    measure: str
    totals: dict[str, float]
    by_class: list[Row]
    by_size: list[Row]
    confusion: Confusion
    images: dict[Hashable, ImageScore]
    threshold: float | None = None

    @property
    def title(self) -> str:
        """Kind and task, for readers."""
        return TITLES[self.task]

    def worst_images(self, limit: int) -> list[Hashable]:
        """Image ids in ascending order of quality; of equal ones those with more errors first."""
        order = sorted(self.images, key=lambda image: (self.images[image].quality, -self.images[image].errors))
        return order[:limit]

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``json.dumps``; NaN becomes None."""
        images = [{"image_id": image, **asdict(score)} for image, score in self.images.items()]
        confusion = {"classes": [*self.confusion.names, None], "counts": self.confusion.counts.tolist()}
        return {
            "task": self.task,
            "measure": self.measure,
            "score_threshold": self.threshold,
            "totals": without_nan(self.totals),
            "by_class": [without_nan(row) for row in self.by_class],
            "by_size": [without_nan(row) for row in self.by_size],
            "confusion": confusion,
            "images": images,
        }


@dataclass(frozen=True)
class RunAnalysis:
    """A run, with an analysis of each kind of results that it has."""

    results: SavedResults
    kinds: dict[str, KindAnalysis]

    def regions(self, kind: str, image_id: Hashable) -> tuple[list[Region], list[Region], RegionMatches]:
        """Predictions, annotations and their matches of one image."""
        dataset = self.results.dataset
        if kind == "panoptic":
            found = self.results.found_segments(self.results.segmented_image(image_id))
            truth = dataset.true_segments(image_id)
        else:
            found = self.results.found_objects(image_id, self.kinds[kind].threshold or 0.0)
            truth = dataset.true_objects(image_id)
        return found, truth, match_regions(found, truth, void=kind == "panoptic")


def analyse(
    results: SavedResults,
    *,
    score_threshold: float | None = None,
    quantiles: int = 4,
    max_detections: int = 100,
    progress: Progress = lambda items, _: items,
) -> RunAnalysis:
    """Analyses everything that a run has saved.

    Args:
        results: of the run.
        score_threshold: of detections in confusion and images; by default the one with the best F1 at IoU 0.5.
        quantiles: parts of equal number that objects are divided into by area.
        max_detections: of an image, for AP.
        progress: wraps the images that are gone through, with a description.

    Raises:
        DatasetError: a panoptic map cannot be read or is contradictory.
    """
    kinds = {}
    if results.panoptic is not None:
        kinds["panoptic"] = _analyse_panoptic(results, quantiles, progress)
    if results.detections is not None and results.dataset.thing_names:
        kinds["instances"] = _analyse_instances(results, score_threshold, quantiles, max_detections, progress)
    return RunAnalysis(results, kinds)


def _analyse_instances(
    results: SavedResults, threshold: float | None, quantiles: int, max_detections: int, progress: Progress
) -> KindAnalysis:
    dataset, detections = results.dataset, results.detections or []
    names = dataset.thing_names
    truths = [x for x in dataset.instances.dataset["annotations"] if not x.get("iscrowd") and x["category_id"] in names]
    areas = np.array([entry["area"] for entry in truths], dtype=float)
    ranges = size_ranges(areas, quantiles)
    masks = all("segmentation" in entry for entry in detections) and all(entry.get("segmentation") for entry in truths)
    task = "segm" if masks else "bbox"
    evaluation = evaluate_detections(
        dataset.instances, detections, task, max_detections, category_ids=list(names), area_ranges=ranges
    )
    counts = {identity: sum(entry["category_id"] == identity for entry in truths) for identity in names}
    by_class = [
        {
            "name": name,
            "objects": counts[identity],
            **_ap(evaluation, category=index),
            **_ap_by_coco_size(evaluation, index),
        }
        for index, (identity, name) in enumerate(names.items())
    ]
    by_size = []
    for index, (name, (low, high)) in enumerate({**COCO_RANGES, **ranges}.items(), start=1):
        number = int(((areas >= low) & (areas <= high)).sum())
        by_size.append({"name": name, "low": low, "high": high, "objects": number, **_ap(evaluation, area=index)})
    if threshold is None:
        threshold = best_threshold(evaluation)
    confusion = Confusion(names)
    images: dict[Hashable, ImageScore] = {}
    for image_id in progress(dataset.instances.getImgIds(), "Comparing instances"):
        found, truth = results.found_objects(image_id, threshold), dataset.true_objects(image_id)
        matches = match_regions(found, truth)
        confusion.add(found, truth, matches)
        images[image_id] = ImageScore.of(matches)
    return KindAnalysis("instances", task, "AP", _ap(evaluation), by_class, by_size, confusion, images, threshold)


def _ap(evaluation: COCOeval, category: int | None = None, area: int = 0) -> dict[str, float]:
    """AP, AP50, AP75 in percent; NaN where there are no objects."""
    precision = evaluation.eval["precision"][..., area, -1]  # IoU threshold, recall, category
    if category is not None:
        precision = precision[:, :, category : category + 1]
    thresholds = evaluation.params.iouThrs
    parts = {"AP": precision} | {
        f"AP{round(100 * value)}": precision[np.isclose(thresholds, value)] for value in (0.5, 0.75)
    }
    return {
        key: 100 * float(part[part > -1].mean()) if (part > -1).any() else float("nan") for key, part in parts.items()
    }


def _ap_by_coco_size(evaluation: COCOeval, category: int) -> dict[str, float]:
    return {f"AP{name[0]}": _ap(evaluation, category, area)["AP"] for area, name in enumerate(COCO_RANGES, start=1)}


def best_threshold(evaluation: COCOeval) -> float:
    """The score from which on detections of all classes have the best F1 at IoU 0.5; 0 where there are none."""
    everything = evaluation.params.areaRng[0]
    entries = [entry for entry in evaluation.evalImgs if entry is not None and list(entry["aRng"]) == list(everything)]
    if not entries:
        return 0.0
    objects = sum(int((~np.asarray(entry["gtIgnore"], dtype=bool)).sum()) for entry in entries)
    ignored = np.concatenate([np.asarray(entry["dtIgnore"], dtype=bool)[0] for entry in entries])
    scores = np.concatenate([np.asarray(entry["dtScores"], dtype=float) for entry in entries])[~ignored]
    right = np.concatenate([np.asarray(entry["dtMatches"])[0] > 0 for entry in entries])[~ignored]
    if not len(scores) or not objects:
        return 0.0
    order = np.argsort(-scores, kind="stable")
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + objects)
    return float(scores[order][f1.argmax()])


@dataclass(frozen=True)
class _Segments:
    """Matches of all images in one table: category, area, IoU (0 for errors), kind (0 right, 1 wrong, 2 missed)."""

    category: np.ndarray
    area: np.ndarray
    iou: np.ndarray
    kind: np.ndarray

    @classmethod
    def of_image(cls, truth: np.ndarray, predicted: np.ndarray, matches: SegmentMatches) -> _Segments:
        missed, wrong = np.flatnonzero(matches.missed), np.flatnonzero(matches.wrong)
        return cls(
            np.concatenate([truth[matches.rows], predicted[wrong], truth[missed]]),
            np.concatenate(
                [matches.true_areas[matches.rows], matches.predicted_areas[wrong], matches.true_areas[missed]]
            ).astype(float),
            np.concatenate([matches.iou, np.zeros(len(wrong) + len(missed))]),
            np.repeat([0, 1, 2], [len(matches.rows), len(wrong), len(missed)]),
        )

    def counts(self, chosen: np.ndarray, number: int) -> QualityCounts:
        def count(kind: int) -> np.ndarray:
            return np.bincount(self.category[chosen & (self.kind == kind)], minlength=number)

        iou = np.bincount(self.category[chosen], weights=self.iou[chosen], minlength=number)
        return QualityCounts(iou, count(0), count(1), count(2))


def _analyse_panoptic(results: SavedResults, quantiles: int, progress: Progress) -> KindAnalysis:
    dataset = results.dataset
    names = dataset.segment_names
    confusion = Confusion(names)
    images: dict[Hashable, ImageScore] = {}
    parts: list[_Segments] = []
    for image_id in progress(list(results.panoptic or ()), "Comparing panoptic maps"):
        truth, prediction = dataset.panoptic.image(image_id), results.segmented_image(image_id)
        parts.append(_Segments.of_image(truth.categories, prediction.categories, find_matches(truth, prediction)))
        found, true_segments = results.found_segments(prediction), dataset.true_segments(image_id)
        matches = match_regions(found, true_segments, void=True)
        confusion.add(found, true_segments, matches)
        images[image_id] = ImageScore.of(matches)
    table = _Segments(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("category", "area", "iou", "kind"))
    )
    number, isthing = len(names), dataset.panoptic.categories.isthing
    everything = table.counts(np.ones(len(table.area), dtype=bool), number)
    totals = {
        f"{measure}{suffix}": 100 * everything.mean(chosen)[measure]
        for suffix, chosen in (("", np.ones(number, dtype=bool)), ("_th", isthing), ("_st", ~isthing))
        for measure in ("PQ", "SQ", "RQ")
    }
    by_class = _panoptic_rows(list(names.values()), everything)
    true_areas = table.area[table.kind != 1]
    by_size = []
    for name, (low, high) in {**COCO_RANGES, **size_ranges(true_areas, quantiles)}.items():
        chosen = (table.area >= low) & (table.area < high)
        means = table.counts(chosen, number).mean(np.ones(number, dtype=bool))
        objects = int((chosen & (table.kind != 1)).sum())
        values = {measure: 100 * means[measure] for measure in ("PQ", "SQ", "RQ")}
        by_size.append({"name": name, "low": low, "high": high, "objects": objects, **values})
    return KindAnalysis("panoptic", "panoptic_seg", "PQ", totals, by_class, by_size, confusion, images)


def _panoptic_rows(names: Sequence[str], counts: QualityCounts) -> list[Row]:
    values = counts.per_category()
    return [
        {
            "name": name,
            "objects": int(counts.true_positives[index] + counts.false_negatives[index]),
            **{measure: 100 * float(values[measure][index]) for measure in ("PQ", "SQ", "RQ")},
            "TP": int(counts.true_positives[index]),
            "FP": int(counts.false_positives[index]),
            "FN": int(counts.false_negatives[index]),
        }
        for index, name in enumerate(names)
    ]


def without_nan(row: Row) -> Row:
    """The row with None for NaN, which json has not."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row.items()}
