"""A small model and random input for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Instances

from convmask.config import get_cfg


@pytest.fixture
def small_cfg(repository: Path) -> Callable[..., CfgNode]:
    """``small_cfg("MODEL.PANOPTIC_FCN.NUM_KERNELS", 5)``: the quick config, tiny, 5 thing and 4 region classes."""

    def make(*overrides: Any) -> CfgNode:
        cfg = get_cfg()
        cfg.merge_from_file(str(repository / "configs" / "quick" / "panoptic_fcn_synthetic.yaml"))
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.NARROW_RESNET.WIDTH = 8
        cfg.MODEL.FPN.OUT_CHANNELS = 32
        node = cfg.MODEL.PANOPTIC_FCN
        node.NUM_CLASSES, node.STUFF.NUM_CLASSES = 5, 4
        # all five levels of the release
        cfg.MODEL.BACKBONE.NAME = "build_narrow_resnet_fpn_p7_backbone"
        node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
        node.TARGETS.SCALES = ((1, 32), (24, 64), (48, 96), (80, 128), (112, 2048))
        for head in (node.SEMANTIC_FPN, node.POSITION_HEAD, node.KERNEL_HEAD):
            # group normalisation refuses single values: two channels a group on P7 of one cell
            head.CONVS_DIM = 64
        node.FEATURE_ENCODER.CONVS_DIM = 16
        cfg.merge_from_list(list(overrides))
        return cfg

    return make


@pytest.fixture
def random_inputs() -> Callable[..., list[dict[str, Any]]]:
    """``random_inputs(objects=(2, 0))``: training input of one image for each number of objects."""

    def make(objects: tuple[int, ...] = (2, 3), size: tuple[int, int] = (64, 80)) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(7)
        height, width = size
        batch = []
        for count in objects:
            corners = torch.rand(count, 2, generator=generator) * torch.tensor([width - 40.0, height - 40.0])
            sides = 8 + torch.rand(count, 2, generator=generator) * 30
            masks = torch.zeros(count, height, width, dtype=torch.bool)
            for mask, (x, y), (w, h) in zip(masks, corners.int().tolist(), sides.int().tolist(), strict=True):
                mask[y : y + h, x : x + w] = True
            instances = Instances(size, gt_masks=BitMasks(masks), gt_boxes=BitMasks(masks).get_bounding_boxes())
            instances.gt_classes = torch.randint(0, 5, (count,), generator=generator)
            sem_seg = torch.randint(0, 4, (4, 5), generator=generator)
            sem_seg = sem_seg.repeat_interleave(height // 4, 0).repeat_interleave(width // 5, 1)
            sem_seg[:5] = 255
            batch.append(
                {
                    "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator),
                    "instances": instances,
                    "sem_seg": sem_seg,
                    "height": height + 6,
                    "width": width - 9,
                    "file_name": "random.png",
                }
            )
        return batch

    return make
