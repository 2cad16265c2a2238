"""Images to check a program with: the user's, those of the model's data set, or drawn ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from PIL import Image

from convmask.data.errors import DatasetError
from convmask.data.images import read_image

from .wrapper import Size


def image_files(cfg: CfgNode, number: int, given: Sequence[str] = ()) -> list[str]:
    """Names of ``number`` images; fewer given ones are repeated.

    Args:
        cfg: its first test set is asked, then the built-in synthetic one.
        number: of images.
        given: files of the user; empty for none.

    Raises:
        DatasetError: a given file does not exist.
    """
    missing = [name for name in given if not Path(name).is_file()]
    if missing:
        raise DatasetError(f"no file {missing[0]}")
    names = list(given)
    for dataset in (*cfg.DATASETS.TEST[:1], "synthetic_panoptic_val"):
        if names:
            break
        try:
            names = [record["file_name"] for record in DatasetCatalog.get(dataset)[:number]]
        except (DatasetError, KeyError, OSError):
            continue
    return [names[index % len(names)] for index in range(number)]


def sized_image(file_name: str, size: Size, channels: str) -> torch.Tensor:
    """An image (3, H, W) float32 from 0 to 255, resized to (H, W), in the order "RGB" or "BGR" of the channels."""
    pixels = read_image(file_name, channels)
    resized = Image.fromarray(np.ascontiguousarray(pixels)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32).transpose(2, 0, 1).copy())
