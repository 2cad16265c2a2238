"""What a dataset looks like in a few numbers, from which a config can be chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convmask.data.categories import PanopticCategories
from convmask.data.errors import DatasetError


@dataclass(frozen=True)
class DataSummary:
    """Numbers of a dataset.

    Attributes:
        images: how many.
        short_side: median of the images, in pixels.
        long_side: the 95th percentile, in pixels.
        object_sizes: 10th, 50th and 90th percentile of the square roots of the areas of boxes, in pixels; crowds do not
            count.
        most_objects: in an image.
        objects: in all images.
        empty_images: without an object.
        things: classes.
        stuff: classes.
    """

    images: int
    short_side: int
    long_side: int
    object_sizes: tuple[float, float, float]
    most_objects: int
    objects: int
    empty_images: int
    things: int
    stuff: int

    @property
    def kind(self) -> str:
        """ "panoptic" where there is stuff, else "instance"."""
        return "panoptic" if self.stuff else "instance"

    def __str__(self) -> str:
        """One line."""
        small, middle, large = self.object_sizes
        return (
            f"{self.images} images of {self.short_side} pixels and more (long side up to {self.long_side}), "
            f"{self.things} thing and {self.stuff} stuff classes, {self.objects} objects of {small:.0f} to {large:.0f} "
            f"pixels (median {middle:.0f}), up to {self.most_objects} an image, {self.empty_images} images without one"
        )


def summarise(records: Iterable[Mapping[str, Any]], categories: PanopticCategories, name: str) -> DataSummary:
    """The numbers of a registered dataset.

    Args:
        records: Detectron2's dataset dicts.
        categories: of the dataset.
        name: for messages.

    Raises:
        DatasetError: no image, no object, or objects without masks.
    """
    sides, sizes, counts = [], [], []
    masks = 0
    for record in records:
        sides.append(sorted((record["height"], record["width"])))
        objects = [x for x in record.get("annotations", ()) if not x.get("iscrowd")]
        masks += sum("segmentation" in x or "segment_id" in x for x in objects)
        sizes += [float(max(x["bbox"][2] * x["bbox"][3], 0)) ** 0.5 for x in objects]
        counts.append(len(objects))
    if not sides or not sizes:
        raise DatasetError(f"{name}: has {len(sides)} images and {len(sizes)} objects: there is nothing to learn from")
    if not masks:
        raise DatasetError(f"{name}: has boxes without masks (segmentation); all methods here learn from masks")
    short, long = np.array(sides).T
    low, middle, high = np.percentile(sizes, [10, 50, 90]).tolist()
    return DataSummary(
        images=len(sides),
        short_side=int(np.median(short)),
        long_side=int(np.percentile(long, 95)),
        object_sizes=(low, middle, high),
        most_objects=max(counts),
        objects=len(sizes),
        empty_images=counts.count(0),
        things=categories.num_things,
        stuff=categories.num_stuff,
    )
