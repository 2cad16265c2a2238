"""The keys of Panoptic FPN."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_panoptic_fpn_config(cfg: CfgNode) -> None:
    """Extends Detectron2's node ``MODEL.PANOPTIC_FPN``, in place."""
