"""Semantic datasets: pictures, and PNG files whose pixel values are labels."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.utils.file_io import PathManager

from convmask.data import metadata as lazy
from convmask.data.categories import SemanticCategories
from convmask.data.errors import DatasetError
from convmask.data.json_files import missing
from convmask.data.label_maps import add_label_map

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

_logger = logging.getLogger(__name__)


def register_semantic(
    name: str,
    image_root: str | os.PathLike[str],
    label_root: str | os.PathLike[str],
    classes: Sequence[str],
    ignore_label: int = 255,
    *,
    image_suffix: str | Sequence[str] = IMAGE_SUFFIXES,
    label_suffix: str = ".png",
    label_map: Mapping[int, int] | None = None,
    colors: Sequence[Sequence[int]] | None = None,
    **metadata: Any,
) -> None:
    """Registers a semantic segmentation dataset with Detectron2's catalogs.

    A picture and a label file belong together when their paths below the two folders are the same up to their suffixes.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        image_root: folder of the pictures; subfolders are searched.
        label_root: folder of the single-channel label files.
        classes: name of each label, 0 to S-1.
        ignore_label: pixel value that counts neither in training nor in evaluation.
        image_suffix: endings of the pictures' names, compared without regard to case.
        label_suffix: ending of the label files' names, for instance ``_labelTrainIds.png``.
        label_map: pixel value to label, where they are not the same. Values that it lacks are ignored.
        colors: RGB colour (0 to 255) of each class.
        metadata: further values for ``MetadataCatalog``.

    Raises:
        DatasetError: the name is taken, there are no classes, or their number differs from that of the colours.
            At first use: a folder is missing, or holds no pair of files.
    """
    image_root, label_root = os.fspath(image_root), os.fspath(label_root)
    suffixes = (image_suffix,) if isinstance(image_suffix, str) else tuple(image_suffix)
    if isinstance(classes, str) or not classes:
        raise DatasetError(f"dataset {name!r}: classes is not a list with at least one name: {classes!r}")
    if colors is not None and len(colors) != len(classes):
        raise DatasetError(f"dataset {name!r}: {len(colors)} colours for {len(classes)} classes")
    sources = label_root if label_map is None else add_label_map(name, label_root, label_map, ignore_label)
    own = {
        "evaluator_type": "sem_seg",
        "image_root": image_root,
        "sem_seg_root": label_root,
        "ignore_label": ignore_label,
        **SemanticCategories.from_names(classes, colors).metadata(),
    }
    load = functools.partial(load_semantic, image_root, label_root, suffixes, label_suffix, sources)
    lazy.register(name, load, None, **{**own, **metadata})


def load_semantic(
    image_root: str, label_root: str, image_suffixes: tuple[str, ...], label_suffix: str, sources: str | None = None
) -> list[dict[str, Any]]:
    """Lists the pairs of picture and label file, sorted.

    Returns:
        One dict a pair: ``file_name``, ``sem_seg_file_name``, and ``image_id``, the path without its suffix. Sizes are
        not known without opening the files, and are left to the mapper.

    Raises:
        DatasetError: a folder is missing, or there is no pair.
    """
    images = _by_stem(image_root, image_suffixes)
    labels = _by_stem(label_root, (label_suffix,))
    stems = sorted(images.keys() & labels.keys())
    if not stems:
        raise DatasetError(
            f"no picture in {image_root} has a label file in {label_root}: found {len(images)} pictures "
            f"(*{', *'.join(image_suffixes)}) and {len(labels)} label files (*{label_suffix})"
        )
    if len(stems) < max(len(images), len(labels)):
        message = "%d pictures in %s and %d label files in %s: using the %d that belong together"
        _logger.warning(message, len(images), image_root, len(labels), label_root, len(stems))
    return [
        {
            "file_name": os.path.join(image_root, images[stem]),
            "sem_seg_file_name": os.path.join(sources or label_root, labels[stem]),
            "image_id": stem,
        }
        for stem in stems
    ]


def _by_stem(root: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Path below ``root`` without its suffix -> path below ``root``."""
    if not PathManager.isdir(root):
        raise missing(root, "folder")
    found = {}
    for path in _files(root):
        suffix = next((suffix for suffix in suffixes if path.lower().endswith(suffix.lower())), None)
        if suffix is not None:
            found[path[: -len(suffix)].replace(os.sep, "/")] = path
    return found


def _files(root: str) -> list[str]:
    if not os.path.isdir(root):
        return [str(name) for name in PathManager.ls(root)]
    return [
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    ]
