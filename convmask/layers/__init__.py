"""Layers that several methods share."""

from .coord_conv import append_coordinates
from .deform_conv import DeformConv2d
from .narrow_resnet import build_narrow_resnet_fpn_backbone, build_narrow_resnet_fpn_p7_backbone
from .resnet_fpn import build_resnet_fpn_p7_backbone
from .semantic_fpn import SemanticFPN

__all__ = [
    "DeformConv2d",
    "SemanticFPN",
    "append_coordinates",
    "build_narrow_resnet_fpn_backbone",
    "build_narrow_resnet_fpn_p7_backbone",
    "build_resnet_fpn_p7_backbone",
]
