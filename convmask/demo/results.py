"""Predictions on images of one's own in COCO's formats: a result list for objects, PNG and json for panoptic maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from panopticapi.utils import id2rgb

from convmask.utils.files import write_atomically
from convmask.visualization import save_image


class CocoResults:
    """Collects predictions and writes them into one folder.

    ``images.json``: id and file name of each image. ``instances.json``: COCO's result list, boxes and masks.
    ``panoptic.json`` and ``panoptic/<name>.png``: COCO's panoptic format. Category ids are those of the data set that
    the model was trained on; contiguous ones where they are not known.
    """

    def __init__(self, folder: str | Path, metadata: Metadata, threshold: float = 0.0) -> None:
        """Makes an empty collection.

        Args:
            folder: where the files go.
            metadata: of the model's data set.
            threshold: objects with a lower score are left out.
        """
        self._folder = Path(folder)
        self._threshold = threshold
        self._things = _dataset_ids(metadata, "thing")
        self._stuff = _dataset_ids(metadata, "stuff")
        self._categories = _categories(metadata, self._things, self._stuff)
        self._images: list[dict[str, Any]] = []
        self._instances: list[dict[str, Any]] | None = None
        self._panoptic: list[dict[str, Any]] | None = None

    def add(self, path: Path, name: str, size: tuple[int, int], prediction: Mapping[str, Any]) -> None:
        """Adds the prediction for one image and writes its panoptic PNG.

        Args:
            path: of the image.
            name: stem of the PNG.
            size: (height, width).
            prediction: in Detectron2's format.
        """
        image_id = len(self._images) + 1
        self._images.append({"id": image_id, "file_name": str(path), "height": size[0], "width": size[1]})
        if "instances" in prediction:
            instances = prediction["instances"].to("cpu")
            instances = instances[instances.scores >= self._threshold]
            found = instances_to_coco_json(instances, image_id)
            for item in found:
                item["category_id"] = self._things.get(item["category_id"], item["category_id"])
            self._instances = (self._instances or []) + found
        if "panoptic_seg" in prediction:
            id_map, segments_info = prediction["panoptic_seg"]
            self._panoptic = self._panoptic or []
            self._panoptic.append(self._add_panoptic(image_id, name, id_map.cpu(), segments_info))

    def _add_panoptic(
        self, image_id: int, name: str, id_map: torch.Tensor, segments_info: list[dict[str, Any]]
    ) -> dict[str, Any]:
        ids = id_map.numpy()
        save_image(self._folder / "panoptic" / f"{name}.png", id2rgb(np.where(ids > 0, ids, 0)))
        segments = []
        for info in segments_info:
            rows, columns = np.nonzero(ids == info["id"])
            if not len(rows):
                continue
            left, top = int(columns.min()), int(rows.min())
            table = self._things if info["isthing"] else self._stuff
            segments.append(
                {
                    "id": int(info["id"]),
                    "category_id": table.get(int(info["category_id"]), int(info["category_id"])),
                    "iscrowd": 0,
                    "area": len(rows),
                    "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
                }
            )
        return {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}

    def write(self) -> list[Path]:
        """Writes the json files, of the kinds of results that there were, and returns their paths."""
        files: dict[str, Any] = {"images.json": self._images}
        if self._instances is not None:
            files["instances.json"] = self._instances
        if self._panoptic is not None:
            document = {"images": self._images, "annotations": self._panoptic, "categories": self._categories}
            files["panoptic.json"] = document
        return [_write_json(self._folder / name, content) for name, content in files.items()]


def _dataset_ids(metadata: Metadata, kind: str) -> dict[int, int]:
    """Contiguous id to the data set's own id."""
    table = metadata.get(f"{kind}_dataset_id_to_contiguous_id", None) or {}
    # Detectron2 maps all things to the label 0, "things", of its semantic maps: not an id of a stuff class.
    return {int(mine): int(theirs) for theirs, mine in table.items() if kind == "thing" or mine != 0}


def _categories(metadata: Metadata, things: Mapping[int, int], stuff: Mapping[int, int]) -> list[dict[str, Any]]:
    categories = []
    for kind, table in (("thing", things), ("stuff", stuff)):
        for index, name in enumerate(metadata.get(f"{kind}_classes", None) or []):
            if kind == "stuff" and index == 0 and name == "things":
                continue
            categories.append({"id": table.get(index, index), "name": name, "isthing": int(kind == "thing")})
    return categories


def _write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content).encode())
    return path
