"""Layers that several methods share."""

from .narrow_resnet import build_narrow_resnet_fpn_backbone
from .semantic_fpn import SemanticFPN

__all__ = ["SemanticFPN", "build_narrow_resnet_fpn_backbone"]
