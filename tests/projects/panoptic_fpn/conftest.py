"""A small model and random input for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances

from convmask.config import get_cfg


@pytest.fixture
def small_cfg(repository: Path) -> Callable[..., CfgNode]:
    """``small_cfg("MODEL.PANOPTIC_FPN.TASK", "semantic")``: the quick config with 5 thing and 3 stuff classes."""

    def make(*overrides: Any) -> CfgNode:
        cfg = get_cfg()
        cfg.merge_from_file(str(repository / "configs" / "quick" / "panoptic_fpn_synthetic.yaml"))
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
        cfg.merge_from_list(list(overrides))
        return cfg

    return make


@pytest.fixture
def random_inputs() -> Callable[..., list[dict[str, Any]]]:
    """``random_inputs(objects=(2, 0))``: training input of one image for each number of objects."""

    def make(
        objects: tuple[int, ...] = (2, 3), labels: int = 4, size: tuple[int, int] = (64, 80)
    ) -> list[dict[str, Any]]:
        torch.manual_seed(7)
        height, width = size
        batch = []
        for count in objects:
            corners = torch.rand(count, 2) * torch.tensor([width - 30.0, height - 30.0])
            boxes = torch.cat([corners, corners + 10 + torch.rand(count, 2) * 20], dim=1)
            masks = torch.zeros(count, height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            instances = Instances(size, gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
            instances.gt_classes = torch.randint(0, 5, (count,))
            batch.append(
                {
                    "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8),
                    "instances": instances,
                    "sem_seg": torch.randint(0, labels, size),
                    "height": height + 6,
                    "width": width - 9,
                    "file_name": "random.png",
                }
            )
        return batch

    return make
