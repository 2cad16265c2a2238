"""Datasets that a config registers itself, by ``DATASETS.REGISTER``: no module has to be imported for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from convmask.data.errors import DatasetError
from convmask.data.instance import register_instances
from convmask.data.panoptic import register_panoptic

# After the name and the kind: what files an entry names, by their keys in the metadata.
KINDS = {"panoptic": ("image_root", "panoptic_json", "panoptic_root"), "instances": ("image_root", "json_file")}


def register_datasets_of(cfg: CfgNode) -> None:
    """Registers the datasets of ``DATASETS.REGISTER``; one that is registered with the same files already stays.

    Raises:
        DatasetError: an entry is malformed, or its name is taken by other files.
    """
    for entry in cfg.DATASETS.REGISTER:
        name, kind, files = _parts(entry)
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name).__dict__
            if any(known.get(key) != file for key, file in zip(KINDS[kind], files, strict=True)):
                raise DatasetError(f"DATASETS.REGISTER: {name!r} is registered already, with other files")
        elif kind == "panoptic":
            register_panoptic(name, *files)
        else:
            register_instances(name, *files)


def _parts(entry: Any) -> tuple[str, str, Sequence[str]]:
    forms = " or ".join(f"[name, {kind!r}, {', '.join(keys)}]" for kind, keys in KINDS.items())
    strings = isinstance(entry, list | tuple) and all(isinstance(part, str) and part for part in entry)
    if not strings or len(entry) < 2 or entry[1] not in KINDS or len(entry) != 2 + len(KINDS[entry[1]]):
        raise DatasetError(f"DATASETS.REGISTER: {entry!r:.200} is not {forms}")
    return entry[0], entry[1], entry[2:]
