"""mAP^r of PASCAL VOC and SBD: average precision of masks at fixed IoU (Hariharan et al., ECCV 2014).

VOC's rule: in descending order of score, over the whole dataset, a detection belongs to the object of its class with
which it has the largest IoU. It is right if that IoU reaches the threshold and no detection before it had the object.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.structures import polygons_to_bitmask
from detectron2.utils import comm

Detection = tuple[Hashable, int, float, Mapping[str, Any]]  # image, class, score, run-length code

METRICS = {"07": True, "area": False}


class VOCInstanceEvaluator(DatasetEvaluator):
    """mAP^r at given IoU thresholds, by VOC 2007's eleven points and by the area under the curve.

    A model without masks gives no results, and one log line says so. Annotations marked as crowds are left out.
    """

    def __init__(
        self, dataset_name: str, thresholds: Sequence[float] = (0.5, 0.7), *, distributed: bool = True
    ) -> None:
        """Takes a registered dataset.

        Args:
            dataset_name: in Detectron2's catalogs; its dicts have ``annotations`` with masks.
            thresholds: of the IoU.
            distributed: evaluate the predictions of all processes. Otherwise this process has seen the whole dataset.

        Raises:
            ValueError: a threshold is not above 0 and at most 1.
        """
        wrong = [threshold for threshold in thresholds if not 0 < threshold <= 1]
        if wrong or not thresholds:
            raise ValueError(f"thresholds are {list(thresholds)}: each must be above 0 and at most 1")
        self._name = dataset_name
        self._classes: list[str] = MetadataCatalog.get(dataset_name).thing_classes
        self._thresholds = tuple(thresholds)
        self._distributed = distributed
        self._logger = logging.getLogger(__name__)
        self.reset()

    def reset(self) -> None:
        """Forgets all predictions."""
        self._detections: list[Detection] = []
        self._has_masks = False

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the predictions of a batch, masks as run-length codes.

        Args:
            inputs: dataset dicts with "image_id".
            outputs: model outputs with "instances" (``scores``, ``pred_classes``, ``pred_masks``).
        """
        for given, output in zip(inputs, outputs, strict=True):
            if "instances" not in output or not output["instances"].has("pred_masks"):
                continue
            self._has_masks = True
            found = output["instances"].to("cpu")
            codes = [mask_util.encode(np.asfortranarray(mask, np.uint8)) for mask in found.pred_masks.numpy()]
            rows = zip(found.pred_classes.tolist(), found.scores.tolist(), codes, strict=True)
            self._detections += [(given["image_id"], *row) for row in rows]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Evaluates on all images of the dataset.

        Returns:
            ``{"mAPr": {"AP50-07", "AP50-area", "AP70-07", ..., "AP50-07-<class>", ...}}`` in percent; NaN for a class
            without objects, which has no part in the means. Empty in other processes than the first, and where the
            model gives no masks.
        """
        detections, has_masks = self._detections, self._has_masks
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather((detections, has_masks), dst=0)
            if not comm.is_main_process():
                return {}
            detections = list(itertools.chain.from_iterable(part[0] for part in gathered))
            has_masks = any(part[1] for part in gathered)
        if not has_masks:
            self._logger.info("The model gives no masks: mAP^r is not evaluated.")
            return {}
        truth = true_masks(DatasetCatalog.get(self._name))
        results = {}
        for threshold in self._thresholds:
            for metric, eleven_points in METRICS.items():
                name = f"AP{round(100 * threshold)}-{metric}"
                values = [
                    100 * average_precision(truth, detections, category, threshold, eleven_points=eleven_points)
                    for category in range(len(self._classes))
                ]
                known = [value for value in values if not np.isnan(value)]
                results[name] = float(np.mean(known)) if known else float("nan")
                results |= {f"{name}-{label}": value for label, value in zip(self._classes, values, strict=True)}
        means = {name: results[name] for name in results if name.count("-") == 1}
        self._logger.info("mAP^r: %s", ", ".join(f"{name} {value:.1f}" for name, value in means.items()))
        return {"mAPr": results}


def true_masks(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[Hashable, list[Any]]]:
    """Class -> image -> run-length codes of its objects."""
    truth: dict[int, dict[Hashable, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for annotation in record["annotations"]:
            if not annotation.get("iscrowd", 0):
                code = _code(annotation["segmentation"], record["height"], record["width"])
                truth[annotation["category_id"]][record["image_id"]].append(code)
    return truth


def average_precision(
    truth: Mapping[int, Mapping[Hashable, Sequence[Any]]],
    detections: Sequence[Detection],
    category: int,
    threshold: float,
    *,
    eleven_points: bool,
) -> float:
    """The average precision of one class, from 0 to 1; NaN where there are no objects.

    Args:
        truth: see :func:`true_masks`.
        detections: of all classes.
        category: the class.
        threshold: least IoU.
        eleven_points: VOC 2007's metric, else the area under the curve.
    """
    objects = truth.get(category, {})
    total = sum(len(codes) for codes in objects.values())
    if total == 0:
        return float("nan")
    found = [detection for detection in detections if detection[1] == category]
    if not found:
        return 0.0
    by_image: dict[Hashable, list[int]] = defaultdict(list)
    for index, detection in enumerate(found):
        by_image[detection[0]].append(index)
    best, nearest = np.zeros(len(found)), np.full(len(found), -1)
    for image, indices in by_image.items():
        codes = list(objects.get(image, []))
        # one by one: pycocotools 2.0 with numpy 2 fails on long lists
        for index in indices if codes else ():
            overlaps = mask_util.iou([found[index][3]], codes, [0] * len(codes))[0]
            nearest[index] = int(overlaps.argmax())
            best[index] = overlaps[nearest[index]]
    order = np.argsort([-detection[2] for detection in found], kind="stable")
    taken: set[tuple[Hashable, int]] = set()
    right = np.zeros(len(found))
    for rank, index in enumerate(order):
        match = found[index][0], int(nearest[index])
        if best[index] >= threshold and match not in taken:
            taken.add(match)
            right[rank] = 1
    hits = right.cumsum()
    return float(voc_ap(hits / total, hits / np.arange(1, len(found) + 1), eleven_points))


def _code(segmentation: Any, height: int, width: int) -> Any:
    """The run-length code of an annotation: a code, compressed or not, or polygons."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, height, width)
        return segmentation
    return mask_util.encode(np.asfortranarray(polygons_to_bitmask(segmentation, height, width), np.uint8))
