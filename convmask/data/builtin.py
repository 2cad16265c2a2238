"""Public datasets in the folder layouts of Detectron2 and the projects around it, below ``$DETECTRON2_DATASETS``.

Registering reads nothing: an absent dataset is an error only for who uses it. What Detectron2 registers itself (COCO
2014 and 2017 instances, Cityscapes instances and semantics, prepared ADE20K semantics, VOC boxes) is not repeated here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, COCO_CATEGORIES

from convmask.data.builtin_classes import (
    CITYSCAPES_PANOPTIC_CATEGORIES,
    COCO_STUFF_CLASSES,
    COCO_STUFF_FIRST_ID,
    COCO_THINGS,
    NUCLEI_CATEGORIES,
)
from convmask.data.builtin_voc import register_voc
from convmask.data.json_files import datasets_root
from convmask.data.panoptic import register_panoptic
from convmask.data.semantic import register_semantic


def register_builtin(root: str, name_format: str = "{}") -> None:
    """Registers every built-in dataset below the folder ``root``.

    Args:
        root: holds the folders ``coco``, ``cityscapes``, ``nuclei`` and so on; see docs/data.md.
        name_format: makes the registered name from the dataset's own, for a second copy of the data.

    Raises:
        DatasetError: a name is taken.
    """
    register_nuclei(os.path.join(root, "nuclei"), name_format)
    register_coco(os.path.join(root, "coco"), name_format)
    register_cityscapes(os.path.join(root, "cityscapes"), name_format)
    register_ade20k(os.path.join(root, "ADEChallengeData2016"), name_format)
    register_mapillary(os.path.join(root, "mapillary_vistas"), name_format)
    register_voc(os.path.join(root, "VOC2012"), os.path.join(root, "sbd"), name_format)


def register_nuclei(root: str, name_format: str = "{}") -> None:
    """``nuclei_{train,val}``: nuclei in microscopy images, the background by modality as stuff."""
    for split in ("train", "val"):
        register_panoptic(
            name_format.format(f"nuclei_{split}"),
            os.path.join(root, "images"),
            os.path.join(root, f"panoptic_{split}.json"),
            os.path.join(root, "panoptic"),
            categories=NUCLEI_CATEGORIES,
        )


def register_coco(root: str, name_format: str = "{}") -> None:
    """``convmask_coco_2017_{train,val}_{panoptic,stuff,stuffthing}``.

    ``panoptic``: 80 things and 53 stuff classes. ``stuff``: the 91 stuff classes and "other" of the 2017 stuff task,
    from its pixel maps. ``stuffthing``: the 80 + 91 classes of COCO-Stuff 164k, from its ``stuffthingmaps``.
    """
    other = COCO_STUFF_FIRST_ID + len(COCO_STUFF_CLASSES)
    stuff = {value: label for label, value in enumerate(range(COCO_STUFF_FIRST_ID, other + 1))}
    # These files hold category ids less one.
    things = [category["id"] for category in COCO_THINGS]
    both = {value - 1: label for label, value in enumerate([*things, *range(COCO_STUFF_FIRST_ID, other)])}
    for split in ("train", "val"):
        images = os.path.join(root, f"{split}2017")
        register_panoptic(
            name_format.format(f"convmask_coco_2017_{split}_panoptic"),
            images,
            os.path.join(root, "annotations", f"panoptic_{split}2017.json"),
            os.path.join(root, f"panoptic_{split}2017"),
            categories=COCO_CATEGORIES,
        )
        register_semantic(
            name_format.format(f"convmask_coco_2017_{split}_stuff"),
            images,
            os.path.join(root, f"stuff_{split}2017_pixelmaps"),
            [*COCO_STUFF_CLASSES, "other"],
            label_map=stuff,
        )
        register_semantic(
            name_format.format(f"convmask_coco_2017_{split}_stuffthing"),
            images,
            os.path.join(root, "stuffthingmaps", f"{split}2017"),
            [*(category["name"] for category in COCO_THINGS), *COCO_STUFF_CLASSES],
            label_map=both,
        )


def cityscapes_image_path(image: Mapping[str, Any]) -> str:
    """The picture of an entry of Cityscapes' panoptic json, whose ``file_name`` is not that of the file.

    The id ``aachen_000000_000019`` stands for ``aachen/aachen_000000_000019_leftImg8bit.png``.
    """
    identity = str(image["id"])
    return os.path.join(identity.split("_")[0], f"{identity}_leftImg8bit.png")


def register_cityscapes(root: str, name_format: str = "{}") -> None:
    """``convmask_cityscapes_{train,val}_panoptic``: 8 things and 11 stuff classes.

    Labels of the semantic layout "all" are Cityscapes' 19 train ids.
    """
    for split in ("train", "val"):
        register_panoptic(
            name_format.format(f"convmask_cityscapes_{split}_panoptic"),
            os.path.join(root, "leftImg8bit", split),
            os.path.join(root, "gtFine", f"cityscapes_panoptic_{split}.json"),
            os.path.join(root, "gtFine", f"cityscapes_panoptic_{split}"),
            categories=CITYSCAPES_PANOPTIC_CATEGORIES,
            label_order="category_id",
            image_path=cityscapes_image_path,
        )


def register_ade20k(root: str, name_format: str = "{}") -> None:
    """``convmask_ade20k_{train,val}_{panoptic,semantic}``: 150 classes, 100 of them things.

    ``panoptic`` reads Mask2Former's ``ade20k_panoptic_{train,val}.json``; ``semantic`` the scene parsing challenge's
    own ``annotations``, where 0 is unlabelled and 1 to 150 are the classes.
    """
    for split, folder in (("train", "training"), ("val", "validation")):
        images = os.path.join(root, "images", folder)
        register_panoptic(
            name_format.format(f"convmask_ade20k_{split}_panoptic"),
            images,
            os.path.join(root, f"ade20k_panoptic_{split}.json"),
            os.path.join(root, f"ade20k_panoptic_{split}"),
            label_order="category_id",
        )
        register_semantic(
            name_format.format(f"convmask_ade20k_{split}_semantic"),
            images,
            os.path.join(root, "annotations", folder),
            [name.strip() for name in ADE20K_SEM_SEG_CATEGORIES],
            label_map={value: value - 1 for value in range(1, 1 + len(ADE20K_SEM_SEG_CATEGORIES))},
        )


def register_mapillary(root: str, name_format: str = "{}") -> None:
    """``convmask_mapillary_{train,val}_panoptic``: Mapillary Vistas 1.2 with 37 things and 28 stuff classes."""
    for split, folder in (("train", "training"), ("val", "validation")):
        annotations = os.path.join(root, folder, "panoptic")
        register_panoptic(
            name_format.format(f"convmask_mapillary_{split}_panoptic"),
            os.path.join(root, folder, "images"),
            os.path.join(annotations, "panoptic_2018.json"),
            annotations,
            label_order="category_id",
        )


register_builtin(datasets_root())
