"""A small model and random input for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode

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
def random_inputs(draw_inputs: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    """``random_inputs(objects=(2, 0))``: training input of one image for each number of objects."""
    return partial(draw_inputs, semantic_classes=4)
