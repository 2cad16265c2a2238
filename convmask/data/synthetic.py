"""The built-in panoptic datasets: drawn on the fly, the same on every platform, nothing to download.

``synthetic_panoptic_{train,val}`` is moderate: 2 to 6 objects of five shapes on two or three textures, which a small
model learns on a CPU in minutes. ``synthetic_panoptic_hard_{train,val}`` holds what real data holds as well: heavy
occlusion, objects of one pixel and objects larger than the image, images without any object, crowd regions, unlabelled
regions.

Image files have names such as ``synthetic://panoptic_train/images/000012.png``, id maps
``synthetic://panoptic_train/panoptic/000012.png``; Detectron2's ``PathManager`` opens both.
"""

from __future__ import annotations

import copy
import io
import re
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir
from scipy import ndimage

from convmask.data.panoptic import register_panoptic_records
from convmask.data.synthetic_drawing import draw_image
from convmask.data.synthetic_layout import (
    HARD,
    MODERATE,
    STUFF,
    STUFF_CATEGORY_IDS,
    THING_CATEGORY_IDS,
    THINGS,
    VERSION,
    Layout,
    Recipe,
    draw_layout,
)
from convmask.utils.files import write_atomically

PREFIX = "synthetic://"

CATEGORIES = [
    *({"id": i, "name": name, "isthing": 1} for i, name in zip(THING_CATEGORY_IDS, THINGS, strict=True)),
    *({"id": i, "name": name, "isthing": 0} for i, name in zip(STUFF_CATEGORY_IDS, STUFF, strict=True)),
]


@dataclass(frozen=True)
class Split:
    """One of the datasets."""

    number: int
    """Distinguishes the splits in the seed of an image, so that no image is in two of them."""
    count: int
    """Of images."""
    recipe: Recipe


SPLITS = {
    "panoptic_train": Split(0, 1000, MODERATE),
    "panoptic_val": Split(1, 100, MODERATE),
    "panoptic_hard_train": Split(2, 200, HARD),
    "panoptic_hard_val": Split(3, 48, HARD),
}


@lru_cache(maxsize=32)
def synthetic_layout(split: str, index: int) -> Layout:
    """The segments of an image of a split (a key of ``SPLITS``)."""
    return draw_layout(SPLITS[split].recipe, SPLITS[split].number, index)


def synthetic_image(split: str, index: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3): the RGB picture of an image of a split (a key of ``SPLITS``)."""
    return draw_image(synthetic_layout(split, index), SPLITS[split].number, index)


def _record(split: str, index: int) -> dict[str, Any]:
    layout = synthetic_layout(split, index)
    areas = np.bincount(layout.order.ravel(), minlength=len(layout.segments) + 1)
    segments = []
    for number, (segment, box) in enumerate(zip(layout.segments, ndimage.find_objects(layout.order), strict=True), 1):
        rows, columns = box
        segments.append(
            {
                "id": segment.id,
                "category_id": THINGS.index(segment.name) if segment.isthing else 1 + STUFF.index(segment.name),
                "isthing": segment.isthing,
                "iscrowd": int(segment.iscrowd),
                "area": int(areas[number]),
                "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                "bbox_mode": BoxMode.XYWH_ABS,
            }
        )
    keys = ("bbox", "bbox_mode", "category_id", "iscrowd")
    return {
        "file_name": f"{PREFIX}{split}/images/{index:06d}.png",
        "pan_seg_file_name": f"{PREFIX}{split}/panoptic/{index:06d}.png",
        # COCO's evaluation takes an id of 0 for "none".
        "image_id": index + 1,
        "height": layout.order.shape[0],
        "width": layout.order.shape[1],
        "segments_info": segments,
        "annotations": [{**{k: s[k] for k in keys}, "segment_id": s["id"]} for s in segments if s["isthing"]],
    }


@cache
def _records(split: str) -> tuple[dict[str, Any], ...]:
    return tuple(_record(split, index) for index in range(SPLITS[split].count))


def load_records(split: str) -> list[dict[str, Any]]:
    """The dataset dicts of a split (a key of ``SPLITS``), in the form of ``convmask.data.panoptic.load_panoptic``.

    Boxes and areas are those of the visible pixels. The dicts are computed once in a process; each call returns copies.
    """
    return copy.deepcopy(list(_records(split)))


class SyntheticPathHandler(PathHandler):
    """Serves ``synthetic://<split>/{images,panoptic}/<index>.png`` to iopath: drawn and encoded when opened."""

    _NAME = re.compile(r"(?P<split>\w+)/(?P<kind>images|panoptic)/(?P<index>\d{6})\.png")

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _parse(self, path: str) -> tuple[str, str, int]:
        match = self._NAME.fullmatch(path[len(PREFIX) :])
        split = SPLITS.get(match["split"]) if match else None
        if match is None or split is None or int(match["index"]) >= split.count:
            raise FileNotFoundError(
                f"no synthetic file {path!r}: names are {PREFIX}<split>/images/000000.png and "
                f"{PREFIX}<split>/panoptic/000000.png, numbered below "
                + ", ".join(f"{s.count} ({name})" for name, s in SPLITS.items())
            )
        return match["split"], match["kind"], int(match["index"])

    def _encoded(self, path: str) -> bytes:
        split, kind, index = self._parse(path)
        if kind == "images":
            pixels = synthetic_image(split, index)
        else:
            ids = synthetic_layout(split, index).ids
            pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
        # Nobody stores it: encoding without compression is the fastest.
        done, encoded = cv2.imencode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0])
        if not done:
            raise OSError(f"OpenCV cannot encode {path!r}")
        return encoded.tobytes()

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> io.BytesIO:
        self._check_kwargs(kwargs)
        if mode != "rb":
            raise OSError(f"{path!r} can be opened with mode 'rb' only, not {mode!r}")
        return io.BytesIO(self._encoded(path))

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        self._parse(path)
        local = Path(get_cache_dir(), "convmask", f"synthetic-{VERSION}", path[len(PREFIX) :])
        if force or not local.is_file():
            content = self._encoded(path)
            local.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(local, content)
        return str(local)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        try:
            self._parse(path)
        except FileNotFoundError:
            return False
        return True

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path, **kwargs)


def register_all() -> None:
    """Registers the path handler and the datasets; what is registered already stays."""
    PathManager.register_handler(SyntheticPathHandler(), allow_override=True)
    for split in SPLITS:
        if f"synthetic_{split}" not in DatasetCatalog.list():
            register_panoptic_records(f"synthetic_{split}", CATEGORIES, partial(load_records, split))


register_all()
