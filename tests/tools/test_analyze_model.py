from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from convmask.config import get_cfg


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("analyze_model", repository / "tools" / "analyze_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TwoLayers(nn.Module):
    """Takes and gives Detectron2's list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def inference(self, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return self(inputs)

    def forward(self, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return self.head(self.conv(inputs[0]["image"][None].float()))


def test_counts_of_two_convolutions(tool: ModuleType) -> None:
    counts = tool.count(TwoLayers(), torch.zeros(3, 20, 30), tool.TASKS)
    cells = 10 * 15
    assert counts["params"] == {"": 224 + 18, "conv": 224, "conv.weight": 216, "conv.bias": 8} | {
        "head": 18,
        "head.weight": 16,
        "head.bias": 2,
    }
    assert counts["flops"] == {"": cells * (216 + 16), "conv": cells * 216, "head": cells * 16}
    assert counts["activations"] == {"": cells * 10, "conv": cells * 8, "head": cells * 2}


def test_a_config_from_the_command_line(
    tool: ModuleType, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repository / "configs" / "quick" / "panoptic_fpn_synthetic.yaml")
    file = tmp_path / "counts.json"
    arguments = ["--config-file", config, "--size", "64", "96", "--depth", "1", "--json", str(file)]
    assert tool.main([*arguments, "TEST.DETECTIONS_PER_IMAGE", "7"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["size"] == [64, 96]
    assert content["counts"].keys() == {"params", "flops", "activations"}
    for module in ("backbone", "proposal_generator", "roi_heads", "sem_seg_head"):
        assert f"| {module} " in printed
        assert all(counts[module] > 0 for counts in content["counts"].values())
    parts = sum(content["counts"]["flops"][m] for m in ("backbone", "proposal_generator", "roi_heads", "sem_seg_head"))
    assert parts == content["counts"]["flops"][""]
    # every region that the config allows goes through the mask head
    mask_pixels = 7 * 28 * 28
    classes = content["counts"]["params"]["roi_heads.mask_head.predictor.bias"]
    assert content["counts"]["activations"]["roi_heads.mask_head.predictor"] == mask_pixels * classes


def test_a_missing_config_is_one_line(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--config-file", "none.yaml"])
    assert stopped.value.code == 1
    assert "no config file 'none.yaml'" in capsys.readouterr().err


def test_images_that_are_not_resized_have_the_usual_size(tool: ModuleType) -> None:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 320, 640
    assert tool.image_size(cfg) == (320, 640)
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert tool.image_size(cfg) == (800, 1333)
