"""Small datasets on disk, and catalogs that forget what a test registers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

CATEGORIES = [
    {"id": 7, "name": "cell", "isthing": 1, "color": [10, 20, 30]},
    {"id": 3, "name": "sky", "isthing": 0},
    {"id": 5, "name": "ball", "isthing": 1},
    {"id": 90, "name": "ground", "isthing": 0},
]


@dataclass
class PanopticSet:
    """A panoptic dataset that a test may spoil: ``content`` and ``maps`` are what :meth:`write` puts on disk."""

    root: Path
    content: dict[str, Any] = field(default_factory=dict)
    maps: list[np.ndarray] = field(default_factory=list)

    @property
    def paths(self) -> tuple[str, str, str]:
        """Image root, panoptic json, panoptic root."""
        return str(self.root / "images"), str(self.root / "panoptic.json"), str(self.root / "panoptic")

    def write(self) -> PanopticSet:
        images, json_file, panoptic = (Path(path) for path in self.paths)
        images.mkdir(parents=True, exist_ok=True)
        panoptic.mkdir(exist_ok=True)
        json_file.write_text(json.dumps(self.content))
        for index, ids in enumerate(self.maps):
            picture = np.random.default_rng(index).integers(0, 256, (*ids.shape, 3), dtype=np.uint8)
            Image.fromarray(picture).save(images / f"{index}.png")
            channels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
            Image.fromarray(channels).save(panoptic / f"{index}.png")
        return self


@pytest.fixture
def panoptic_set(tmp_path: Path) -> PanopticSet:
    """Two images of 12 x 8 and 10 x 9 pixels (width x height), things and stuff, a crowd and unlabelled pixels."""
    first = np.zeros((8, 12), dtype=np.int64)
    first[:4], first[2:5, 1:4], first[5:8, 6:12] = 300, 1, 70000
    second = np.full((9, 10), 2, dtype=np.int64)
    second[3:6, 3:6] = 9
    kinds = {300: (3, 0), 1: (7, 0), 70000: (5, 1), 2: (90, 0), 9: (5, 0)}
    annotations = []
    for index, ids in enumerate((first, second)):
        segments = []
        for identity in sorted({int(i) for i in np.unique(ids)} - {0}):
            rows, columns = np.nonzero(ids == identity)
            x, y = int(columns.min()), int(rows.min())
            segments.append(
                {
                    "id": identity,
                    "category_id": kinds[identity][0],
                    "iscrowd": kinds[identity][1],
                    "area": len(rows),
                    "bbox": [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1],
                }
            )
        annotations.append({"image_id": 100 + index, "file_name": f"{index}.png", "segments_info": segments})
    images = [
        {"id": 100, "file_name": "0.png", "height": 8, "width": 12},
        {"id": 101, "file_name": "1.png", "height": 9, "width": 10},
    ]
    content = {"categories": CATEGORIES, "images": images, "annotations": annotations}
    return PanopticSet(tmp_path / "set", copy.deepcopy(content), [first, second]).write()


@pytest.fixture(autouse=True)
def forgetful_catalogs() -> Iterator[None]:
    """Removes the datasets that a test registers."""
    datasets, metadata = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - datasets:
        DatasetCatalog.remove(name)
    for name in set(MetadataCatalog.list()) - metadata:
        MetadataCatalog.remove(name)
