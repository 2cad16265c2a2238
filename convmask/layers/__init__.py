"""Layers that several methods share."""

from .coord_conv import append_coordinates
from .deform_conv import DeformConv2d
from .frozen_statistics import FrozenStatisticsBatchNorm2d
from .narrow_resnet import (
    build_narrow_resnet_backbone,
    build_narrow_resnet_fpn_backbone,
    build_narrow_resnet_fpn_p7_backbone,
)
from .openmmlab_resnet import build_openmmlab_resnet_backbone, build_openmmlab_resnet_fpn_backbone
from .position_encoding import sine_position_encoding
from .resnet_fpn import build_resnet_fpn_p7_backbone
from .semantic_fpn import SemanticFPN
from .swin import Swin, build_swin_backbone, build_swin_fpn_backbone

__all__ = [
    "DeformConv2d",
    "FrozenStatisticsBatchNorm2d",
    "SemanticFPN",
    "Swin",
    "append_coordinates",
    "build_narrow_resnet_backbone",
    "build_narrow_resnet_fpn_backbone",
    "build_narrow_resnet_fpn_p7_backbone",
    "build_openmmlab_resnet_backbone",
    "build_openmmlab_resnet_fpn_backbone",
    "build_resnet_fpn_p7_backbone",
    "build_swin_backbone",
    "build_swin_fpn_backbone",
    "sine_position_encoding",
]
