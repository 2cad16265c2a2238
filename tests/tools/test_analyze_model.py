from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/analyze_model.py")


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
