"""ResNet-FPN with two more levels: P6 and P7 from P5 (FCOS, arXiv 1904.01355)."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7


class TopLevels(LastLevelP6P7):
    """Detectron2's, exact under bfloat16 for images of any size."""

    def forward(self, c5: torch.Tensor) -> list[torch.Tensor]:
        """P6 and P7 from p5."""
        # On the CPU, the bfloat16 gradient of a 3x3 kernel of stride 2 on a single cell is memory that nothing
        # has been written to (seen with PyTorch 2.14.1, AVX-512): images of 64 pixels have a P6 of one cell.
        if c5.is_cuda or min(c5.shape[-2:]) > 2:
            return super().forward(c5)
        with torch.autocast("cpu", enabled=False):
            return super().forward(c5.float())


def fpn_to_p7(bottom_up: Backbone, cfg: CfgNode) -> FPN:
    """An FPN by ``MODEL.FPN`` on ``bottom_up``, p2 to p7, the last two by 3x3 convolutions of stride 2 from p5.

    Sizes are divisible by the largest stride of ``bottom_up`` (32) only: those of p6 and p7 are rounded up.
    """
    width = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=width,
        norm=cfg.MODEL.FPN.NORM,
        top_block=TopLevels(width, width, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN with P6 and P7 from P5; its RetinaNet backbone takes them from res5."""
    return fpn_to_p7(build_resnet_backbone(cfg, input_shape), cfg)
