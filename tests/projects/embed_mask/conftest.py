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
    """``small_cfg("MODEL.EMBED_MASK.EMBED_DIM", 5)``: the quick config, tiny, 5 classes."""

    def make(*overrides: Any) -> CfgNode:
        cfg = get_cfg()
        cfg.merge_from_file(str(repository / "configs" / "quick" / "embed_mask_synthetic.yaml"))
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.NARROW_RESNET.WIDTH", 8, "MODEL.FPN.OUT_CHANNELS", 32])
        cfg.merge_from_list(["MODEL.EMBED_MASK.NUM_CLASSES", 5, "MODEL.EMBED_MASK.FCOS.NORM", "BN"])
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
            sides = 12 + torch.rand(count, 2, generator=generator) * 26
            masks = torch.zeros(count, height, width, dtype=torch.bool)
            for mask, (x, y), (w, h) in zip(masks, corners.int().tolist(), sides.int().tolist(), strict=True):
                mask[y : y + h, x : x + w] = True
            instances = Instances(size, gt_masks=BitMasks(masks), gt_boxes=BitMasks(masks).get_bounding_boxes())
            instances.gt_classes = torch.randint(0, 5, (count,), generator=generator)
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
