"""LazyConfig of the model of fcis_R_50_coco_ohem.yaml. Options that are left out are those of the release."""

from __future__ import annotations

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher

from convmask.projects.fcis.anchors import FCISAnchorGenerator
from convmask.projects.fcis.backbone import CaffeStem, FixedStatsBatchNorm2d
from convmask.projects.fcis.heads import PositionSensitiveHead
from convmask.projects.fcis.meta_arch import FCIS
from convmask.projects.fcis.roi_heads import FCISROIHeads
from convmask.projects.fcis.rpn import FCISRPN, FCISRPNHead

CLASSES = 80
OPTIONS = "convmask.projects.fcis."


def stages() -> list[object]:
    """res2 to res5 of ResNet-50; res5 has dilation in the place of its stride."""
    result = []
    for index, (blocks, stride, dilation) in enumerate(((3, 1, 1), (4, 2, 1), (6, 2, 1), (3, 1, 2))):
        result.append(
            L(ResNet.make_stage)(
                block_class=BottleneckBlock,
                num_blocks=blocks,
                stride_per_block=[stride] + [1] * (blocks - 1),
                in_channels=64 if index == 0 else 128 * 2**index,
                out_channels=256 * 2**index,
                bottleneck_channels=64 * 2**index,
                norm=FixedStatsBatchNorm2d,
                stride_in_1x1=True,
                dilation=dilation,
            )
        )
    return result


_proposal_generator = L(FCISRPN)(
    in_features=["res4"],
    head=L(FCISRPNHead)(in_channels=1024, channels=512, num_anchors=12),
    anchor_generator=L(FCISAnchorGenerator)(sizes=[[64, 128, 256, 512]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[16]),
    anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    batch_size_per_image=256,
    positive_fraction=0.5,
    # in training, in tests
    pre_nms_topk=(6000, 6000),
    post_nms_topk=(300, 300),
    nms_thresh=0.7,
    min_box_size=2,
    anchor_boundary_thresh=0,
    smooth_l1_beta=0.1111111111111111,
)

_roi_heads = L(FCISROIHeads)(
    head=L(PositionSensitiveHead)(
        in_channels=2048, num_classes=CLASSES, channels=1024, lr_factor=3.0, group_size=7, mask_size=21
    ),
    in_features=["res5"],
    strides=[16],
    num_classes=CLASSES,
    # all RoIs, of which hard example mining takes 128
    batch_size_per_image=-1,
    positive_fraction=0.25,
    proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
    # by their names: LazyCall of Detectron2 0.5 takes no dataclass
    sampling_options=L(f"{OPTIONS}targets.SamplingOptions")(number=-1, mask_size=21),
    loss_options=L(f"{OPTIONS}losses.LossOptions")(mask_weight=10.0, hard_rois=128, normalizer=128),
    inference_options=L(f"{OPTIONS}inference.InferenceOptions")(
        rounds=2, score_threshold=0.001, nms_threshold=0.3, max_detections=100, voting=True
    ),
)

model = L(FCIS)(
    backbone=L(ResNet)(
        stem=L(CaffeStem)(in_channels=3, out_channels=64, norm=FixedStatsBatchNorm2d),
        stages=stages(),
        out_features=["res4", "res5"],
        freeze_at=2,
    ),
    proposal_generator=_proposal_generator,
    roi_heads=_roi_heads,
    pixel_mean=[103.06, 115.90, 123.15],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
