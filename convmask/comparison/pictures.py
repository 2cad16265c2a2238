"""The same images through every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor

from convmask.data.images import read_image
from convmask.visualization import ground_truth, save_image
from convmask.visualization.draw import draw_segments
from convmask.visualization.segments import instance_segments, segments_of

# Of the longer side, in pixels: what a page of eight columns has use for.
SIDE = 256


def examples(dataset: str, count: int) -> list[int]:
    """Indices of ``count`` images spread over a data set."""
    return np.unique(np.linspace(0, len(DatasetCatalog.get(dataset)) - 1, count + 2)[1:-1].astype(int)).tolist()


def draw_inputs(dataset: str, indices: Sequence[int], folder: Path) -> None:
    """Writes the images themselves and their annotated objects: ``<index>_image.webp`` and ``<index>_truth.webp``."""
    dicts, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    for index in indices:
        image = read_image(dicts[index]["file_name"], "RGB")
        segments = [s for s in segments_of(ground_truth(dicts[index]), metadata) if s.is_thing]
        save_image(folder / f"{index}_image.webp", _fitted(image))
        save_image(folder / f"{index}_truth.webp", _fitted(draw_segments(image, segments, labels=False)))


def draw_predictions(
    predictor: DefaultPredictor, dataset: str, indices: Sequence[int], threshold: float, folder: Path
) -> None:
    """Writes what a method finds: ``<index>.webp``, its objects from ``threshold`` on."""
    dicts, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    for index in indices:
        image = read_image(dicts[index]["file_name"], "BGR")
        with torch.no_grad():
            instances = predictor(image)["instances"].to("cpu")
        segments = instance_segments(instances, metadata, threshold)
        picture = draw_segments(np.ascontiguousarray(image[:, :, ::-1]), segments, labels=False)
        save_image(folder / f"{index}.webp", _fitted(picture))


def _fitted(picture: np.ndarray) -> np.ndarray:
    factor = SIDE / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
