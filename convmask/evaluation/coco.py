"""COCO's average precision of boxes and masks with a detection limit of one's own.

pycocotools matches and accumulates. Ground truth comes from the dataset's COCO json, or from its panoptic id maps.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from convmask.evaluation.boundary import BoundaryCOCOeval
from convmask.evaluation.ground_truth import PanopticGroundTruth
from convmask.utils.files import write_atomically
from convmask.utils.label_runs import encode_masks

TASKS = ("bbox", "segm")
BOUNDARY = "boundary_segm"


class COCOEvaluator(Detectron2COCOEvaluator):
    """AP, AP50, AP75, APs, APm, APl and the AP of each category, of boxes and masks.

    Differs from Detectron2's evaluator in this: any limit on the detections of an image; ground truth made in memory,
    never cached on disk; AP 0, not NaN, where a model detects nothing; always the official pycocotools; no keypoints.
    NaN means that there is no ground truth of that kind. A model without ``instances`` and ``proposals`` gives no
    results, and one log line says so.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int = 100,
        ground_truth: PanopticGroundTruth | None = None,
        boundary: bool = False,
    ) -> None:
        """Takes a registered dataset.

        Args:
            dataset_name: name in Detectron2's catalogs, with ``json_file`` in its metadata, with panoptic annotations,
                or with Detectron2's ``annotations`` in its dicts.
            tasks: of "bbox" and "segm"; by default boxes, and masks where predictions have them.
            distributed: evaluate the predictions of all processes. Otherwise this process has seen the whole dataset.
            output_dir: a folder for ``coco_instances_results.json``.
            max_dets_per_image: AP counts this many detections of an image, those of the highest score.
            ground_truth: of a panoptic dataset, shared with other evaluators; made here by default.
            boundary: also evaluate boundary AP (:mod:`convmask.evaluation.boundary`), where predictions have masks.

        Raises:
            ValueError: an unknown task, or a limit below 1.
        """
        if not set(tasks or ()) <= set(TASKS):
            raise ValueError(f"tasks are {tasks!r}, not some of {TASKS}")
        if max_dets_per_image < 1:
            raise ValueError(f"max_dets_per_image is {max_dets_per_image}, but must be at least 1")
        # Detectron2's own __init__ writes a json of the ground truth and puts its path into the metadata. What follows
        # is all that the inherited methods use.
        self._logger = logging.getLogger(__name__)
        self._distributed = distributed
        self._output_dir = output_dir
        self._tasks = tasks
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._max_dets_per_image = max_dets_per_image
        self._boundary = boundary
        self._ground_truth: PanopticGroundTruth | None = None
        self._coco_api = COCO()
        self._do_evaluation = True
        self._prepare_ground_truth(dataset_name, ground_truth)
        self.reset()

    def _prepare_ground_truth(self, dataset_name: str, ground_truth: PanopticGroundTruth | None) -> None:
        if not self._metadata.get("json_file") and (ground_truth or _has_panoptic_truth(self._metadata)):
            self._ground_truth = ground_truth or PanopticGroundTruth(dataset_name)
            return
        self._coco_api = true_instances(dataset_name)
        # The json of a test set has no annotations: its results are only written.
        self._do_evaluation = "annotations" in self._coco_api.dataset

    def reset(self) -> None:
        """Forgets all predictions."""
        self._predictions: list[dict[str, Any]] = []
        self._true_masks: dict[Hashable, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        self._has_masks = False

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the predictions of a batch, masks as run-length codes.

        Args:
            inputs: dataset dicts with "image_id".
            outputs: model outputs with "instances" (``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks``).
        """
        super().process(inputs, outputs)
        self._has_masks |= any("instances" in output and output["instances"].has("pred_masks") for output in outputs)
        if self._ground_truth and self._predictions:
            # Other evaluators of this pass have the annotation in hand just now.
            for given in inputs:
                self._true_masks[given["image_id"]] = panoptic_to_coco(self._ground_truth, given["image_id"])

    def evaluate(self, img_ids: Sequence[Hashable] | None = None) -> dict[str, dict[str, float]]:
        """Evaluates on all images, or on ``img_ids``.

        Returns:
            ``{"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-<category>", ...}, "segm": {...}}`` in percent,
            the same under "boundary_segm" if asked for; NaN where there is no ground truth; empty in other processes
            than the first, and where the model gives no instances.
        """
        predictions, true_masks = self._predictions, self._true_masks
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather((predictions, true_masks, self._has_masks), dst=0)
            if not comm.is_main_process():
                return {}
            predictions = list(itertools.chain.from_iterable(part[0] for part in gathered))
            true_masks = {image_id: masks for part in gathered for image_id, masks in part[1].items()}
            self._has_masks = any(part[2] for part in gathered)
        if not predictions:
            self._logger.info("The model gives no instances: average precision is not evaluated.")
            return {}
        if self._ground_truth:
            self._coco_api = _coco_api(_coco_dict(self._ground_truth, true_masks))
        self._results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if "proposals" in predictions[0]:
            self._eval_box_proposals(predictions)
        if "instances" in predictions[0]:
            self._eval_predictions(predictions, img_ids)
        return copy.deepcopy(self._results)

    def _eval_predictions(
        self, predictions: Sequence[Mapping[str, Any]], img_ids: Sequence[Hashable] | None = None
    ) -> None:
        detections = list(itertools.chain.from_iterable(prediction["instances"] for prediction in predictions))
        tasks = list(self._tasks or (TASKS if self._has_masks else TASKS[:1]))
        tasks += [BOUNDARY] if self._boundary and self._has_masks else []
        self._to_category_ids(detections)
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            write_atomically(path, json.dumps(detections).encode())
        if not self._do_evaluation or not self._coco_api.getCatIds():
            self._logger.info("The dataset has no annotations of instances: average precision is not evaluated.")
            return
        names = self._metadata.get("thing_classes")
        for task in tasks:
            evaluation = evaluate_detections(
                self._coco_api, detections, task, self._max_dets_per_image, img_ids, self._category_ids()
            )
            if task == BOUNDARY:
                self._logger.info("Boundary AP (masks, and their edges):")
            kind = "segm" if task == BOUNDARY else task
            self._results[task] = self._derive_coco_results(evaluation, kind, class_names=names)

    def _category_ids(self) -> list[int] | None:
        """The category ids of the thing classes in order of class; None where the json's ids are the classes."""
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        return mapping and sorted(mapping, key=mapping.__getitem__)

    def _to_category_ids(self, detections: list[dict[str, Any]]) -> None:
        """Turns contiguous classes into the dataset's category ids, in place."""
        category_ids = self._category_ids()
        if category_ids is None:
            return
        for detection in detections:
            index = detection["category_id"]
            if not 0 <= index < len(category_ids):
                raise ValueError(
                    f"image {detection['image_id']!r}: a detection has the class {index}, but the dataset has "
                    f"{len(category_ids)} thing classes"
                )
            detection["category_id"] = category_ids[index]


def _has_panoptic_truth(metadata: Any) -> bool:
    return metadata.get("evaluator_type") == "convmask_panoptic"


def true_instances(dataset_name: str, ground_truth: PanopticGroundTruth | None = None) -> COCO:
    """The true instances of a registered dataset for pycocotools.

    They come from the COCO json of its metadata (``json_file``), from its panoptic id maps, or from Detectron2's
    ``annotations`` in its dicts.

    Args:
        dataset_name: name in Detectron2's catalogs.
        ground_truth: of a panoptic dataset, shared with others; made here by default.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("json_file"):
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(PathManager.get_local_path(metadata.json_file))
    if ground_truth or _has_panoptic_truth(metadata):
        return _coco_api(_coco_dict(ground_truth or PanopticGroundTruth(dataset_name), {}))
    return _coco_api(convert_to_coco_dict(dataset_name))


def evaluate_detections(
    truth: COCO,
    detections: Sequence[Mapping[str, Any]],
    task: str,
    max_dets_per_image: int,
    img_ids: Sequence[Hashable] | None = None,
    category_ids: Sequence[int] | None = None,
    area_ranges: Mapping[str, tuple[float, float]] | None = None,
) -> COCOeval:
    """Runs pycocotools with one limit on the detections of an image.

    Args:
        truth: ground truth.
        detections: in COCO's results format; none at all is fine.
        task: "bbox", "segm" or "boundary_segm".
        max_dets_per_image: the only entry of COCOeval's ``maxDets``.
        img_ids: evaluate on these images only.
        category_ids: evaluate these categories only, where the json has others such as stuff.
        area_ranges: further sizes of objects, by name: least and greatest area in pixels. They follow COCO's own four.

    Returns:
        the evaluation, whose ``stats`` are AP, AP50, AP75, APs, APm, APl at that limit in [0, 1]; -1 where there is no
        ground truth.

    Raises:
        ValueError: a detection is of an image that the ground truth lacks.
    """
    strangers = {detection["image_id"] for detection in detections} - set(truth.getImgIds())
    if strangers:
        raise ValueError(f"detections of image {next(iter(strangers))!r}, which the ground truth lacks")
    # COCOeval measures a detection by its box wherever there is one; the size of a mask is the area of the mask.
    kept = [{k: v for k, v in d.items() if task == "bbox" or k != "bbox"} for d in detections]
    if task != "bbox":
        _complete_sizes(truth, kept)
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes looks into the first detection.
        empty = {**truth.dataset, "annotations": []}
        results = truth.loadRes(kept) if kept else _coco_api(empty)
        evaluation = BoundaryCOCOeval(truth, results, "segm") if task == BOUNDARY else COCOeval(truth, results, task)
        evaluation.params.maxDets = [max_dets_per_image]
        if img_ids is not None:
            evaluation.params.imgIds = list(img_ids)
        if category_ids is not None:
            evaluation.params.catIds = list(category_ids)
        for label, limits in (area_ranges or {}).items():
            evaluation.params.areaRng.append(list(limits))
            evaluation.params.areaRngLbl.append(label)
        evaluation.evaluate()
        evaluation.accumulate()
    evaluation.stats = _average_precisions(evaluation)
    return evaluation


def _complete_sizes(truth: COCO, detections: Sequence[Mapping[str, Any]]) -> None:
    """Gives images of a json without height and width those of their masks, in place: pycocotools needs them."""
    bare = {key: image for key, image in truth.imgs.items() if "height" not in image or "width" not in image}
    if not bare:
        return
    for entry in itertools.chain(detections, truth.anns.values()):
        code = entry.get("segmentation")
        if entry["image_id"] in bare and isinstance(code, Mapping) and "size" in code:
            image = bare.pop(entry["image_id"])
            image["height"], image["width"] = (int(side) for side in code["size"])
    for entry in truth.anns.values():
        # Nothing was detected there, so that objects are missed whatever the size: it only has to hold them.
        if entry["image_id"] in bare and isinstance(entry.get("segmentation"), list):
            image = bare[entry["image_id"]]
            for key, first in (("width", 0), ("height", 1)):
                extent = max(
                    (math.ceil(max(polygon[first::2], default=1)) for polygon in entry["segmentation"]), default=1
                )
                image[key] = max(image.get(key, 1), extent)


def _average_precisions(evaluation: COCOeval) -> np.ndarray:
    """(6,) AP, AP50, AP75, APs, APm, APl. COCOeval.summarize() knows the limit of 100 detections only."""
    precision = evaluation.eval["precision"][..., -1]  # IoU threshold, recall, category, area range
    thresholds = evaluation.params.iouThrs
    parts = [precision[:, :, :, 0]]
    parts += [precision[np.isclose(thresholds, threshold), :, :, 0] for threshold in (0.5, 0.75)]
    parts += [precision[:, :, :, area] for area in (1, 2, 3)]
    return np.array([part[part > -1].mean() if (part > -1).any() else -1.0 for part in parts])


def panoptic_to_coco(
    ground_truth: PanopticGroundTruth, image_id: Hashable
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The COCO entry of one image, and its annotations without ids, from its panoptic id map.

    Boxes (XYWH) and areas are those of the masks, which are compressed run-length codes.
    """
    image = ground_truth.image(image_id)
    categories = ground_truth.categories
    height, width = image.runs.shape
    things = np.flatnonzero(categories.isthing[image.categories])
    masks = encode_masks(image.runs.decode(), image.ids[things].tolist())
    # One by one: pycocotools 2.0 with numpy 2 fails on a list of more than 255 masks.
    areas = [mask_util.area(mask) for mask in masks]
    boxes = mask_util.toBbox(masks) if masks else []
    annotations = [
        {
            "image_id": image_id,
            "category_id": categories.ids[image.categories[thing]],
            "iscrowd": int(image.crowd[thing]),
            "area": int(area),
            "bbox": box.tolist(),
            "segmentation": mask,
        }
        for thing, mask, area, box in zip(things, masks, areas, boxes, strict=True)
    ]
    return {"id": image_id, "height": height, "width": width}, annotations


def panoptic_coco_api(dataset_name: str) -> COCO:
    """The instances of a whole panoptic dataset as pycocotools takes them.

    Raises:
        DatasetError: an annotation is missing or unreadable.
    """
    return _coco_api(_coco_dict(PanopticGroundTruth(dataset_name), {}))


def _coco_dict(
    ground_truth: PanopticGroundTruth,
    known: Mapping[Hashable, tuple[dict[str, Any], list[dict[str, Any]]]],
) -> dict[str, Any]:
    """The whole dataset in COCO's format. Images that no process has seen are read here: their instances are missed."""
    entries = [known.get(image_id) or panoptic_to_coco(ground_truth, image_id) for image_id in ground_truth.records]
    annotations = itertools.chain.from_iterable(entry[1] for entry in entries)
    categories = ground_truth.categories
    return {
        "images": [entry[0] for entry in entries],
        # pycocotools takes the id 0 for "no match".
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
        "categories": [
            {"id": identity, "name": name}
            for identity, name, isthing in zip(categories.ids, categories.names, categories.isthing, strict=True)
            if isthing
        ],
    }


def _coco_api(dataset: dict[str, Any]) -> COCO:
    api = COCO()
    api.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api
