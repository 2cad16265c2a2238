from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/visualize_data.py")


def test_pictures_are_written(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "synthetic_panoptic_hard_train", "--output", str(tmp_path / "a"), "--num-images", "3"]
    assert tool.main([*arguments, "INPUT.MIN_SIZE_TRAIN", "(0,)"]) == 0
    written = sorted((tmp_path / "a").iterdir())
    assert [path.name for path in written] == ["000000.png", "000001.png", "000002.png"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.width > 2 * picture.height
            assert np.asarray(picture).std() > 10
    assert "3 pictures in" in capsys.readouterr().out


def test_options_decide_what_is_drawn(tool: ModuleType, tmp_path: Path) -> None:
    arguments = ["--dataset", "synthetic_panoptic_val", "--num-images", "1", "--shuffle"]
    widths = []
    for targets in ("('instances','sem_seg')", "('sem_seg',)", "()"):
        folder = tmp_path / str(len(widths))
        layout = ["INPUT.SEMANTIC_LAYOUT", "all", "INPUT.TARGETS", targets]
        assert tool.main([*arguments, "--output", str(folder), *layout]) == 0
        (path,) = folder.iterdir()
        with Image.open(path) as picture:
            widths.append(picture.width)
    assert widths[0] > widths[1] > widths[2]


def test_semantic_colors_follow_the_layout(tool: ModuleType) -> None:
    metadata = MetadataCatalog.get("synthetic_panoptic_val")
    separated, together = (tool.semantic_colors(metadata, layout) for layout in ("separated", "all"))
    assert separated[:5].tolist() == metadata.stuff_colors
    assert together[:9].tolist() == metadata.thing_colors + metadata.stuff_colors[1:]
    assert separated[255].tolist() == [0, 0, 0]


def test_a_set_of_ones_own_with_boxes_alone(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    box = {"bbox": [5, 5, 20, 20], "bbox_mode": 1, "category_id": 0}
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 1, "height": 40, "width": 60, "annotations": [box]}
    (tmp_path / "own_boxes.py").write_text(
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        f"DatasetCatalog.register('own_boxes', lambda: [{record!r}])\n"
        "MetadataCatalog.get('own_boxes').thing_classes = ['cat']\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = [
        "--import",
        str(tmp_path / "own_boxes.py"),
        "--dataset",
        "own_boxes",
        "--output",
        str(tmp_path / "out"),
    ]
    assert tool.main([*arguments, "INPUT.MIN_SIZE_TRAIN", "(0,)"]) == 0
    with Image.open(tmp_path / "out" / "000000.png") as picture:
        assert np.asarray(picture).std() > 10
    assert tool.main(["--import", "own_absent", *arguments[2:]]) == 1
    assert "error: no module 'own_absent'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "synthetic_panoptic_vall"], "did you mean synthetic_panoptic_val"),
        ([], "no dataset"),
        (["--dataset", "synthetic_panoptic_val", "--num-images", "0"], "--num-images is 0"),
        (["--config-file", "absent.yaml"], "absent.yaml"),
    ],
)
def test_errors_are_one_line(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_help(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    assert "--num-images" in capsys.readouterr().out
