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
    """``small_cfg("MODEL.FCIS.ROUNDS", 1)``: the quick config, tiny, with 3 classes."""

    def make(*overrides: Any, name: str = "fcis_synthetic") -> CfgNode:
        cfg = get_cfg()
        cfg.merge_from_file(str(repository / "configs" / "quick" / f"{name}.yaml"))
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.NARROW_RESNET.WIDTH = 8
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        cfg.MODEL.FCIS.GROUP_SIZE, cfg.MODEL.FCIS.MASK_SIZE = 3, 9
        cfg.MODEL.FCIS.REDUCTION = cfg.MODEL.FCIS.RPN_CHANNELS = 16
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
        cfg.merge_from_list(list(overrides))
        return cfg

    return make


@pytest.fixture
def random_inputs() -> Callable[..., list[dict[str, Any]]]:
    """``random_inputs(objects=(2, 0))``: training input of one image for each number of objects, of two sizes."""

    def make(objects: tuple[int, ...] = (2, 3), size: tuple[int, int] = (64, 80)) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(7)
        batch = []
        for number, count in enumerate(objects):
            height, width = size[0] + 5 * number, size[1] - 7 * number
            corners = torch.rand(count, 2, generator=generator) * torch.tensor([width - 40.0, height - 40.0])
            sides = 8 + torch.rand(count, 2, generator=generator) * 30
            masks = torch.zeros(count, height, width, dtype=torch.bool)
            for mask, (x, y), (w, h) in zip(masks, corners.int().tolist(), sides.int().tolist(), strict=True):
                mask[y : y + h, x : x + w] = True
            instances = Instances((height, width), gt_boxes=BitMasks(masks).get_bounding_boxes())
            instances.gt_classes = torch.randint(0, 3, (count,), generator=generator)
            if count:
                instances.gt_masks = BitMasks(masks)
            batch.append(
                {
                    "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator),
                    "instances": instances,
                    "height": height + 6,
                    "width": width - 9,
                    "file_name": "random.png",
                }
            )
        return batch

    return make
