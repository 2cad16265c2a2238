"""Classes of public datasets that neither their annotation files nor Detectron2 name."""

from __future__ import annotations

from typing import Any

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES, COCO_CATEGORIES

NUCLEI_CATEGORIES: list[dict[str, Any]] = [
    {"id": 1, "name": "nucleus", "isthing": 1, "color": [220, 20, 60]},
    {"id": 2, "name": "background-fluorescence", "isthing": 0, "color": [20, 20, 20]},
    {"id": 3, "name": "background-stained", "isthing": 0, "color": [250, 190, 220]},
    {"id": 4, "name": "background-brightfield", "isthing": 0, "color": [190, 190, 190]},
]

CITYSCAPES_PANOPTIC_CATEGORIES: list[dict[str, Any]] = [
    {key: category[key] for key in ("id", "name", "isthing", "color")} for category in CITYSCAPES_CATEGORIES
]

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on

# COCO-Stuff: category ids 92 to 182. Id 183 of the 2017 stuff task, "other", is everything else.
COCO_STUFF_FIRST_ID = 92
# fmt: off
COCO_STUFF_CLASSES = (
    "banner", "blanket", "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood", "flower",
    "fog", "food-other", "fruit", "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves",
    "light", "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper", "pavement",
    "pillow", "plant-other", "plastic", "platform", "playingfield", "railing", "railroad", "river", "road", "rock",
    "roof", "rug", "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs",
    "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree", "vegetable", "wall-brick",
    "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile", "wall-wood", "water-other",
    "waterdrops", "window-blind", "window-other", "wood",
)
# fmt: on

COCO_THINGS: list[dict[str, Any]] = [category for category in COCO_CATEGORIES if category["isthing"]]
