"""What somebody needs to know who runs an exported file without this code."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from convmask import __version__

from .program import GREATEST_SIDE, STEP
from .wrapper import ExportWrapper, Size


def description(wrapper: ExportWrapper, cfg: CfgNode, size: Size | None, files: dict[str, str]) -> dict[str, Any]:
    """Input, outputs, preprocessing and classes, as json holds them.

    Args:
        wrapper: what was exported.
        cfg: of the model.
        size: of the images; None: sides may be any multiples of ``STEP``.
        files: name of the file of each format.
    """
    sides = {"multiple_of": STEP, "least": wrapper.least_side, "greatest": GREATEST_SIDE}
    shape = [3, "H", "W"] if size is None else [3, *size]
    return {
        "model": type(wrapper.model).__name__,
        "files": files,
        "input": {
            "name": "image",
            "shape": shape,
            "dtype": "float32",
            "channels": cfg.INPUT.FORMAT,
            "values": "0 to 255; the program normalises and pads",
            **({"sides": sides} if size is None else {}),
        },
        "resizing": {
            "shortest_side": cfg.INPUT.MIN_SIZE_TEST or "as the image is",
            "longest_side_at_most": cfg.INPUT.MAX_SIZE_TEST if cfg.INPUT.MIN_SIZE_TEST else "as the image is",
            "interpolation": "bilinear",
        },
        "outputs": wrapper.outputs,
        "inside": list(wrapper.inside),
        "outside": list(wrapper.outside),
        "classes": class_names(cfg),
        "versions": {"convmask": __version__, "torch": torch.__version__},
    }


def class_names(cfg: CfgNode) -> dict[str, list[str]]:
    """Names by "thing_classes" and "stuff_classes" of the first data set of the config that knows them.

    Classes of instances are indices of the former. Those of ``stuff_ids`` and, in the layout "separated", labels of
    ``sem_seg`` are indices of the latter.
    """
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(name)
        found = {key: list(metadata.get(key)) for key in ("thing_classes", "stuff_classes") if metadata.get(key)}
        if found:
            return found
    return {}
