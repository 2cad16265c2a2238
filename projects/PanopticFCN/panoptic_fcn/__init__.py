"""Panoptic FCN (Li et al., CVPR 2021, arXiv 2012.00720)."""

from . import checkpoint, export  # register the converter of the original release, and the export
from .config import add_panoptic_fcn_config
from .heads import FeatureEncoder, HeadOutputs, KernelHead, PositionHead
from .meta_arch import PanopticFCN

__all__ = [
    "FeatureEncoder",
    "HeadOutputs",
    "KernelHead",
    "PanopticFCN",
    "PositionHead",
    "add_panoptic_fcn_config",
    "checkpoint",
    "export",
]
