"""Small random models of the quick configs that do predict instances, and images for them."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from convmask.data.images import read_image
from convmask.engine import load_config, prepare

# Weights that were never trained give low scores: thresholds below them, and few enough results to be quick.
OPTIONS: dict[str, list[Any]] = {
    "panoptic_fpn_synthetic": [
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RPN.POST_NMS_TOPK_TEST", "40"),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.05"),
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
    ],
    "panoptic_fcn_synthetic": [
        *("MODEL.PANOPTIC_FCN.INFERENCE.THING_THRESH", "0.01", "MODEL.PANOPTIC_FCN.INFERENCE.STUFF_THRESH", "0.01"),
        *("MODEL.PANOPTIC_FCN.INFERENCE.MASK_SCORE_THRESH", "0.01", "MODEL.PANOPTIC_FCN.INFERENCE.TOP_NUM", "20"),
        *("MODEL.PANOPTIC_FCN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.01", "MODEL.PANOPTIC_FCN.KERNEL_STD", "1.0"),
        *("MODEL.PANOPTIC_FCN.SEMANTIC_FPN.CONVS_DIM", "32"),
    ],
    "fcis_synthetic": [
        *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.FCIS.GROUP_SIZE", "3", "MODEL.FCIS.MASK_SIZE", "9"),
        *("MODEL.FCIS.REDUCTION", "32", "MODEL.FCIS.RPN_CHANNELS", "32", "TEST.DETECTIONS_PER_IMAGE", "12"),
    ],
    "fcis_fpn_synthetic": [
        *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.FCIS.GROUP_SIZE", "3", "MODEL.FCIS.MASK_SIZE", "9"),
        *("MODEL.FCIS.REDUCTION", "32", "MODEL.FCIS.RPN_CHANNELS", "32", "TEST.DETECTIONS_PER_IMAGE", "12"),
    ],
    "embed_mask_synthetic": [
        *("MODEL.EMBED_MASK.INFERENCE.SCORE_THRESH", "0.005", "MODEL.EMBED_MASK.INFERENCE.PRE_NMS_TOPK", "60"),
        *("MODEL.EMBED_MASK.EMBED_DIM", "4", "TEST.DETECTIONS_PER_IMAGE", "12"),
    ],
    "knet_panoptic_synthetic": [
        *("MODEL.KNET.NUM_KERNELS", "8", "MODEL.KNET.CHANNELS", "32", "MODEL.KNET.FFN_CHANNELS", "32"),
        *("MODEL.KNET.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.05", "TEST.DETECTIONS_PER_IMAGE", "12"),
        *("MODEL.KNET.NUM_ROUNDS", "2", "MODEL.KNET.COMBINE.OVERLAP_THRESH", "0.1"),
    ],
    "knet_semantic_synthetic": [
        *("MODEL.KNET.FFN_CHANNELS", "32", "MODEL.KNET.NUM_ROUNDS", "1", "MODEL.KNET.NUM_HEADS", "4"),
    ],
}


def quick_config(name: str, *options: str) -> CfgNode:
    """A quick config with a narrow backbone, of the classes of the synthetic data."""
    narrow = ["MODEL.NARROW_RESNET.WIDTH", "8", "MODEL.FPN.OUT_CHANNELS", "32"]
    cfg = load_config(f"quick/{name}.yaml", ["MODEL.DEVICE", "cpu", *narrow, *OPTIONS[name], *options])
    prepare(cfg)
    return cfg


def random_model(name: str, *options: str, seed: int = 0) -> nn.Module:
    """A model whose predictions differ from place to place: its normalisations have the statistics of an image."""
    torch.manual_seed(seed)
    model = build_model(quick_config(name, *options)).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        pixels = torch.stack([photograph(64, 96), photograph(64, 96, 1)])
        model.backbone((pixels - model.pixel_mean) / model.pixel_std)
    model.eval()
    # heads start so small that nothing is predicted anywhere
    with torch.no_grad():
        for part, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and not part.startswith("backbone"):
                module.weight.mul_(1.0 if "knet" in name else 3.0)
    return model


def photograph(height: int, width: int, number: int = 0) -> torch.Tensor:
    """A synthetic image (3, height, width), cut or repeated, from 0 to 255."""
    from detectron2.data import DatasetCatalog

    import convmask.data  # noqa: F401

    record = DatasetCatalog.get("synthetic_panoptic_val")[number]
    pixels = torch.from_numpy(read_image(record["file_name"], "BGR").copy()).permute(2, 0, 1).float()
    repeats = -(-height // pixels.shape[1]), -(-width // pixels.shape[2])
    return pixels.repeat(1, *repeats)[:, :height, :width].contiguous()
