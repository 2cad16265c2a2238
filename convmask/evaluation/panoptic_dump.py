"""Panoptic predictions on disk in COCO's format for submission: one PNG an image and a json."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from convmask.utils.files import write_atomically

MAX_ID = 256**3 - 1


def encode_panoptic_png(id_map: np.ndarray) -> bytes:
    """Encodes an (H, W) map of ids 0 to 2^24 - 1 as COCO's RGB PNG: id = R + 256 G + 256^2 B.

    Raises:
        ValueError: an id does not fit.
    """
    if id_map.size and not 0 <= id_map.min() <= id_map.max() <= MAX_ID:
        raise ValueError(f"segment ids from {id_map.min()} to {id_map.max()} do not fit a PNG (0 to {MAX_ID})")
    channels = np.ascontiguousarray(id_map, dtype="<u4").view(np.uint8).reshape(*id_map.shape, 4)
    with io.BytesIO() as file:
        Image.fromarray(np.ascontiguousarray(channels[..., :3])).save(file, format="PNG")
        return file.getvalue()


class PanopticDump:
    """Writes ``panoptic_predictions/*.png`` and ``panoptic_predictions.json`` into a folder.

    panopticapi finds the PNG files of a json in the folder of the json's name. All processes must see the same folder.
    """

    def __init__(self, output_dir: str, records: Mapping[Hashable, Mapping[str, Any]]) -> None:
        """Takes a local folder and the dataset's records by image id, each with the "file_name" of the image.

        A PNG bears the name of its image; where two images of the dataset have one name, also the image id.

        Raises:
            ValueError: two images have names and ids that give one name for a PNG.
        """
        self.folder = os.path.join(output_dir, "panoptic_predictions")
        self.json_file = self.folder + ".json"
        stems = {image_id: _stem(record["file_name"]) for image_id, record in records.items()}
        occurrences = Counter(stems.values())
        self._names = {
            image_id: stem if occurrences[stem] == 1 else f"{stem}_{quote(str(image_id), safe=' ')}"
            for image_id, stem in stems.items()
        }
        twice = [name for name, times in Counter(self._names.values()).items() if times > 1]
        if twice:
            raise ValueError(f"panoptic predictions of two images would both be named {twice[0]}.png")

    def start(self, remove_json: bool) -> None:
        """Makes the folder; one process also removes the json of an earlier evaluation, which will not fit the PNGs."""
        os.makedirs(self.folder, exist_ok=True)
        if remove_json and os.path.exists(self.json_file):
            os.unlink(self.json_file)

    def write_image(self, image_id: Hashable, id_map: np.ndarray, segments: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the PNG of one image; returns its entry for ``write_json``.

        Args:
            image_id: of the dataset.
            id_map: (H, W) integers, 0 where there is no segment.
            segments: each with "id" and the dataset's "category_id".
        """
        name = f"{self._names[image_id]}.png"
        write_atomically(os.path.join(self.folder, name), encode_panoptic_png(id_map))
        return {
            "image_id": image_id,
            "file_name": name,
            "segments_info": [
                {"id": int(segment["id"]), "category_id": int(segment["category_id"])} for segment in segments
            ],
        }

    def write_json(self, annotations: list[dict[str, Any]]) -> None:
        """Writes the json with the entries of all images."""
        write_atomically(self.json_file, json.dumps({"annotations": annotations}).encode())


def _stem(file_name: str) -> str:
    return os.path.splitext(os.path.basename(file_name))[0]
