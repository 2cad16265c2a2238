"""LazyConfig of the model of embed_mask_v1_R_50_1x.yaml."""

from __future__ import annotations

from detectron2.config import LazyCall as L
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicStem

from convmask.layers.resnet_fpn import TopLevels
from convmask.projects.embed_mask.fcos_head import FCOSHead
from convmask.projects.embed_mask.heads import EmbeddingHead
from convmask.projects.embed_mask.meta_arch import EmbedMask

CLASSES = 80
STRIDES = [8, 16, 32, 64, 128]
OPTIONS = "convmask.projects.embed_mask."

model = L(EmbedMask)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        top_block=L(TopLevels)(in_channels=256, out_channels=256, in_feature="p5"),
    ),
    fcos_head=L(FCOSHead)(
        in_channels=256,
        strides=STRIDES,
        num_classes=CLASSES,
        num_convs=4,
        norm="GN",
        prior_prob=0.01,
        centerness_on_boxes=True,
        normalized_distances=True,
    ),
    embedding_head=L(EmbeddingHead)(
        in_channels=256,
        strides=STRIDES,
        pixel_channels=256,
        pixel_stride=8,
        embed_dim=8,
        position_channels=True,
        margin_source="features",
        margin_per_dimension=False,
    ),
    in_features=["p3", "p4", "p5", "p6", "p7"],
    pixel_feature="p3",
    scale_factor=2,
    # by their names: LazyCall of Detectron2 0.5 takes no dataclass
    target_options=L(f"{OPTIONS}fcos_targets.TargetOptions")(
        num_classes=CLASSES, center_radius=1.5, sample_in_mask=True
    ),
    fcos_loss_options=L(f"{OPTIONS}fcos_losses.FCOSLossOptions")(box_loss="giou"),
    fcos_inference_options=L(f"{OPTIONS}fcos_inference.FCOSInferenceOptions")(
        score_threshold=0.05, pre_nms_topk=1000, nms_threshold=0.6, detections=100
    ),
    mask_loss_options=L(f"{OPTIONS}losses.MaskLossOptions")(
        proposals="best",
        box_padding=0.1,
        mask_weight=0.5,
        mask_normalizer="found",
        probability_floor=1e-9,
        smooth_weight=0.0,
        scale_factor=2,
    ),
    mask_options=L(f"{OPTIONS}inference.MaskOptions")(threshold=0.53, values="logarithm", cells="wide"),
    pixel_mean=[102.9801, 115.9465, 122.7717],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
