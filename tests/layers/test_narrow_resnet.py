from __future__ import annotations

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone

from convmask.config import get_cfg


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_narrow_resnet_fpn_backbone"
    cfg.MODEL.NARROW_RESNET.WIDTH = 8
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    return cfg


def test_levels_have_the_strides_of_a_resnet_fpn(cfg):
    backbone = build_backbone(cfg)
    features = backbone(torch.zeros(2, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in features.items()} == {
        "p2": (2, 16, 16, 24),
        "p3": (2, 16, 8, 12),
        "p4": (2, 16, 4, 6),
        "p5": (2, 16, 2, 3),
        "p6": (2, 16, 1, 2),
    }
    assert backbone.size_divisibility == 32


def test_width_64_is_resnet_18(cfg):
    cfg.MODEL.NARROW_RESNET.WIDTH = 64
    ours = build_backbone(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    detectron2 = build_backbone(cfg)
    shapes = {k: v.shape for k, v in detectron2.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes


def test_everything_learns(cfg):
    backbone = build_backbone(cfg)
    assert all(p.requires_grad for p in backbone.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
