"""From a dataset dict to what a model takes: image, instances and semantic map."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import Metadata, MetadataCatalog, detection_utils
from detectron2.data import transforms as T

from convmask.data.augmentation import build_augmentations
from convmask.data.categories import PanopticCategories, SemanticLayout
from convmask.data.errors import DatasetError
from convmask.data.images import read_image, read_panoptic_map, read_semantic_map
from convmask.data.masks import IntArray
from convmask.data.targets import IGNORE_LABEL, SegmentationInput, SegmentTable

TARGETS = ("instances", "sem_seg")


class PanopticDatasetMapper:
    """Reads and augments one image with whatever is annotated on it.

    It takes dataset dicts of three kinds: panoptic ones (``pan_seg_file_name`` and ``segments_info``, see
    ``convmask.data.panoptic.load_panoptic``), instance-only ones (``annotations`` with polygons or RLE, mixed as they
    like, whatever ``INPUT.MASK_FORMAT`` says, or with boxes alone) and semantic-only ones (``sem_seg_file_name``), or
    with the last two together.

    Random numbers come from numpy's global generator, as Detectron2's do.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        targets: Sequence[str] = TARGETS,
        semantic_layout: SemanticLayout = "separated",
        categories: PanopticCategories | None = None,
        ignore_label: int = IGNORE_LABEL,
        targets_in_test: bool = False,
    ) -> None:
        """Can be built from a config, with ``PanopticDatasetMapper(cfg, is_train)``, or from these.

        Args:
            is_train: whether to provide targets. Otherwise the image alone is transformed.
            augmentations: see :func:`convmask.data.augmentation.build_augmentations`.
            image_format: "BGR" or "RGB".
            targets: which to provide, where the dict has them: "instances", "sem_seg".
            semantic_layout: of panoptic dicts. "separated": 0 for things, 1 to S for stuff; "all": a label for each
                category. A semantic file is taken as it is.
            categories: of the dataset; needed by the layout "all".
            ignore_label: value of a semantic file that becomes 255.
            targets_in_test: provide targets at test time too, at the size that the network sees.

        Raises:
            ValueError: unknown target or layout, or "all" without categories.
        """
        unknown = set(targets) - set(TARGETS)
        if unknown:
            raise ValueError(f"INPUT.TARGETS has {sorted(unknown)}: known are {TARGETS}")
        if semantic_layout not in get_args(SemanticLayout):
            raise ValueError(f"INPUT.SEMANTIC_LAYOUT is {semantic_layout!r}, not one of {get_args(SemanticLayout)}")
        if semantic_layout == "all" and categories is None and (is_train or targets_in_test):
            raise ValueError('INPUT.SEMANTIC_LAYOUT "all" needs a dataset with metadata "categories"')
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.targets = tuple(targets)
        self.semantic_layout: SemanticLayout = semantic_layout
        self.categories = categories
        self.ignore_label = ignore_label
        self.targets_in_test = targets_in_test
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info("Augmentations used in %s: %s", mode, list(augmentations))

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The arguments from INPUT, and from the metadata of the first data set, which the others share.

        Raises:
            DatasetError: a training set numbers its classes as no ConvMask method does.
        """
        names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST if cfg.INPUT.TARGETS_IN_TEST else ()
        metadata = MetadataCatalog.get(names[0]) if names else Metadata()
        for name in names:
            _check_numbering(name, MetadataCatalog.get(name))
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "targets": cfg.INPUT.TARGETS,
            "semantic_layout": cfg.INPUT.SEMANTIC_LAYOUT,
            "categories": metadata.get("categories") if cfg.INPUT.SEMANTIC_LAYOUT == "all" else None,
            "ignore_label": metadata.get("ignore_label", IGNORE_LABEL),
            "targets_in_test": cfg.INPUT.TARGETS_IN_TEST,
        }

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Maps one dataset dict, which stays as it is.

        Returns:
            The dict without its annotations, and ``image`` (3, H', W') uint8. In training (and with
            ``targets_in_test``) also, where asked for and annotated: ``instances``, of which at least a pixel is seen
            each, without crowds (``gt_boxes`` tight around the masks, ``gt_classes``, ``gt_masks``: BitMasks, unless
            there are boxes alone), and ``sem_seg`` (H', W') int64 with 255 for "ignore".
            ``height`` and ``width`` are those of the file.

        Raises:
            DatasetError: a file is missing or unreadable, sizes do not agree, or an annotation is malformed. The
                message names the file.
        """
        output = dict(dataset_dict)
        image = read_image(output["file_name"], self.image_format)
        try:
            detection_utils.check_image_size(output, image)
        except detection_utils.SizeMismatchError as error:
            raise DatasetError(str(error)) from error
        # at test time evaluators read the names of the annotation files
        of_training = ("segments_info", "pan_seg_file_name", "sem_seg_file_name") if self.is_train else ()
        for key in ("annotations", *of_training):
            output.pop(key, None)
        if not (self.is_train or self.targets_in_test):
            sample = SegmentationInput(image)
            self.augmentations(sample)
            output["image"] = _image_tensor(sample.image)
            return output
        try:
            self._add_targets(output, self._sample(dataset_dict, image))
        except DatasetError as error:
            name = output["file_name"]
            raise error if name in str(error) else DatasetError(f"image {name!r}: {error}") from error
        return output

    def _add_targets(self, output: dict[str, Any], sample: SegmentationInput) -> None:
        self.augmentations(sample)
        output["image"] = _image_tensor(sample.image)
        if "sem_seg" in self.targets and sample.index is not None:
            output["sem_seg"] = torch.from_numpy(np.ascontiguousarray(sample.sem_seg))
        if "instances" in self.targets and sample.has_instances:
            output["instances"] = sample.instances()

    def _sample(self, dataset_dict: Mapping[str, Any], image: Any) -> SegmentationInput:
        """The image with its annotations, before the augmentations."""
        annotations = dataset_dict.get("annotations")
        if "sem_seg_file_name" in dataset_dict:
            file_name = dataset_dict["sem_seg_file_name"]
            table, ids = SegmentTable.from_labels(read_semantic_map(file_name), self.ignore_label)
            _check_size(file_name, ids, image)
            return SegmentationInput(image, ids=ids, table=table, annotations=annotations)
        if "pan_seg_file_name" in dataset_dict:
            file_name = dataset_dict["pan_seg_file_name"]
            ids = read_panoptic_map(file_name)
            _check_size(file_name, ids, image)
            table = SegmentTable.from_segments(dataset_dict["segments_info"], self.semantic_layout, self.categories)
            return SegmentationInput(image, ids=ids, table=table)
        return SegmentationInput(image, annotations=annotations)


def _check_numbering(name: str, metadata: Metadata) -> None:
    """Refuses Detectron2's "standard" panoptic sets: their stuff has the numbers after the things, not 1 to S."""
    panoptic = metadata.get("evaluator_type") in ("coco_panoptic_seg", "cityscapes_panoptic_seg")
    if panoptic and metadata.get("categories") is None and metadata.stuff_classes[0] != "things":
        raise DatasetError(
            f"dataset {name!r} numbers things and stuff together, as Detectron2's standard panoptic sets do. Use a set "
            "of ConvMask (convmask_coco_2017_train_panoptic, convmask_cityscapes_train_panoptic), or register_panoptic"
        )


def _image_tensor(image: Any) -> torch.Tensor:
    """(H, W, 3) uint8 array to (3, H, W) uint8 tensor."""
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _check_size(file_name: str, ids: IntArray, image: Any) -> None:
    if ids.shape != image.shape[:2]:
        raise DatasetError(
            f"{file_name!r} has {ids.shape[1]}x{ids.shape[0]} pixels, its image {image.shape[1]}x{image.shape[0]}"
        )
