"""``demo/quick_demo.py``: training with few iterations, and an image of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

Script = Callable[[str], ModuleType]


def _run(script: Script, options: list[str], output: Path) -> None:
    del options[options.index("OUTPUT_DIR") :][:2]
    script("quick_demo").main(["--output", str(output), "--max-iter", "1", "--opts", *options])


def test_it_trains_draws_and_prints_the_result(
    script: Script, tiny_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    for _ in range(2):  # a second run starts over in the same folder
        _run(script, tiny_options, output)
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if re.fullmatch(r"PQ \d+\.\d", line)]) == 1
        assert any("mask AP" in line for line in lines)
        assert any("training time" in line for line in lines)
        (output / "left_over.txt").touch()
    pictures = sorted(path.name for path in (output / "pictures").iterdir())
    assert pictures == ["0000.png", "0001.png", "0002.png", "0003.png", "contact_sheet.png"]
    assert (output / "model_final.pth").is_file() and (output / "config.yaml").is_file()


def test_a_folder_of_something_else_is_not_deleted(
    script: Script, tiny_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    (tmp_path / "thesis" / "config.yaml").touch()  # as the folder of any training has
    with pytest.raises(SystemExit):
        _run(script, tiny_options, tmp_path / "thesis")
    assert "thesis" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_an_image_with_weights_of_ones_own(
    script: Script, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(photo)
    output = tmp_path / "pictures"
    # The config is the one beside the weights.
    weights = ["--weights", str(model_folder / "model_final.pth"), "--output", str(output)]
    script("quick_demo").main(["--image", str(photo), *weights])
    assert str(output / "photo.png") in capsys.readouterr().out
    assert Image.open(output / "photo.png").size == (480, 400)


def test_a_prediction_never_overwrites_its_image(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(photo)
    with pytest.raises(SystemExit):
        script("quick_demo").main(["--image", str(photo), "--output", str(tmp_path)])
    assert "would overwrite the image" in capsys.readouterr().err


def test_an_unreadable_image_is_an_error(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script("quick_demo").main(["--image", str(tmp_path / "none.png")])
    assert stop.value.code == 1
    assert "none.png" in capsys.readouterr().err


def test_without_a_network_the_way_out_is_told(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = script("quick_demo")

    def no_network(cfg: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(demo, "Predictor", no_network)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    (tmp_path / "model_final.pth").touch()
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(photo)
    with pytest.raises(SystemExit):
        demo.main(["--image", str(photo)])
    message = capsys.readouterr().err
    assert "cannot download detectron2://COCO-PanopticSegmentation" in message
    assert f"WEIGHTS={tmp_path / 'model_final.pth'}" in message
    assert "CONFIG=" in message
