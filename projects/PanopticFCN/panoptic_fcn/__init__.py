"""Panoptic FCN (Li et al., CVPR 2021, arXiv 2012.00720)."""

from . import checkpoint  # registers the converter of the original release
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
]
