"""tools/convert_checkpoint.py on files of both releases, there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from .test_checkpoint import release_of_values, small


@pytest.mark.parametrize(
    "name",
    [
        "knet_instance_R_50_3x",
        pytest.param("knet_panoptic_R_101_dcn_3x", marks=pytest.mark.slow),
        "knet_panoptic_swin_l_3x",
        pytest.param("knet_semantic_pspnet_R_50_80k", marks=pytest.mark.slow),
        pytest.param("knet_semantic_deeplabv3_R_50_80k", marks=pytest.mark.slow),
        pytest.param("knet_semantic_upernet_swin_t_80k", marks=pytest.mark.slow),
    ],
)
def test_there_and_back(
    repository: Path, tmp_path: Path, name: str, check_conversion: Callable, check_way_back: Callable
) -> None:
    cfg = small(repository, name)
    torch.manual_seed(0)
    state = release_of_values(build_model(cfg), "semantic" in name, "swin" in name)
    torch.save({"meta": {}, "state_dict": state, "optimizer": {}}, tmp_path / "release.pth")
    converted = check_conversion(tmp_path / "release.pth", lambda: build_model(cfg))
    check_way_back(tmp_path / "release.pth", converted, "state_dict")
