"""OpenMMLab's ResNets: statistics stay, affine parts learn, dilations and deformable blocks are in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from convmask.config import get_cfg
from convmask.layers import DeformConv2d, FrozenStatisticsBatchNorm2d


def narrow(*options: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.BACKBONE.NAME", "build_openmmlab_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.STRIDE_IN_1X1", False),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.DEVICE", "cpu", *options),
        ]
    )
    return cfg


def test_frozen_statistics() -> None:
    norm = FrozenStatisticsBatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([1.0, 2, 3]))
    norm.running_var.copy_(torch.tensor([4.0, 1, 9]))
    x = torch.randn(2, 3, 4, 4)
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(norm.state_dict())
    expected = plain.eval()(x)
    found = norm.train()(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert norm.weight.grad is not None and norm.bias.grad is not None
    assert norm.running_mean.tolist() == [1, 2, 3] and norm.num_batches_tracked == 0


def test_frozen_stages_and_trained_ones() -> None:
    backbone = build_backbone(narrow("MODEL.RESNETS.NORM", "FrozenStatisticsBN", "MODEL.BACKBONE.FREEZE_AT", 2))
    assert isinstance(backbone.stem.conv1.norm, FrozenBatchNorm2d)
    assert isinstance(backbone.res2[0].conv1.norm, FrozenBatchNorm2d)
    assert isinstance(backbone.res3[0].conv1.norm, FrozenStatisticsBatchNorm2d)
    trained = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}


def test_dilation_begins_in_the_second_block() -> None:
    options = ["MODEL.RESNETS.RES4_DILATION", 2, "MODEL.RESNETS.RES5_DILATION", 4, "MODEL.RESNETS.STEM_TYPE", "deeplab"]
    backbone = build_backbone(narrow("MODEL.RESNETS.NORM", "BN", *options)).eval()
    dilations = [[block.conv2.dilation[0] for block in stage] for stage in backbone.stages]
    assert dilations == [[1] * 3, [1] * 4, [1] + [2] * 5, [2] + [4] * 2]
    with torch.no_grad():
        outputs = backbone(torch.randn(1, 3, 64, 96))
    for name, x in outputs.items():
        shape = backbone.output_shape()[name]
        assert x.shape[1:] == (shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 8, 8]


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_blocks_start_as_plain_ones(modulated: bool) -> None:
    options = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True], "MODEL.RESNETS.NORM", "BN"]
    backbone = build_backbone(narrow("MODEL.RESNETS.DEFORM_MODULATED", modulated, *options)).eval()
    assert isinstance(backbone.res2[0].conv2, Conv2d)
    deformable = backbone.res3[0].conv2
    assert isinstance(deformable, DeformConv2d) and deformable.modulated == modulated
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        found = deformable(x)
        plain = nn.functional.conv2d(x, deformable.weight, stride=2, padding=1)
        outputs = backbone(torch.randn(1, 3, 64, 64))
    # the modulation starts at one half
    torch.testing.assert_close(found, deformable.norm(plain / 2 if modulated else plain), rtol=1e-4, atol=1e-5)
    assert outputs["res5"].shape == (1, 128, 2, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.DEPTH", 18),
        ("MODEL.RESNETS.STEM_TYPE", "wide"),
        ("MODEL.RESNETS.NUM_GROUPS", 32),
    ],
)
def test_what_cannot_be_built(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key.rsplit(".", 1)[-1]):
        build_backbone(narrow(key, value))
