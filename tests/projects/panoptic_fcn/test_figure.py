"""``projects/PanopticFCN/figure.py`` with a model that is not trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    path = repository / "projects" / "PanopticFCN" / "figure.py"
    spec = importlib.util.spec_from_file_location("panoptic_fcn_figure", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("from_file", [True, False])
def test_draws_six_pictures(
    script: ModuleType, small_cfg: Callable[..., CfgNode], tmp_path: Path, from_file: bool
) -> None:
    cfg = small_cfg("MODEL.PANOPTIC_FCN.STUFF.NUM_CLASSES", 5)
    torch.manual_seed(0)
    model = build_model(cfg)
    # centres and regions that vary
    for head in (model.position_head.centers, model.position_head.regions):
        torch.nn.init.normal_(head.weight, std=0.3)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    options = ["--config-file", str(tmp_path / "config.yaml"), "--weights", str(tmp_path / "model.pth")]
    if from_file:
        pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        options += ["--input", str(tmp_path / "image.png")]
    script.main([*options, "--size", "120", "--output", str(tmp_path / "figure.png")])
    figure = np.asarray(Image.open(tmp_path / "figure.png"))
    if from_file:
        # three columns of 120 pixels and two rows of 72
        assert 360 < figure.shape[1] < 440
        assert 144 < figure.shape[0] < 260
    assert figure.std() > 20


def test_other_architectures_are_named(
    script: ModuleType, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = repository / "configs" / "quick" / "panoptic_fpn_synthetic.yaml"
    with pytest.raises(SystemExit):
        script.main(["--config-file", str(config), "--weights", "none.pth", "--output", str(tmp_path / "x.png")])
    assert "META_ARCHITECTURE is" in capsys.readouterr().err
