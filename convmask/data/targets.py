"""What is annotated on an image, and how it moves with the image through the augmentations.

Shapes: H, W of the image at that moment; N segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.data import transforms as T
from detectron2.structures import Instances

from convmask.data.annotation_masks import (
    box_polygon,
    has_masks,
    instances_from_annotations,
    instances_from_boxes,
    transform_mask,
)
from convmask.data.categories import PanopticCategories, SemanticLayout
from convmask.data.masks import VOID, IntArray, instances_from_index, segment_index, transform_id_map

IGNORE_LABEL = 255


@dataclass(frozen=True)
class SegmentTable:
    """What the ids of an id map stand for."""

    ids: Sequence[int]
    """(N,): the id of each segment."""
    labels: npt.NDArray[np.int64]
    """(N + 1,): the semantic label of each segment, after that of pixels of none of them."""
    classes: Mapping[int, int] = field(default_factory=dict)
    """Position of a segment in ``ids``, from 1, to its class index, for those that are instances (no crowds)."""
    has_instances: bool = True
    """Whether the id map tells instances at all."""

    @classmethod
    def from_segments(
        cls, segments: Sequence[Mapping[str, Any]], layout: SemanticLayout, categories: PanopticCategories | None
    ) -> SegmentTable:
        """From the ``segments_info`` of a dataset dict (contiguous category ids: things 0 to T-1, stuff 1 to S).

        A crowd has no instance. Its label is 0, as that of every thing, in the layout "separated", 255 in "all".
        ``categories`` may be None in the layout "separated".
        """
        labels, classes = [IGNORE_LABEL], {}
        for number, segment in enumerate(segments, start=1):
            isthing, iscrowd, category_id = segment["isthing"], segment.get("iscrowd", 0), segment["category_id"]
            if isthing and not iscrowd:
                classes[number] = int(category_id)
            if layout == "separated":
                labels.append(0 if isthing else category_id)
            elif isthing and iscrowd:
                labels.append(IGNORE_LABEL)
            else:
                assert categories is not None
                labels.append(categories.semantic_label_of(category_id, isthing, layout))
        return cls([segment["id"] for segment in segments], np.array(labels, dtype=np.int64), classes)

    @classmethod
    def from_labels(cls, labels: IntArray, ignore_label: int = IGNORE_LABEL) -> tuple[SegmentTable, IntArray]:
        """For a semantic map (H, W): the table, and an id map (H, W) in which ``ignore_label`` and 255 are void."""
        ignored = (labels == ignore_label) | (labels == IGNORE_LABEL)
        ids = np.where(ignored, VOID, labels + 1).astype(np.int32)
        highest = int(ids.max())
        table_labels = np.array([IGNORE_LABEL, *range(highest)], dtype=np.int64)
        return cls(range(1, highest + 1), table_labels, has_instances=False), ids


class SegmentationInput:
    """An image with its annotations, in the place of Detectron2's ``AugInput``: augmentations change all of it alike.

    Attributes:
        image: (H, W, 3) uint8.
        index: (H, W): the position in the table, from 1, of each pixel's segment, 0 for none; None where there is no id
            map. Its type is uint8 or int32.
    """

    def __init__(
        self,
        image: npt.NDArray[np.uint8],
        *,
        ids: IntArray | None = None,
        table: SegmentTable | None = None,
        annotations: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Takes an id map (H, W) with its table, or COCO annotations, or both, or neither.

        Of COCO annotations, either each has a ``segmentation`` or none has: then there are boxes alone. With both, the
        instances are those of the annotations.
        """
        assert (ids is None) == (table is None)
        self.image = image
        # Numbered before it is transformed: the source is often smaller, and one byte a pixel mostly suffices.
        self.index = None if ids is None or table is None else segment_index(ids, table.ids)
        self._table = table
        self._annotations = annotations
        self._source_size: tuple[int, int] = image.shape[:2]
        self._applied: list[T.Transform] = []

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.image.shape[:2]
        return height, width

    @property
    def has_instances(self) -> bool:
        """Whether somebody looked for instances: then none found is an empty result, not an absent one."""
        return self._annotations is not None or (self._table is not None and self._table.has_instances)

    def transform(self, tfm: T.Transform | T.TransformList) -> None:
        """Applies a transform to everything."""
        self.image = tfm.apply_image(self.image)
        if self.index is not None:
            self.index = transform_id_map(tfm, self.index)
        self._applied.append(tfm)

    @property
    def sem_seg(self) -> npt.NDArray[np.int64] | None:
        """(H, W): semantic labels, 255 where nothing is labelled; None where there is no id map."""
        if self.index is None or self._table is None:
            return None
        return self._table.labels[self.index]

    def instances(self) -> Instances:
        """What is left of the instances, see :func:`convmask.data.masks.make_instances`.

        There are no ``gt_masks`` where the annotations are boxes alone.

        Raises:
            DatasetError: an annotation has no usable segmentation, though others have one, or no usable box.
        """
        if self._annotations is not None:
            applied = T.TransformList(self._applied)
            if not has_masks(self._annotations):
                return instances_from_boxes(self._annotations, applied, self.size)
            return instances_from_annotations(self._annotations, applied, self._source_size, self.size)
        if self.index is None or self._table is None:
            return instances_from_index(np.zeros(self.size, dtype=np.int32), {}, 0)
        return instances_from_index(self.index, self._table.classes, len(self._table.ids))

    def random_instance_pixel(self) -> tuple[int, int] | None:
        """(y, x) of a random pixel of a random instance, drawn from numpy's global generator; None if there is none."""
        masks = self._instance_maps()
        for number in np.random.permutation(len(masks)):
            rows, columns = np.nonzero(masks[number]())
            if len(rows):
                chosen = np.random.randint(len(rows))
                return int(rows[chosen]), int(columns[chosen])
        return None

    def _instance_maps(self) -> list[Any]:
        """For each instance, a function that returns its mask (H, W) of bool."""
        if self._annotations is not None:
            applied = T.TransformList(self._applied)
            masked = has_masks(self._annotations)

            def mask(annotation: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
                outline = annotation.get("segmentation") if masked else box_polygon(annotation)
                return transform_mask(outline, applied, self._source_size, self.size)

            return [partial(mask, annotation) for annotation in self._annotations if not annotation.get("iscrowd", 0)]
        if self.index is None or self._table is None:
            return []
        return [partial(np.equal, self.index, number) for number in self._table.classes]
