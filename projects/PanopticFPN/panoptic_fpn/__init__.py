"""Panoptic FPN (Kirillov et al., CVPR 2019, arXiv 1901.02446)."""

from .config import add_panoptic_fpn_config

__all__ = ["add_panoptic_fpn_config"]
