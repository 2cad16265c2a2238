"""EmbedMask (Ying et al., arXiv 1912.01954 and IJCAI 2021) on FCOS (Tian et al., arXiv 1904.01355)."""

from . import checkpoint, export  # register the converters of the original releases, and the export
from .config import add_embed_mask_config
from .fcos import ConvMaskFCOS
from .fcos_head import FCOSHead, FCOSOutputs
from .heads import EmbeddingHead, EmbeddingOutputs
from .meta_arch import EmbedMask

__all__ = [
    "ConvMaskFCOS",
    "EmbedMask",
    "EmbeddingHead",
    "EmbeddingOutputs",
    "FCOSHead",
    "FCOSOutputs",
    "add_embed_mask_config",
    "checkpoint",
    "export",
]
