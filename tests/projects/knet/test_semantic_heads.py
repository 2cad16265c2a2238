"""Semantic heads, and K-Net around them, ours and Detectron2's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model
from torch import nn
from torch.nn import functional as F

from convmask.config import get_cfg
from convmask.projects.knet.segmentation_heads import (
    ASPPHead,
    FCNHead,
    PSPHead,
    SegmentationHead,
    UPerHead,
    cross_entropy,
)
from convmask.projects.knet.semantic_head import KNetSemSegHead

MakeCfg = Callable[..., CfgNode]
SHAPES = {f"res{level}": ShapeSpec(channels=8 * level, stride=2**level) for level in range(2, 6)}


def features(height: int = 64, width: int = 96, images: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn(images, shape.channels, -(-height // shape.stride), -(-width // shape.stride))
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("kind", [FCNHead, PSPHead, ASPPHead, UPerHead])
def test_shapes_losses_and_gradients(kind: type[SegmentationHead]) -> None:
    names = SHAPES if kind is UPerHead else ["res4"]
    head = kind({name: SHAPES[name] for name in names}, num_classes=5, channels=12, norm="BN")
    targets = torch.randint(0, 5, (2, 64, 96))
    _, losses = head.train()(features(), targets)
    losses["loss_sem_seg"].backward()
    assert all(p.grad is not None for p in head.parameters())
    logits, empty = head.eval()(features())
    assert logits.shape == (2, 5, 64, 96) and empty == {}
    # sizes that were rounded up, and one image
    assert head.layers(features(50, 70, images=1)).shape[:2] == (1, 5)
    with pytest.raises(ValueError, match="needs targets"):
        head.train()(features())


def test_no_input() -> None:
    with pytest.raises(ValueError, match="IN_FEATURES"):
        PSPHead({}, num_classes=5)


def test_fcn_by_hand() -> None:
    head = FCNHead({"res4": SHAPES["res4"]}, num_classes=5, channels=12, norm="").eval()
    x = features()["res4"]
    y = x
    for conv in head.convs:
        y = F.relu(F.conv2d(y, conv.weight, conv.bias, padding=1))
    y = F.relu(F.conv2d(torch.cat([x, y], 1), head.conv_cat.weight, head.conv_cat.bias, padding=1))
    torch.testing.assert_close(head.encode({"res4": x}), y)


def test_aspp_by_hand() -> None:
    head = ASPPHead({"res4": SHAPES["res4"]}, num_classes=5, channels=12, norm="", dilations=(1, 3)).eval()
    x = features()["res4"]
    pooled = F.relu(F.conv2d(x.mean(dim=(2, 3), keepdim=True), head.image_pool.weight, head.image_pool.bias))
    one, three = head.aspp_modules
    parts = [
        pooled.expand(-1, -1, *x.shape[2:]),
        F.relu(F.conv2d(x, one.weight, one.bias)),
        F.relu(F.conv2d(x, three.weight, three.bias, padding=3, dilation=3)),
    ]
    expected = F.relu(F.conv2d(torch.cat(parts, 1), head.bottleneck.weight, head.bottleneck.bias, padding=1))
    torch.testing.assert_close(head.encode({"res4": x}), expected)


def test_uper_by_hand() -> None:
    """The top-down path, level by level."""
    head = UPerHead(SHAPES, num_classes=5, channels=12, norm="").eval()
    maps = list(features().values())

    def conv(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2))

    def resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    pooled = [
        resize(conv(layer, F.adaptive_avg_pool2d(maps[3], scale)), maps[3])
        for layer, scale in zip(head.psp_modules, (1, 2, 3, 6), strict=True)
    ]
    p5 = conv(head.bottleneck, torch.cat([maps[3], *pooled], 1))
    p4 = conv(head.lateral_convs[2], maps[2]) + resize(p5, maps[2])
    p3 = conv(head.lateral_convs[1], maps[1]) + resize(p4, maps[1])
    p2 = conv(head.lateral_convs[0], maps[0]) + resize(p3, maps[0])
    levels = [conv(layer, x) for layer, x in zip(head.fpn_convs, (p2, p3, p4), strict=True)]
    joined = torch.cat([levels[0], *(resize(x, p2) for x in (*levels[1:], p5))], 1)
    torch.testing.assert_close(head.encode(features()), conv(head.fpn_bottleneck, joined))


def test_cross_entropy_counts_ignored_pixels_in_the_mean() -> None:
    logits, targets = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    targets[0, :2] = 255
    mean = F.cross_entropy(logits[..., 2:, :], targets[:, 2:])
    torch.testing.assert_close(cross_entropy(logits, targets, 255), mean / 2)


def test_dropout_is_before_the_predictor_only(small_cfg: MakeCfg) -> None:
    """The rounds get the features as they are."""
    cfg = small_cfg("semantic", "MODEL.KNET.SEMANTIC.DROPOUT", 0.9, "MODEL.KNET.SEMANTIC.HEAD", "FCNHead")
    head = build_model(cfg).sem_seg_head
    shapes = {name: torch.randn(2, 8 * 2**level, 8, 8) for level, name in enumerate(("res2", "res3", "res4", "res5"))}
    head.head.eval()
    head.head.predictor.train()
    taken, _ = head.predict(shapes)
    torch.testing.assert_close(taken, head.head.encode(shapes))


def detectron2_cfg(head: str) -> CfgNode:
    """K-Net around one of Detectron2's heads, in Detectron2's own meta-architecture."""
    pytest.importorskip("detectron2.projects.deeplab")
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
            *("MODEL.BACKBONE.NAME", "build_narrow_resnet_fpn_backbone", "MODEL.NARROW_RESNET.WIDTH", 8),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.SEM_SEG_HEAD.NAME", "KNetSemSegHead", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5),
            *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.NORM", "BN"),
            *("MODEL.KNET.SEMANTIC.HEAD", head, "MODEL.KNET.SEMANTIC.AUX_IN_FEATURE", "p3"),
            *("MODEL.KNET.SEMANTIC.AUX_CHANNELS", 16, "MODEL.KNET.FFN_CHANNELS", 32),
        ]
    )
    if head != "SemSegFPNHead":
        cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p2", "p4"] if "Plus" in head else ["p4"]
        cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 4 if "Plus" in head else 16
        cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES = ["p2"]
        cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = [16]
        cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 32
        cfg.INPUT.CROP.ENABLED = True
        cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = "absolute", [64, 64]
    return cfg


@pytest.mark.parametrize("head", ["SemSegFPNHead", "DeepLabV3Head", "DeepLabV3PlusHead"])
def test_around_heads_of_detectron2(head: str) -> None:
    torch.manual_seed(0)
    model = build_model(detectron2_cfg(head))
    assert isinstance(model.sem_seg_head, KNetSemSegHead)
    assert type(model.sem_seg_head.head) is SEM_SEG_HEADS_REGISTRY.get(head)
    size = (64, 64)
    inputs: list[dict[str, Any]] = [
        {
            "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8),
            "sem_seg": torch.randint(0, 5, size),
            "height": 50,
            "width": 70,
        }
        for _ in range(2)
    ]
    losses = model.train()(inputs)
    assert losses.keys() == {*(f"decode.loss_ce.s{number}" for number in range(4)), "aux.loss_ce"}
    sum(losses.values()).backward()
    assert model.sem_seg_head.head.predictor.weight.grad is not None
    with torch.no_grad():
        results = model.eval()([{**image} for image in inputs])
    assert [result["sem_seg"].shape for result in results] == [(5, 50, 70)] * 2


def test_a_head_without_a_predictor() -> None:
    with pytest.raises(ValueError, match="Identity has no 1x1 convolution"):
        KNetSemSegHead(SHAPES, head=nn.Identity(), rounds=[])
    head = FCNHead({"res4": SHAPES["res4"]}, num_classes=5, channels=12, norm="")
    head.predictor = nn.Conv2d(12, 5, 3)
    with pytest.raises(ValueError, match="1x1 convolution"):
        KNetSemSegHead(SHAPES, head=head, rounds=[])


def test_an_auxiliary_input_that_is_not_there(small_cfg: MakeCfg) -> None:
    with pytest.raises(ValueError, match="AUX_IN_FEATURE is 'res9'"):
        build_model(small_cfg("semantic", "MODEL.KNET.SEMANTIC.AUX_IN_FEATURE", "res9"))
