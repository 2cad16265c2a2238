"""tools/convert_checkpoint.py on files of the release, there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .test_checkpoint import STAR, released, write


@pytest.mark.parametrize("options", [(), STAR])
def test_there_and_back(
    small_cfg: Callable[..., CfgNode],
    tmp_path: Path,
    options: tuple,
    check_conversion: Callable,
    check_way_back: Callable,
) -> None:
    cfg = small_cfg(*options, "MODEL.PANOPTIC_FCN.INFERENCE.THING_THRESH", 0.0)
    write(tmp_path / "original.pth", cfg)
    converted = check_conversion(tmp_path / "original.pth", lambda: build_model(cfg))
    check_way_back(tmp_path / "original.pth", converted, "model")


def test_a_model_of_ours_gets_the_releases_names(
    small_cfg: Callable[..., CfgNode], tmp_path: Path, convert_checkpoint: Callable
) -> None:
    state = build_model(small_cfg()).state_dict()
    torch.save({"model": state, "optimizer": {}, "iteration": 3}, tmp_path / "ours.pth")
    assert convert_checkpoint([str(tmp_path / "ours.pth"), str(tmp_path / "original.pth"), "--to-original"]) == 0
    found = torch.load(tmp_path / "original.pth", weights_only=True)
    assert found.keys() == {"model"} and found["model"].keys() == released(state).keys()
