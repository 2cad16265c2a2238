"""LazyConfig of the model of panoptic_fcn_R_50_1x.yaml. Options that are left out are those of the release."""

from __future__ import annotations

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicStem

from convmask.layers import SemanticFPN
from convmask.layers.resnet_fpn import TopLevels
from convmask.projects.panoptic_fcn.heads import FeatureEncoder, KernelHead, PositionHead
from convmask.projects.panoptic_fcn.meta_arch import PanopticFCN

THINGS, STUFF = 80, 53
OPTIONS = "convmask.projects.panoptic_fcn."

_backbone = L(FPN)(
    bottom_up=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
        out_features=["res2", "res3", "res4", "res5"],
        freeze_at=2,
    ),
    in_features=["res2", "res3", "res4", "res5"],
    out_channels=256,
    top_block=L(TopLevels)(in_channels=256, out_channels=256, in_feature="p5"),
)

model = L(PanopticFCN)(
    backbone=_backbone,
    semantic_fpn=L(SemanticFPN)(
        input_shape=L("builtins.dict")(
            p2=L(ShapeSpec)(channels=256, stride=4),
            p3=L(ShapeSpec)(channels=256, stride=8),
            p4=L(ShapeSpec)(channels=256, stride=16),
            p5=L(ShapeSpec)(channels=256, stride=32),
        ),
        conv_dims=256,
        common_stride=4,
        norm="GN",
    ),
    position_head=L(PositionHead)(
        in_channels=256,
        num_classes=THINGS,
        # stuff and one region "things"
        num_regions=STUFF + 1,
        bias_value=-2.19,
        width=256,
        num_convs=3,
        norm="GN",
        deform=True,
        coordinates=False,
    ),
    kernel_head=L(KernelHead)(
        in_channels=256, width=256, num_convs=3, norm="GN", deform=False, coordinates=True, kernel_std=0.01
    ),
    feature_encoder=L(FeatureEncoder)(in_channels=256, width=64, num_convs=3, norm="", deform=False, coordinates=True),
    in_features=["p3", "p4", "p5", "p6", "p7"],
    # by their names: LazyCall of Detectron2 0.5 takes no dataclass
    target_options=L(f"{OPTIONS}targets.TargetOptions")(num_classes=THINGS, num_regions=STUFF + 1),
    loss_options=L(f"{OPTIONS}losses.LossOptions")(segment_weight=3.0, num_kernels=7, kernel_average="map"),
    inference_options=L(f"{OPTIONS}inference.InferenceOptions")(
        thing_threshold=0.05, stuff_threshold=0.05, top_num=100, similar_threshold=0.9
    ),
    kernel_std=0.01,
    combine_overlap_threshold=0.5,
    combine_stuff_area_limit=4096,
    combine_score_threshold=0.2,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
