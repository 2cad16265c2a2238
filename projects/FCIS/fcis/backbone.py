"""ResNets whose last stages have dilation in the place of strides, and the release's stem."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn
from torch.nn import functional as F

from .convention import convention_named

NUM_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
OUTPUT_STRIDES = (4, 8, 16, 32)
FIXED_STATISTICS = "FixedStatsBN"

Norm = str | Callable[[int], nn.Module]


class FixedStatsBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the stored statistics, in training too; weight and bias are trained.

    That is what the release's ``use_global_stats`` does. Detectron2's ``FrozenBN`` keeps weight and bias as well.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class CaffeStem(BasicStem):
    """Detectron2's stem with the release's pooling: windows begin at the corner, without padding, and may end outside.

    Maps are shifted by half a cell against Detectron2's, so that the weights of the releases need it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, C, ceil(H / 4), ceil(W / 4)), up to one cell."""
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=0, ceil_mode=True)


class DilatedBasicBlock(BasicBlock):
    """A basic block (ResNet-18's) with dilation."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN", dilation: int = 1
    ) -> None:
        """As Detectron2's ``BasicBlock``.

        Args:
            in_channels: of the input.
            out_channels: of the output.
            stride: of the first convolution.
            norm: of the convolutions.
            dilation: of both 3x3 convolutions.
        """
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        for layer in (self.conv1, self.conv2):
            layer.dilation = layer.padding = (dilation, dilation)


def _strides_and_dilations(output_stride: int) -> list[tuple[int, int]]:
    """(first stride, dilation) of res2 to res5. Once the stride is reached, each further stage doubles the dilation."""
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"MODEL.FCIS.OUTPUT_STRIDE is {output_stride}, not one of {OUTPUT_STRIDES}")
    stages, stride, dilation = [(1, 1)], 4, 1
    for _ in range(3):
        if stride < output_stride:
            stride *= 2
            stages.append((2, dilation))
        else:
            dilation *= 2
            stages.append((1, dilation))
    return stages


def _norm_of(name: str) -> Norm:
    return FixedStatsBatchNorm2d if name == FIXED_STATISTICS else name


def _resnet(cfg: CfgNode, input_shape: ShapeSpec, output_stride: int) -> ResNet:
    node = cfg.MODEL.RESNETS
    if node.DEPTH not in NUM_BLOCKS:
        raise ValueError(f"MODEL.RESNETS.DEPTH is {node.DEPTH}, not one of {sorted(NUM_BLOCKS)}")
    norm, convention = _norm_of(node.NORM), convention_named(cfg.MODEL.FCIS.CONVENTION)
    stem = CaffeStem(input_shape.channels, node.STEM_OUT_CHANNELS, norm)
    if stem.conv1.norm is not None and hasattr(stem.conv1.norm, "eps"):
        stem.conv1.norm.eps = convention.stem_epsilon
    stages, channels = [], node.STEM_OUT_CHANNELS
    for index, (stride, dilation) in enumerate(_strides_and_dilations(output_stride)):
        blocks = NUM_BLOCKS[node.DEPTH][index]
        out_channels = node.RES2_OUT_CHANNELS * 2**index
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                num_blocks=blocks,
                stride_per_block=[stride] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                bottleneck_channels=node.NUM_GROUPS * node.WIDTH_PER_GROUP * 2**index,
                num_groups=node.NUM_GROUPS,
                norm=norm,
                stride_in_1x1=node.STRIDE_IN_1X1,
                dilation=dilation,
            )
        )
        channels = out_channels
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def _narrow_resnet(cfg: CfgNode, input_shape: ShapeSpec, output_stride: int) -> ResNet:
    width, norm = cfg.MODEL.NARROW_RESNET.WIDTH, cfg.MODEL.NARROW_RESNET.NORM
    stem = CaffeStem(input_shape.channels, width, norm)
    stages, channels = [], width
    for index, (stride, dilation) in enumerate(_strides_and_dilations(output_stride)):
        out_channels = width * 2**index
        stages.append(
            ResNet.make_stage(
                DilatedBasicBlock,
                num_blocks=2,
                stride_per_block=[stride, 1],
                in_channels=channels,
                out_channels=out_channels,
                norm=norm,
                dilation=dilation,
            )
        )
        channels = out_channels
    return ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES)


def _fpn(bottom_up: ResNet, cfg: CfgNode) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_fcis_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet-50, 101 or 152 of the release: its stem, and ``MODEL.FCIS.OUTPUT_STRIDE`` by dilation.

    Otherwise by ``MODEL.RESNETS``, whose NORM may also be "FixedStatsBN" (:class:`FixedStatsBatchNorm2d`).
    """
    return _resnet(cfg, input_shape, cfg.MODEL.FCIS.OUTPUT_STRIDE)


@BACKBONE_REGISTRY.register()
def build_fcis_narrow_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """The narrow ResNet-18 of the quick configs (``MODEL.NARROW_RESNET``), ``MODEL.FCIS.OUTPUT_STRIDE`` by dilation."""
    return _narrow_resnet(cfg, input_shape, cfg.MODEL.FCIS.OUTPUT_STRIDE)


@BACKBONE_REGISTRY.register()
def build_fcis_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet with the release's stem, without dilation, and an FPN by ``MODEL.FPN``: p2 to p6."""
    return _fpn(_resnet(cfg, input_shape, 32), cfg)


@BACKBONE_REGISTRY.register()
def build_fcis_narrow_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The narrow ResNet without dilation, and an FPN by ``MODEL.FPN``: p2 to p6."""
    return _fpn(_narrow_resnet(cfg, input_shape, 32), cfg)
