"""Small sets of images with squares, as someone brings them: COCO panoptic and COCO instances."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 96


def write_own_data(folder: Path, images: int = 6) -> None:
    """``folder/images``, ``panoptic.json`` with ``panoptic/``, and ``instances.json``: two classes of squares on a
    ground."""
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries, panoptic, instances = [], [], []
    for index in range(images):
        name = f"photo_{index}.png"
        picture = rng.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        ids = np.full((HEIGHT, WIDTH), 1)
        segments = []
        for number, (x, y, side) in enumerate(((6 + index, 8, 20), (50, 20 + index, 30))):
            picture[y : y + side, x : x + side, number] += 150
            ids[y : y + side, x : x + side] = number + 2
            box, category = [x, y, side, side], 10 * (number + 1)
            common = {"category_id": category, "bbox": box, "area": side**2, "iscrowd": 0}
            segments.append({"id": number + 2, **common})
            polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
            instances.append({"id": len(instances) + 1, "image_id": index, "segmentation": [polygon], **common})
        ground = int((ids == 1).sum())
        segments.append({"id": 1, "category_id": 3, "bbox": [0, 0, WIDTH, HEIGHT], "area": ground, "iscrowd": 0})
        Image.fromarray(picture).save(folder / "images" / name)
        coded = np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=-1).astype(np.uint8)
        Image.fromarray(coded).save(folder / "panoptic" / name)
        entries.append({"id": index, "file_name": name, "height": HEIGHT, "width": WIDTH})
        panoptic.append({"image_id": index, "file_name": name, "segments_info": segments})
    things = [{"id": 10, "name": "red", "isthing": 1}, {"id": 20, "name": "green", "isthing": 1}]
    stuff = [{"id": 3, "name": "ground", "isthing": 0}]
    for file, categories, listed in (
        ("panoptic.json", things + stuff, panoptic),
        ("instances.json", things, instances),
    ):
        content = {"images": entries, "annotations": listed, "categories": categories}
        (folder / file).write_text(json.dumps(content))
