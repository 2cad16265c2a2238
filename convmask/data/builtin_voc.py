"""Instance segmentation of PASCAL VOC 2012 and of SBD (also called SDS), from their own files."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from scipy.io import loadmat
from scipy.ndimage import find_objects

from convmask.data import metadata as lazy
from convmask.data.builtin_classes import VOC_CLASSES
from convmask.data.errors import DatasetError
from convmask.data.images import read_semantic_map
from convmask.data.instance import thing_categories
from convmask.data.json_files import missing

_VOID = 255
_logger = logging.getLogger(__name__)
# id map (H, W) and the class of each id from 1 on, 1 to 20
_Instances = tuple[np.ndarray, np.ndarray]


def register_voc(voc_root: str, sbd_root: str, name_format: str = "{}") -> None:
    """VOC's 20 classes, masks as RLE.

    ``convmask_voc_2012_{train,val,trainval}_instances``: VOC's own segmentations, void borders belonging to no object.
    ``convmask_sbd_{train,val}_instances``: SBD's annotations in SBD's split.
    ``convmask_sds_{train,val}_instances``: SBD's annotations in VOC 2012's split (5623 and 5732 images), FCIS's.
    """
    for split in ("train", "val", "trainval"):
        _register(
            name_format.format(f"convmask_voc_2012_{split}_instances"),
            functools.partial(_load_voc, voc_root, os.path.join(voc_root, "ImageSets", "Segmentation", f"{split}.txt")),
            os.path.join(voc_root, "JPEGImages"),
        )
    for split in ("train", "val"):
        for dataset, names in (
            ("sbd", os.path.join(sbd_root, f"{split}.txt")),
            ("sds", os.path.join(voc_root, "ImageSets", "Main", f"{split}.txt")),
        ):
            _register(
                name_format.format(f"convmask_{dataset}_{split}_instances"),
                functools.partial(_load_sbd, sbd_root, names, dataset == "sds"),
                os.path.join(sbd_root, "img"),
            )


def _register(name: str, load: Callable[[], list[dict[str, Any]]], image_root: str) -> None:
    categories = thing_categories({"id": index, "name": voc} for index, voc in enumerate(VOC_CLASSES, start=1))
    values = {key: value for key, value in categories.metadata().items() if not key.startswith("stuff")}
    lazy.register(name, load, None, evaluator_type="convmask_voc_instances", image_root=image_root, **values)


def _load_voc(root: str, list_file: str) -> list[dict[str, Any]]:
    read = functools.partial(read_voc_instances, root)
    return _records(_names(list_file), os.path.join(root, "JPEGImages"), read)


def _load_sbd(root: str, list_file: str, skip_unannotated: bool) -> list[dict[str, Any]]:
    names = _names(list_file)
    if skip_unannotated:
        folder = os.path.join(root, "inst")
        if not PathManager.isdir(folder):
            raise missing(folder, "folder")
        annotated = {os.path.splitext(name)[0] for name in PathManager.ls(folder)}
        names = [name for name in names if name in annotated]
    return _records(names, os.path.join(root, "img"), functools.partial(read_sbd_instances, root))


def _names(list_file: str) -> list[str]:
    if not PathManager.isfile(list_file):
        raise missing(list_file)
    with PathManager.open(list_file, "r") as file:
        names = [line.split()[0] for line in file if line.strip()]
    if not names:
        raise DatasetError(f"{list_file}: is empty")
    return names


def _records(names: list[str], image_root: str, read: Callable[[str], _Instances]) -> list[dict[str, Any]]:
    def record(name: str) -> dict[str, Any]:
        id_map, classes = read(name)
        height, width = id_map.shape
        return {
            "file_name": os.path.join(image_root, f"{name}.jpg"),
            "image_id": name,
            "height": height,
            "width": width,
            "annotations": _annotations(id_map, classes),
        }

    _logger.info("Reading the masks of %d images in %s", len(names), image_root)
    # Decoding releases the interpreter lock for the most part.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(record, names))


def _annotations(id_map: np.ndarray, classes: np.ndarray) -> list[dict[str, Any]]:
    annotations = []
    for index, where in enumerate(find_objects(id_map)):
        if where is None:
            continue
        rows, columns = where
        mask = np.zeros(id_map.shape, dtype=np.uint8, order="F")
        mask[where] = id_map[where] == index + 1
        encoded = mask_util.encode(mask)
        annotations.append(
            {
                "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": int(classes[index]) - 1,
                "iscrowd": 0,
                "segmentation": {"size": list(id_map.shape), "counts": encoded["counts"].decode("ascii")},
            }
        )
    return annotations


def read_voc_instances(root: str, name: str) -> _Instances:
    """Reads one image's objects from ``SegmentationObject`` and ``SegmentationClass``.

    Returns:
        The id map (H, W), int32, 0 where there is no object or void; and the class, 1 to 20, of each id from 1 on.

    Raises:
        DatasetError: a file is missing or broken, the two differ in size, or no class has most of an object's pixels.
    """
    files = [os.path.join(root, folder, f"{name}.png") for folder in ("SegmentationObject", "SegmentationClass")]
    objects, classes = (_read_palette(path) for path in files)
    if objects.shape != classes.shape:
        raise DatasetError(f"{files[0]}: is of size {objects.shape}, {files[1]} of {classes.shape}")
    objects = np.where(objects == _VOID, 0, objects).astype(np.int32)
    class_of = np.zeros(objects.max(initial=0), dtype=np.int64)
    for index in np.unique(objects[objects > 0]):
        votes = np.bincount(classes[objects == index], minlength=_VOID + 1)[1 : len(VOC_CLASSES) + 1]
        if 2 * votes.max() <= votes.sum():
            raise DatasetError(f"{files[0]}: object {index} is of no single class in {files[1]}")
        class_of[index - 1] = votes.argmax() + 1
    return objects, class_of


def _read_palette(path: str) -> np.ndarray:
    if not PathManager.isfile(path):
        raise missing(path)
    values = read_semantic_map(path)
    if values.max(initial=0) > _VOID:
        raise DatasetError(f"{path}: is not an 8-bit palette image")
    return values


def read_sbd_instances(root: str, name: str) -> _Instances:
    """Reads one image's objects from ``inst/<name>.mat``: ``GTinst.Segmentation`` and ``GTinst.Categories``.

    Returns:
        The id map (H, W), int32, 0 where there is no object; and the class, 1 to 20, of each id from 1 on.

    Raises:
        DatasetError: the file is missing or broken, or its fields do not fit each other.
    """
    path = os.path.join(root, "inst", f"{name}.mat")
    if not PathManager.isfile(path):
        raise missing(path)
    try:
        with PathManager.open(path, "rb") as file:
            content = loadmat(file, variable_names=["GTinst"], squeeze_me=True, struct_as_record=True)["GTinst"][()]
        id_map = np.asarray(content["Segmentation"])
        classes = np.atleast_1d(np.asarray(content["Categories"])).astype(np.int64)
    except Exception as error:  # scipy raises many kinds for broken files.
        raise DatasetError(f"{path}: is no readable SBD annotation ({type(error).__name__}: {error})") from error
    if id_map.ndim != 2 or id_map.dtype.kind not in "iu" or classes.ndim != 1:
        raise DatasetError(f"{path}: Segmentation is no label image, or Categories no list")
    if id_map.size and (id_map.min() < 0 or id_map.max() > len(classes)):
        raise DatasetError(f"{path}: Segmentation has ids up to {id_map.max()}, Categories {len(classes)} entries")
    if classes.size and not 1 <= classes.min() <= classes.max() <= len(VOC_CLASSES):
        raise DatasetError(f"{path}: Categories are not from 1 to {len(VOC_CLASSES)}: {classes.tolist()}")
    return id_map.astype(np.int32), classes
