"""LazyConfig of the model of panoptic_fpn_R_50_1x.yaml."""

from __future__ import annotations

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)

from convmask.projects.panoptic_fpn import ConvMaskPanopticFPN, PanopticFPNSemSegHead

THINGS, STUFF = 80, 53
_LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}

_backbone = L(FPN)(
    bottom_up=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
        out_features=["res2", "res3", "res4", "res5"],
        freeze_at=2,
    ),
    in_features=["res2", "res3", "res4", "res5"],
    out_channels=256,
    top_block=L(LastLevelMaxPool)(),
)

_proposal_generator = L(RPN)(
    in_features=[*_LEVELS, "p6"],
    head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[32], [64], [128], [256], [512]],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[*_LEVELS.values(), 64],
        offset=0.0,
    ),
    anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    batch_size_per_image=256,
    positive_fraction=0.5,
    # in training, in tests
    pre_nms_topk=(2000, 1000),
    post_nms_topk=(1000, 1000),
    nms_thresh=0.7,
)

_roi_heads = L(StandardROIHeads)(
    num_classes=THINGS,
    batch_size_per_image=512,
    positive_fraction=0.25,
    proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
    box_in_features=list(_LEVELS),
    box_pooler=L(ROIPooler)(
        output_size=7, scales=[1 / s for s in _LEVELS.values()], sampling_ratio=0, pooler_type="ROIAlignV2"
    ),
    box_head=L(FastRCNNConvFCHead)(
        input_shape=L(ShapeSpec)(channels=256, height=7, width=7), conv_dims=[], fc_dims=[1024, 1024]
    ),
    box_predictor=L(FastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels=1024),
        num_classes=THINGS,
        box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
        test_score_thresh=0.05,
        test_nms_thresh=0.5,
        test_topk_per_image=100,
        loss_weight={"loss_box_reg": 1.0},
    ),
    mask_in_features=list(_LEVELS),
    mask_pooler=L(ROIPooler)(
        output_size=14, scales=[1 / s for s in _LEVELS.values()], sampling_ratio=0, pooler_type="ROIAlignV2"
    ),
    mask_head=L(MaskRCNNConvUpsampleHead)(
        input_shape=L(ShapeSpec)(channels=256, height=14, width=14), num_classes=THINGS, conv_dims=[256] * 5
    ),
)

model = L(ConvMaskPanopticFPN)(
    backbone=_backbone,
    proposal_generator=_proposal_generator,
    roi_heads=_roi_heads,
    sem_seg_head=L(PanopticFPNSemSegHead)(
        input_shape=L("builtins.dict")(
            **{name: L(ShapeSpec)(channels=256, stride=stride) for name, stride in _LEVELS.items()}
        ),
        # the label 0 is "things"
        num_classes=1 + STUFF,
        loss_weight=0.5,
        conv_dims=128,
        common_stride=4,
        norm="GN",
    ),
    combine_overlap_threshold=0.5,
    combine_stuff_area_limit=4096,
    combine_score_threshold=0.5,
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
