"""Semantic PNG files whose pixel values are not the labels: remapped as they are opened.

``label-map://<dataset>/<path>`` opens the PNG below the dataset's label folder with its values replaced. So every
reader sees labels, Detectron2's evaluators included, and nothing is written to disk.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from PIL import Image

from convmask.data.errors import DatasetError
from convmask.data.images import read_semantic_map
from convmask.data.json_files import missing

PREFIX = "label-map://"

_tables: dict[str, tuple[str, np.ndarray]] = {}


def add_label_map(dataset: str, label_root: str, label_map: Mapping[int, int], ignore_label: int) -> str:
    """Makes the remapped files available and returns the prefix that stands for ``label_root``.

    Args:
        dataset: a name without "/".
        label_root: folder of the PNG files, whose pixel values are 0 to 65535.
        label_map: pixel value to label (0 to 255). Values that it lacks become ``ignore_label``.
        ignore_label: 0 to 255.

    Raises:
        DatasetError: a value, a label or the name is out of range.
    """
    wrong = [item for item in label_map.items() if not (0 <= item[0] < 65536 and 0 <= item[1] < 256)]
    if wrong or not 0 <= ignore_label < 256:
        raise DatasetError(f"label map of {dataset!r}: {wrong[0] if wrong else ignore_label} is out of range")
    if not dataset or "/" in dataset:
        raise DatasetError(f"{dataset!r} cannot name a label map: it is empty or holds a slash")
    table = np.full(65536, ignore_label, dtype=np.uint8)
    table[list(label_map.keys())] = list(label_map.values())
    _tables[dataset] = (label_root, table)
    return f"{PREFIX}{dataset}/"


class LabelMapHandler(PathHandler):
    """Opens ``label-map://`` paths for reading."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode != "rb":
            raise ValueError(f"{path} can be opened with mode 'rb' only, not {mode!r}")
        source, table = _source(path)
        if not PathManager.isfile(source):
            raise missing(source)
        values = read_semantic_map(source)
        encoded = io.BytesIO()
        Image.fromarray(table[values]).save(encoded, "PNG", compress_level=1)
        encoded.seek(0)
        return encoded

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return PathManager.exists(_source(path)[0])

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return PathManager.isfile(_source(path)[0])

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return PathManager.isdir(_source(path)[0])

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        return PathManager.ls(_source(path)[0])


def _source(path: str) -> tuple[str, np.ndarray]:
    dataset, _, relative = path[len(PREFIX) :].partition("/")
    if dataset not in _tables:
        raise DatasetError(f"{path}: no label map {dataset!r} is registered in this process")
    label_root, table = _tables[dataset]
    return os.path.join(label_root, relative), table


PathManager.register_handler(LabelMapHandler(), allow_override=True)
