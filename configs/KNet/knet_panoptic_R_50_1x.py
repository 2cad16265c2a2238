"""LazyConfig of the model of knet_panoptic_R_50_1x.yaml. Options that are left out are those of the release."""

from __future__ import annotations

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicStem

from convmask.layers.frozen_statistics import FrozenStatisticsBatchNorm2d
from convmask.projects.knet.kernel_head import KernelHead
from convmask.projects.knet.meta_arch import KNet
from convmask.projects.knet.update_head import build_round

THINGS, STUFF = 80, 53
OPTIONS = "convmask.projects.knet."

model = L(KNet)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm=FrozenStatisticsBatchNorm2d),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm=FrozenStatisticsBatchNorm2d),
            out_features=["res2", "res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=256,
    ),
    kernel_head=L(KernelHead)(
        input_shape=L("builtins.dict")(
            p2=L(ShapeSpec)(channels=256, stride=4),
            p3=L(ShapeSpec)(channels=256, stride=8),
            p4=L(ShapeSpec)(channels=256, stride=16),
            p5=L(ShapeSpec)(channels=256, stride=32),
        ),
        num_kernels=100,
        num_thing_classes=THINGS,
        num_stuff_classes=STUFF,
        channels=256,
        common_stride=8,
    ),
    rounds=[
        L(build_round)(
            prior=0.01, channels=256, num_classes=THINGS + STUFF, num_heads=8, ffn_channels=2048, assembly="hard"
        )
        for _ in range(3)
    ],
    mask_stride=4,
    # by their names: LazyCall of Detectron2 0.5 takes no dataclass
    cost_options=L(f"{OPTIONS}assignment.CostOptions")(class_weight=2.0, mask_weight=1.0, dice_weight=4.0),
    loss_options=L(f"{OPTIONS}losses.LossOptions")(
        class_weight=2.0, mask_weight=1.0, dice_weight=4.0, rank_weight=0.1, seg_weight=1.0
    ),
    inference_options=L(f"{OPTIONS}inference.InferenceOptions")(
        top_num=100, things_threshold=0.3, overlap_threshold=0.6
    ),
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    input_format="RGB",
)
