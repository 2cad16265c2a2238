"""K-Net (Zhang et al., NeurIPS 2021, arXiv 2106.14855)."""

from . import checkpoint, export  # register the converters of the original releases, and the export
from .config import add_knet_config
from .kernel_head import KernelHead
from .meta_arch import KNet
from .segmentation_heads import ASPPHead, FCNHead, PSPHead, UPerHead
from .semantic_head import KNetSemSegHead
from .update_head import KernelUpdateHead, KernelUpdator

__all__ = [
    "ASPPHead",
    "FCNHead",
    "KNet",
    "KNetSemSegHead",
    "KernelHead",
    "KernelUpdateHead",
    "KernelUpdator",
    "PSPHead",
    "UPerHead",
    "add_knet_config",
    "checkpoint",
    "export",
]
