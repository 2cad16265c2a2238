"""Panoptic quality of a model's ``panoptic_seg`` output, computed in memory."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from convmask.evaluation.ground_truth import PanopticGroundTruth
from convmask.evaluation.panoptic_dump import PanopticDump
from convmask.evaluation.panoptic_quality import QualityCounts, count_matches, segmented_image

_logger = logging.getLogger(__name__)


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ over all categories, things and stuff, and PQ of each category, by the rules of panopticapi.

    Takes Detectron2's ``panoptic_seg``: an (H, W) id map and its ``segments_info``, or the map alone with ids of
    category * label_divisor + instance and -1 for VOID (Panoptic-DeepLab's format). Processes exchange counts only.

    A model whose first output has no ``panoptic_seg`` is not evaluated: one log line says so and the result is empty.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        dump: bool = False,
        ground_truth: PanopticGroundTruth | None = None,
        cache_ground_truth: bool = False,
    ) -> None:
        """Takes a registered dataset.

        Args:
            dataset_name: name in Detectron2's catalogs.
            output_dir: where ``dump`` writes; a local folder that all processes share.
            distributed: add up the counts of all processes. Otherwise this process has seen the whole dataset.
            dump: also write ``panoptic_predictions.json`` and ``panoptic_predictions/*.png`` in COCO's format.
            ground_truth: shared with other evaluators; made here by default.
            cache_ground_truth: keep the decoded annotations of all images in this evaluator for its next evaluations.

        Raises:
            ValueError: ``dump`` without ``output_dir``.
        """
        if dump and not output_dir:
            raise ValueError("PanopticEvaluator(dump=True) needs an output_dir")
        self._ground_truth = ground_truth or PanopticGroundTruth(dataset_name, cache=cache_ground_truth)
        self._distributed = distributed
        self._dump = PanopticDump(output_dir, self._ground_truth.records) if dump and output_dir else None
        self.reset()

    def reset(self) -> None:
        """Forgets all predictions."""
        self._counts = QualityCounts.zeros(len(self._ground_truth.categories.ids))
        self._image_ids: list[Hashable] = []
        self._dumped: list[dict[str, Any]] = []
        self._skipped = False
        if self._dump:
            self._dump.start(remove_json=comm.is_main_process())

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Counts the matches of a batch.

        Args:
            inputs: dataset dicts with "image_id".
            outputs: model outputs with "panoptic_seg", of the size of the ground truth.

        Raises:
            ValueError: a prediction is malformed or of another size than the ground truth. The message names the image.
            DatasetError: the ground truth cannot be read or is contradictory.
        """
        for given, output in zip(inputs, outputs, strict=True):
            if self._skipped:
                return
            image_id = given["image_id"]
            if "panoptic_seg" not in output:
                if self._image_ids:
                    raise ValueError(f"image {image_id!r}: the model gave no panoptic_seg, unlike for earlier images")
                self._skipped = True
                _logger.info("The model gives no panoptic_seg: panoptic quality is not evaluated.")
                return
            truth = self._ground_truth.image(image_id)
            try:
                id_map, segments = self._in_dataset_ids(*output["panoptic_seg"])
                prediction = segmented_image(id_map, segments, self._ground_truth.categories.positions)
                self._counts += count_matches(truth, prediction, len(self._ground_truth.categories.ids))
            except ValueError as error:
                raise ValueError(f"panoptic prediction for image {image_id!r}: {error}") from error
            self._image_ids.append(image_id)
            if self._dump:
                self._dumped.append(self._dump.write_image(image_id, id_map, segments))

    def _in_dataset_ids(
        self, id_map: torch.Tensor | np.ndarray, segments_info: Sequence[Mapping[str, Any]] | None
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """The (H, W) map with VOID 0, and its segments with the dataset's category ids."""
        id_map = id_map.cpu().numpy() if isinstance(id_map, torch.Tensor) else np.asarray(id_map)
        if id_map.ndim != 2 or not np.issubdtype(id_map.dtype, np.integer):
            raise ValueError(f"the map is {id_map.dtype} of shape {id_map.shape}, not integers of shape (H, W)")
        categories = self._ground_truth.categories
        if segments_info is not None:
            return id_map, [{"id": s["id"], "category_id": categories.category_id(s)} for s in segments_info]
        divisor = self._ground_truth.metadata.label_divisor
        segments = []
        for label in np.unique(id_map).tolist():
            if label == -1:
                continue
            if label // divisor not in categories.labels:
                raise ValueError(f"the map holds {label}, but there is no class {label // divisor}")
            segments.append({"id": label + 1, "category_id": categories.labels[label // divisor]})
        return id_map + 1, segments

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Adds up what all processes have counted.

        Returns:
            ``{"panoptic_seg": {"PQ", "SQ", "RQ", "PQ_th", ..., "PQ_st", ..., "PQ-<category>", ...}}`` in percent, NaN
            where no such category occurs; None in other processes than the first; empty where the model gives no
            panoptic output.

        Raises:
            ValueError: an image was evaluated twice, or an image of the dataset never.
        """
        own = (self._counts, self._image_ids, self._dumped, self._skipped)
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(own, dst=0)
            if not comm.is_main_process():
                return None
        else:
            gathered = [own]
        image_ids = list(itertools.chain.from_iterable(part[1] for part in gathered))
        if not image_ids and any(part[3] for part in gathered):
            return OrderedDict()
        self._check_image_ids(image_ids)
        counts = QualityCounts.zeros(len(self._ground_truth.categories.ids))
        for part in gathered:
            counts += part[0]
        if self._dump:
            self._dump.write_json(list(itertools.chain.from_iterable(part[2] for part in gathered)))
        return OrderedDict({"panoptic_seg": self._summarize(counts)})

    def _check_image_ids(self, image_ids: list[Hashable]) -> None:
        twice = [image_id for image_id, times in Counter(image_ids).items() if times > 1]
        if twice:
            raise ValueError(f"panoptic evaluation: image {twice[0]!r} was evaluated more than once")
        missing = self._ground_truth.records.keys() - set(image_ids)
        if missing:
            raise ValueError(
                f"panoptic evaluation: no prediction for {len(missing)} of {len(self._ground_truth.records)} images of "
                f"{self._ground_truth.dataset_name!r}, such as image {min(missing, key=str)!r}"
            )

    def _summarize(self, counts: QualityCounts) -> dict[str, float]:
        categories = self._ground_truth.categories
        groups = {
            "All": ("", np.ones(len(categories.ids), dtype=bool)),
            "Things": ("_th", categories.isthing),
            "Stuff": ("_st", ~categories.isthing),
        }
        results: dict[str, float] = {}
        rows = []
        for title, (suffix, selected) in groups.items():
            means = counts.mean(selected)
            results |= {f"{name}{suffix}": 100 * means[name] for name in ("PQ", "SQ", "RQ")}
            rows.append([title, *(100 * means[name] for name in ("PQ", "SQ", "RQ")), means["N"]])
        per_category = counts.per_category()
        results |= {
            f"PQ-{name}": 100 * float(pq) for name, pq in zip(categories.names, per_category["PQ"], strict=True)
        }
        _logger.info("Panoptic quality:\n%s", _table(["", "PQ", "SQ", "RQ", "#categories"], rows))
        columns = [100 * per_category[name] for name in ("PQ", "SQ", "RQ")]
        columns += [counts.true_positives, counts.false_positives, counts.false_negatives]
        _logger.info(
            "Panoptic quality per category:\n%s",
            _table(
                ["category", "PQ", "SQ", "RQ", "TP", "FP", "FN"], list(zip(categories.names, *columns, strict=True))
            ),
        )
        return results


def _table(headers: list[str], rows: Sequence[Sequence[Any]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="right")
