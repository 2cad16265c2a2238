"""FCIS: fully convolutional instance-aware semantic segmentation (Li et al., CVPR 2017, arXiv 1611.07709)."""

from . import checkpoint, classes, export  # register the releases' converters, the class counts and the export
from .anchors import FCISAnchorGenerator
from .backbone import (
    build_fcis_narrow_resnet_backbone,
    build_fcis_narrow_resnet_fpn_backbone,
    build_fcis_resnet_backbone,
    build_fcis_resnet_fpn_backbone,
)
from .config import add_fcis_config
from .convention import CHAINERCV, MXNET, Convention
from .heads import PositionSensitiveHead
from .meta_arch import FCIS
from .roi_heads import FCISROIHeads
from .rpn import FCISRPN, FCISRPNHead

__all__ = [
    "CHAINERCV",
    "FCIS",
    "FCISRPN",
    "MXNET",
    "Convention",
    "FCISAnchorGenerator",
    "FCISROIHeads",
    "FCISRPNHead",
    "PositionSensitiveHead",
    "add_fcis_config",
    "build_fcis_narrow_resnet_backbone",
    "build_fcis_narrow_resnet_fpn_backbone",
    "build_fcis_resnet_backbone",
    "build_fcis_resnet_fpn_backbone",
    "checkpoint",
    "classes",
    "export",
]
