"""Panoptic FPN (Kirillov et al., CVPR 2019, arXiv 1901.02446)."""

from . import (
    checkpoint,  # registers the way back to Detectron2
    export,  # registers the export
)
from .config import add_panoptic_fpn_config
from .heads import PanopticFPNSemSegHead
from .meta_arch import ConvMaskPanopticFPN

__all__ = ["ConvMaskPanopticFPN", "PanopticFPNSemSegHead", "add_panoptic_fpn_config", "checkpoint", "export"]
