"""A narrow ResNet-FPN that learns from scratch on a laptop: the backbone of the quick configs."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

from .resnet_fpn import fpn_to_p7


def _narrow_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    width, norm = cfg.MODEL.NARROW_RESNET.WIDTH, cfg.MODEL.NARROW_RESNET.NORM
    stages, channels = [], width
    for level in range(4):
        out_channels = width * 2**level
        first_stride = 1 if level == 0 else 2
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks=2,
                stride_per_block=[first_stride, 1],
                in_channels=channels,
                out_channels=out_channels,
                norm=norm,
            )
        )
        channels = out_channels
    stem = BasicStem(in_channels=input_shape.channels, out_channels=width, norm=norm)
    return ResNet(stem, stages, out_features=cfg.MODEL.FPN.IN_FEATURES)


@BACKBONE_REGISTRY.register()
def build_narrow_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """The ResNet of :func:`build_narrow_resnet_fpn_backbone` alone; it gives the stages ``MODEL.FPN.IN_FEATURES``."""
    return _narrow_resnet(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_narrow_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet of basic blocks (two a stage: ResNet-18's plan) of width ``MODEL.NARROW_RESNET.WIDTH``, with an FPN.

    Stages res2 to res5 have 1, 2, 4 and 8 times the width, at strides 4 to 32; nothing is frozen. The FPN follows
    ``MODEL.FPN`` and gives p2 to p6, as Detectron2's ``build_resnet_fpn_backbone`` does.
    """
    return FPN(
        bottom_up=_narrow_resnet(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_narrow_resnet_fpn_p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same narrow ResNet with the FPN p2 to p7 of :func:`fpn_to_p7`."""
    return fpn_to_p7(_narrow_resnet(cfg, input_shape), cfg)
