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
def random_inputs(draw_inputs: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    """``random_inputs(objects=(2, 0))``: training input of one image for each number of objects."""
    return partial(draw_inputs, sides=(12, 26))
