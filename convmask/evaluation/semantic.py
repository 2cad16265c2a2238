"""Semantic segmentation: IoU and accuracy, with ground truth from label files or from panoptic id maps."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from tabulate import tabulate

from convmask.data.categories import SemanticLayout
from convmask.data.errors import DatasetError
from convmask.data.images import read_semantic_map
from convmask.evaluation.ground_truth import PanopticGroundTruth
from convmask.evaluation.semantic_dump import encode_labels, write_labels
from convmask.utils.label_runs import position_of

_logger = logging.getLogger(__name__)


class SemSegEvaluator(DatasetEvaluator):
    """mIoU, fwIoU (frequency-weighted, the papers' fIoU), mACC, pACC, and IoU and accuracy of each class.

    Takes Detectron2's ``sem_seg``, (C, H, W) scores. A model whose first output has none is not evaluated: one log line
    says so and the result is empty.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        layout: SemanticLayout = "separated",
        ground_truth: PanopticGroundTruth | None = None,
    ) -> None:
        """Takes a registered dataset.

        Args:
            dataset_name: name in Detectron2's catalogs, with ``sem_seg_file_name`` in its dicts or with panoptic
                annotations.
            distributed: add up the counts of all processes. Otherwise this process has seen the whole dataset.
            output_dir: a folder for ``sem_seg_predictions.json``, in the format of Detectron2's evaluator.
            layout: the labels of a panoptic dataset: "separated" (0 is any thing, stuff from 1 on) or "all".
            ground_truth: of a panoptic dataset, shared with other evaluators; made here by default.

        Raises:
            ValueError: there is no such layout.
        """
        self._distributed = distributed
        self._dataset_name = dataset_name
        metadata = MetadataCatalog.get(dataset_name)
        self._ignore_label = metadata.get("ignore_label", 255)
        self._ground_truth = ground_truth or PanopticGroundTruth(dataset_name)
        self._layout: SemanticLayout = layout
        categories = metadata.get("categories")
        self._class_names: list[str] = (
            list(metadata.stuff_classes) if categories is None else categories.semantic_classes(layout)
        )
        self._label_files: dict[str, str] | None = None
        self._output_dir = output_dir
        self._category_ids = _category_ids(metadata, layout) if output_dir else {}
        self.reset()

    def reset(self) -> None:
        """Forgets all predictions."""
        # Rows: predicted label. Columns: true label, the last of them "ignored".
        self._confusion = np.zeros((len(self._class_names), len(self._class_names) + 1), dtype=np.int64)
        self._skipped = False
        self._images = 0
        self._dumped: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Counts the pixels of a batch.

        Args:
            inputs: dataset dicts with "file_name" and, for panoptic ground truth, "image_id".
            outputs: model outputs with "sem_seg", (C, H, W) scores of the size of the ground truth.

        Raises:
            ValueError: a prediction has another size or number of classes. The message names the image.
            DatasetError: the ground truth cannot be read, or holds a label that is no class.
        """
        for given, output in zip(inputs, outputs, strict=True):
            if self._skipped:
                return
            if "sem_seg" not in output:
                if self._images:
                    raise ValueError(f"image {given['file_name']!r}: no sem_seg, unlike for earlier images")
                self._skipped = True
                _logger.info("The model gives no sem_seg: semantic segmentation is not evaluated.")
                return
            truth = self._true_labels(given)
            scores: torch.Tensor = output["sem_seg"]
            expected = (len(self._class_names), *truth.shape)
            if tuple(scores.shape) != expected:
                raise ValueError(
                    f"semantic prediction for image {given['file_name']!r} has the shape {tuple(scores.shape)}; "
                    f"classes, height and width of the ground truth are {expected}"
                )
            predicted = scores.argmax(dim=0).cpu().numpy()
            columns = self._confusion.shape[1]
            cell = predicted.reshape(-1) * columns + truth.reshape(-1)
            self._confusion += np.bincount(cell, minlength=self._confusion.size).reshape(self._confusion.shape)
            self._images += 1
            if self._output_dir:
                self._dumped += encode_labels(predicted, given["file_name"], self._category_ids)

    def _true_labels(self, given: Mapping[str, Any]) -> np.ndarray:
        """(H, W) labels 0 to C-1, and C where a pixel does not count."""
        if self._label_files is None:
            self._label_files = {
                record["file_name"]: record["sem_seg_file_name"]
                for record in DatasetCatalog.get(self._dataset_name)
                if "sem_seg_file_name" in record
            }
        label_file = self._label_files.get(given["file_name"])
        if label_file is None:
            return panoptic_to_labels(self._ground_truth, given["image_id"], self._layout, len(self._class_names))
        labels = read_semantic_map(label_file)
        ignored = labels == self._ignore_label
        wrong = labels[~ignored & (labels >= len(self._class_names))]
        if wrong.size:
            raise DatasetError(
                f"semantic map {label_file!r}: label {wrong[0]}, but there are {len(self._class_names)} classes and "
                f"{self._ignore_label} to be ignored"
            )
        return np.where(ignored, len(self._class_names), labels)

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Adds up what all processes have counted.

        Returns:
            ``{"sem_seg": {"mIoU", "fwIoU", "IoU-<class>", ..., "mACC", "pACC", "ACC-<class>", ...}}`` in percent, NaN
            for a class without ground truth; None in other processes than the first; empty where the model gives no
            semantic output.
        """
        gathered = [(self._confusion, self._skipped, self._images, self._dumped)]
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(gathered[0], dst=0)
            if not comm.is_main_process():
                return None
        if not any(part[2] for part in gathered) and any(part[1] for part in gathered):
            return OrderedDict()
        if self._output_dir:
            write_labels(self._output_dir, list(itertools.chain.from_iterable(part[3] for part in gathered)))
        results = semantic_metrics(np.sum([part[0] for part in gathered], axis=0), self._class_names)
        totals = {name: results[name] for name in ("mIoU", "fwIoU", "mACC", "pACC")}
        _logger.info("Semantic segmentation:\n%s", create_small_table(totals))
        rows = [(name, results[f"IoU-{name}"], results[f"ACC-{name}"]) for name in self._class_names]
        table = tabulate(rows, headers=["class", "IoU", "ACC"], tablefmt="pipe", floatfmt=".3f", numalign="right")
        _logger.info("Semantic segmentation per class:\n%s", table)
        return OrderedDict({"sem_seg": results})


def panoptic_to_labels(
    ground_truth: PanopticGroundTruth, image_id: Any, layout: SemanticLayout, ignored: int
) -> np.ndarray:
    """(H, W) semantic labels of a panoptic annotation, ``ignored`` where no segment is.

    Crowd regions of things are "things" in the layout "separated", and ignored in the layout "all", as in training.
    """
    image = ground_truth.image(image_id)
    labels = _semantic_labels(ground_truth, layout)[image.categories]
    if layout == "all":
        labels[image.crowd & ground_truth.categories.isthing[image.categories]] = ignored
    position = position_of(image.runs.values, image.ids)
    # Position -1, no segment, takes the last entry.
    return image.runs.with_values(np.append(labels, ignored)[position]).decode()


def _semantic_labels(ground_truth: PanopticGroundTruth, layout: SemanticLayout) -> np.ndarray:
    """(K,) label of each of the dataset's categories."""
    ids, metadata = ground_truth.categories.ids, ground_truth.metadata
    categories = metadata.get("categories")
    if categories is not None:
        return np.array([categories.semantic_label(identity, layout) for identity in ids], dtype=np.int64)
    # Detectron2's datasets: a separated one has the label 0 for all things, others number all categories together.
    of_thing = {} if metadata.stuff_classes[0] == "things" else metadata.thing_dataset_id_to_contiguous_id
    label_of = {**of_thing, **metadata.stuff_dataset_id_to_contiguous_id}
    return np.array([label_of.get(identity, 0) for identity in ids], dtype=np.int64)


def _category_ids(metadata: Any, layout: SemanticLayout) -> dict[int, int]:
    """Semantic label to the dataset's category id; labels of a dataset that has no such ids stand for themselves."""
    categories = metadata.get("categories")
    if categories is not None and layout == "all":
        return dict(enumerate(categories.all_order))
    label_of_id = metadata.get("stuff_dataset_id_to_contiguous_id")
    if label_of_id is None:
        return {label: label for label in range(len(metadata.stuff_classes))}
    return {label: identity for identity, label in label_of_id.items()}


def semantic_metrics(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """The measures of a confusion matrix, in percent.

    A class without ground truth has no IoU and no accuracy (NaN) and is left out of the means; pixels wrongly given to
    it count against the classes that they belong to. So does Detectron2 on GitHub; version 0.5 divides the mIoU by the
    number of classes that are predicted or true, which differs where a class is predicted that the dataset lacks.

    Args:
        confusion: (C, C + 1) pixels by predicted and true label; the last column is ignored.
        class_names: the C names.
    """
    counted = confusion[:, :-1].astype(np.float64)
    correct, true, predicted = counted.diagonal(), counted.sum(axis=0), counted.sum(axis=1)
    occurs = true > 0
    denominator = np.where(occurs, true, np.nan)
    accuracy = correct / denominator
    iou = correct / np.where(occurs, true + predicted - correct, np.nan)
    any_pixel = bool(occurs.any())
    results = {
        "mIoU": iou[occurs].mean() if any_pixel else np.nan,
        "fwIoU": (iou[occurs] * true[occurs]).sum() / true.sum() if any_pixel else np.nan,
        **{f"IoU-{name}": value for name, value in zip(class_names, iou, strict=True)},
        "mACC": accuracy[occurs].mean() if any_pixel else np.nan,
        "pACC": correct.sum() / true.sum() if any_pixel else np.nan,
        **{f"ACC-{name}": value for name, value in zip(class_names, accuracy, strict=True)},
    }
    return {name: 100 * float(value) for name, value in results.items()}
