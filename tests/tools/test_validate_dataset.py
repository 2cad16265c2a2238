from __future__ import annotations

import json

import pytest
from PIL import Image


@pytest.fixture
def main(load_script):
    return load_script("tools/validate_dataset.py").main


@pytest.fixture
def arguments(tmp_path):
    content = {
        "categories": [{"id": 1, "name": "cell", "isthing": 1}],
        "images": [{"id": 1, "file_name": "[bold]a.png", "height": 2, "width": 3}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 2], "area": 6, "file_name": "a.png",
             "segments_info": [{"id": 1, "category_id": 1, "bbox": [0, 0, 3, 2], "area": 6, "iscrowd": 0}]}
        ],
    }  # fmt: skip
    (tmp_path / "set.json").write_text(json.dumps(content))
    Image.new("RGB", (3, 2), (1, 0, 0)).save(tmp_path / "[bold]a.png")
    Image.new("RGB", (3, 2), (1, 0, 0)).save(tmp_path / "a.png")
    return {
        "panoptic": ["--image-root", str(tmp_path), "--panoptic-json", str(tmp_path / "set.json"),
                     "--panoptic-root", str(tmp_path)],
        "instances": ["--image-root", str(tmp_path), "--instances-json", str(tmp_path / "set.json")],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
def test_files_without_and_with_problems(main, arguments, kind, tmp_path, capsys):
    assert main(arguments[kind]) == 0
    assert "No problems found." in capsys.readouterr().out
    (tmp_path / "[bold]a.png").write_bytes(b"x")
    assert main([*arguments[kind], "--quick"]) == 0
    capsys.readouterr()
    assert main(arguments[kind]) == 1
    out = capsys.readouterr().out
    for text in (str(tmp_path / "set.json"), "[bold]a.png (id 1)", "file_name", "cannot be read", "1 problem"):
        assert text in out


def test_registered_names_and_modules(main, tmp_path, monkeypatch, capsys):
    assert main(["synthetic_panoptic_val", "--quick"]) == 0
    assert main(["p3_nobody"]) == 1
    assert "is not registered" in capsys.readouterr().out
    (tmp_path / "p3_module.py").write_text(
        "from convmask.data.panoptic import register_panoptic\n"
        "register_panoptic('p3_from_module', 'a', 'b.json', 'c')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["p3_from_module", "--import", "p3_module"]) == 1
    assert "does not exist" in capsys.readouterr().out


def test_max_problems(main, arguments, tmp_path, capsys):
    (tmp_path / "[bold]a.png").unlink()
    (tmp_path / "a.png").unlink()
    assert main(arguments["panoptic"]) == 1
    assert "2 problems" in capsys.readouterr().out
    assert main([*arguments["panoptic"], "--max-problems", "1"]) == 1
    assert "1 problem (stopped there)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--image-root", "x"],
        ["name", "--instances-json", "x"],
        ["--panoptic-json", "x", "--panoptic-root", "y"],
        ["--image-root", "x", "--panoptic-json", "y"],
        ["name", "--max-problems", "0"],
    ],
)
def test_wrong_arguments(main, wrong):
    with pytest.raises(SystemExit) as error:
        main(wrong)
    assert error.value.code == 2
