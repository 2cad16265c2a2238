"""A narrow model of every method, of images of 64 pixels, and Detectron2's Mask R-CNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from convmask.engine import load_config, prepare

NETWORKS = {
    "panoptic_fpn": ("panoptic_fpn", ()),
    "panoptic_fcn": ("panoptic_fcn", ()),
    "fcis": ("fcis", ()),
    "embed_mask": ("embed_mask", ()),
    "knet": ("knet_panoptic", ()),
    "knet_semantic": ("knet_semantic", ()),
    "mask_rcnn": ("panoptic_fpn", ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "INPUT.TARGETS", "('instances',)")),
}


def narrow_config(name: str, *options: str) -> CfgNode:
    """Complete; what scores low is found too."""
    quick, own = NETWORKS[name]
    narrow = ("MODEL.NARROW_RESNET.WIDTH", "8", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    cfg = load_config(f"quick/{quick}_synthetic.yaml", [*narrow, *own, *options])
    prepare(cfg)
    return cfg


def narrow_model(name: str) -> nn.Module:
    """In evaluation mode, with random weights that are always the same."""
    torch.manual_seed(0)
    return build_model(narrow_config(name)).eval()


def noise(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """A batch."""
    generator = torch.Generator().manual_seed(3)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8), "height": 50, "width": 70}
        for size in sizes
    ]


def dense_part(name: str, model: nn.Module) -> Callable[[torch.Tensor], Any]:
    """From normalised images (N, 3, H, W) to all that is computed densely: backbone, pyramid, and heads on it."""

    def two_stages(images: torch.Tensor) -> Any:
        features = model.backbone(images)
        generator = model.proposal_generator
        objectness = generator.rpn_head([features[level] for level in generator.in_features])
        if name == "fcis":
            return objectness, [model.roi_heads.head(features[level]) for level in model.roi_heads.in_features]
        return objectness, model.sem_seg_head.layers(features) if name == "panoptic_fpn" else ()

    if name == "knet_semantic":
        return lambda images: model.sem_seg_head.layers(model.backbone(images))
    return two_stages if hasattr(model, "proposal_generator") else model.predict
