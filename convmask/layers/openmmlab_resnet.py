"""ResNets as OpenMMLab's programs build them, with Detectron2's parts and parameter names.

They differ from Detectron2's in what their checkpoints need: batch normalisation of frozen statistics with a trainable
affine part, a stem of three convolutions ("V1c"), a dilation that begins in the second block of a stage, and deformable
convolutions that run on the CPU too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from .deform_conv import DeformConv2d
from .frozen_statistics import FrozenStatisticsBatchNorm2d

Norm = str | Callable[[int], nn.Module]

# Blocks of res2 to res5 by depth.
_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STEM_TYPES = ("basic", "deeplab")


class DeepStem(BasicStem):
    """Three 3x3 convolutions, the first of stride 2 and the first two of half the width, and maximum pooling."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        """Builds the stem; its stride is 4."""
        super().__init__(in_channels, out_channels, norm)
        widths = (in_channels, out_channels // 2, out_channels // 2, out_channels)
        for number, (source, width) in enumerate(itertools.pairwise(widths), start=1):
            conv = Conv2d(
                source,
                width,
                kernel_size=3,
                stride=2 if number == 1 else 1,
                padding=1,
                bias=False,
                norm=get_norm(norm, width),
            )
            weight_init.c2_msra_fill(conv)
            self.add_module(f"conv{number}", conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / 4, W / 4)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class DeformableBottleneck(BottleneckBlock):
    """A bottleneck whose 3x3 convolution is deformable (arXiv 1703.06211)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        modulated: bool = False,
    ) -> None:
        """Builds the block; ``modulated``: deformable convolution v2."""
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
        )
        self.conv2 = DeformConv2d(
            bottleneck_channels,
            bottleneck_channels,
            3,
            stride=1 if stride_in_1x1 else stride,
            padding=dilation,
            dilation=dilation,
            bias=False,
            modulated=modulated,
            norm=get_norm(norm, bottleneck_channels),
        )


@BACKBONE_REGISTRY.register()
def build_openmmlab_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet of bottlenecks by ``MODEL.RESNETS``.

    ``NORM`` may also be "FrozenStatisticsBN". ``STEM_TYPE`` "deeplab" is the stem of three convolutions.
    ``RES4_DILATION`` and ``RES5_DILATION`` above 1 keep the stride of their stage at 1; the first block of such a stage
    has half its dilation. ``DEFORM_ON_PER_STAGE`` and ``DEFORM_MODULATED`` are Detectron2's.

    Raises:
        ValueError: a key has a value that there is no such ResNet for; the message names it.
    """
    node = cfg.MODEL.RESNETS
    if node.DEPTH not in _BLOCKS:
        raise ValueError(f"MODEL.RESNETS.DEPTH is {node.DEPTH}, not one of {sorted(_BLOCKS)}")
    if node.STEM_TYPE not in STEM_TYPES:
        raise ValueError(f"MODEL.RESNETS.STEM_TYPE is {node.STEM_TYPE!r}, not one of {', '.join(STEM_TYPES)}")
    if node.DEFORM_NUM_GROUPS != 1 or node.NUM_GROUPS != 1:
        raise ValueError("build_openmmlab_resnet_backbone: NUM_GROUPS and DEFORM_NUM_GROUPS of MODEL.RESNETS must be 1")
    norm: Norm = FrozenStatisticsBatchNorm2d if node.NORM == "FrozenStatisticsBN" else node.NORM
    build_stem = DeepStem if node.STEM_TYPE == "deeplab" else BasicStem
    stem = build_stem(input_shape.channels, node.STEM_OUT_CHANNELS, norm)
    stages, in_channels = [], node.STEM_OUT_CHANNELS
    dilations = (1, 1, node.RES4_DILATION, node.RES5_DILATION)
    for level, (blocks, dilation) in enumerate(zip(_BLOCKS[node.DEPTH], dilations, strict=True)):
        out_channels = node.RES2_OUT_CHANNELS * 2**level
        stride = 1 if level == 0 or dilation > 1 else 2
        options: dict[str, Any] = {"block_class": BottleneckBlock}
        if node.DEFORM_ON_PER_STAGE[level]:
            options = {"block_class": DeformableBottleneck, "modulated": node.DEFORM_MODULATED}
        stages.append(
            ResNet.make_stage(
                num_blocks=blocks,
                stride_per_block=[stride] + [1] * (blocks - 1),
                dilation_per_block=[max(dilation // 2, 1)] + [dilation] * (blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                bottleneck_channels=node.WIDTH_PER_GROUP * 2**level,
                norm=norm,
                stride_in_1x1=node.STRIDE_IN_1X1,
                **options,
            )
        )
        in_channels = out_channels
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_openmmlab_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same with an FPN by ``MODEL.FPN`` that has a level for each of its inputs, p2 to p5, and none above."""
    return FPN(
        bottom_up=build_openmmlab_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
