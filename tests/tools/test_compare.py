from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from convmask.comparison.records import MethodFolder, Settings
from convmask.engine import ConfigError, find_config


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/compare.py")


def test_every_method_has_a_config_for_both_data_sets(tool: ModuleType) -> None:
    for method in tool.METHODS.values():
        for data in ("synthetic", "nuclei"):
            find_config(f"quick/{method.configs.get(data, method.configs['*'])}_{data}.yaml")


def test_methods_without_their_project_are_left_out(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool.projects, "available", lambda: ["panoptic_fpn", "knet"])
    assert tool.available(list(tool.METHODS)) == ["panoptic_fpn", "knet", "mask_rcnn"]
    assert "FCIS is left out" in capsys.readouterr().out


def test_nothing_to_write(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        tool.main(["--step", "write", "--output", str(tmp_path)])
    assert "no method has been trained" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        tool.main(["--step", "measure", "--methods", "knet", "--output", str(tmp_path)])
    assert "K-Net has not been trained" in capsys.readouterr().err


def test_a_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    folder = MethodFolder(tmp_path, "knet")
    settings = Settings("nuclei", 60.0, "wall")
    assert folder.training_of(settings) is None
    folder.write("training", {"settings": settings.as_json(), "iterations": 3})
    assert folder.training_of(settings)["iterations"] == 3
    with pytest.raises(ConfigError, match="other settings"):
        folder.training_of(Settings("nuclei", 90.0, "wall"))
    with pytest.raises(ConfigError, match="other settings"):
        folder.training_of(Settings("nuclei", 60.0, "wall", ("SOLVER.BASE_LR", "0.1")))
    (folder.path / "training.json").write_text("{")
    with pytest.raises(ConfigError, match="no record"):
        folder.read("training")


@pytest.mark.slow
def test_two_methods_from_training_to_page(tool: ModuleType, tmp_path: Path) -> None:
    arguments = ["--budget", "3s", "--methods", "panoptic_fpn", "mask_rcnn", "--output", str(tmp_path / "runs")]
    assert tool.main([*arguments, "--page", str(tmp_path / "page")]) == 0
    record = json.loads((tmp_path / "runs" / "mask_rcnn" / "training.json").read_text())
    assert record["iterations"] >= 1 and record["results"]["segm"]["AP"] >= 0
    text = (tmp_path / "page" / "comparison.md").read_text()
    assert "Panoptic FPN" in text and "Mask R-CNN" in text and "GFLOPs" in text
    assert (tmp_path / "page" / "images" / "comparison.jpg").stat().st_size > 10_000
    # what is done is not done again
    before = (tmp_path / "runs" / "mask_rcnn" / "model_final.pth").stat().st_mtime_ns
    assert tool.main([*arguments, "--page", str(tmp_path / "page")]) == 0
    assert (tmp_path / "runs" / "mask_rcnn" / "model_final.pth").stat().st_mtime_ns == before
