"""``demo/demo.py`` on a folder with a broken image, on a video, and its json files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from panopticapi.utils import rgb2id
from PIL import Image
from pycocotools import mask as mask_util

from convmask.demo import CocoResults, VideoReader, VideoWriter, demo_config
from convmask.engine import ConfigError

Script = Callable[[str], ModuleType]


def _image(path: Path, size: tuple[int, int] = (48, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def _model(folder: Path) -> list[str]:
    return ["--config-file", str(folder / "config.yaml"), "--weights", str(folder / "model_final.pth")]


def test_broken_and_missing_inputs_are_skipped_and_told(
    script: Script, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    _image(photos / "good.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    output = tmp_path / "results"
    arguments = [*_model(model_folder), "--input", str(photos), str(tmp_path / "nothing*.png"), "--output", str(output)]
    code = script("demo").main([*arguments, "--json", "--confidence-threshold", "0"])
    shown = capsys.readouterr()
    assert code == 1
    assert "broken.jpg" in shown.err and "nothing*.png" in shown.err
    assert "1 predicted, 2 skipped" in shown.out
    assert Image.open(output / "good.png").size == (400, 480)

    (image,) = json.loads((output / "images.json").read_text())
    assert image == {"id": 1, "file_name": str(photos / "good.png"), "height": 48, "width": 40}
    panoptic = json.loads((output / "panoptic.json").read_text())
    ids = rgb2id(np.asarray(Image.open(output / "panoptic" / "good.png")))
    (annotation,) = panoptic["annotations"]
    assert {segment["id"] for segment in annotation["segments_info"]} == set(np.unique(ids).tolist()) - {0}
    categories = {category["id"] for category in panoptic["categories"]}
    assert {segment["category_id"] for segment in annotation["segments_info"]} <= categories
    # The data set's ids, which have a gap: things 1 to 5, stuff 11 to 14.
    assert categories == {1, 2, 3, 4, 5, 11, 12, 13, 14}


def test_all_good_is_exit_code_zero(script: Script, model_folder: Path, tmp_path: Path) -> None:
    _image(tmp_path / "a" / "same.png")
    _image(tmp_path / "b" / "same.png")
    output = tmp_path / "results"
    inputs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert script("demo").main([*_model(model_folder), "--input", *inputs, "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["same.png", "same_2.png"]


def test_a_video_becomes_a_video(script: Script, model_folder: Path, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for _ in range(3):
            writer.write(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    output = tmp_path / "results"
    arguments = ["--input", str(tmp_path / "clip.mp4"), "--output", str(output)]
    assert script("demo").main([*_model(model_folder), *arguments]) == 0
    with VideoReader(output / "clip.mp4") as reader:
        assert (reader.count, reader.fps) == (3, 10)
        assert next(iter(reader)).shape == (48, 64, 3)


def test_no_input_is_an_error(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script("demo").main(["--config-file", "any.yaml", "--input", str(tmp_path / "none.png")])
    assert stop.value.code == 1
    assert "none.png" in capsys.readouterr().err


def test_a_file_as_output_is_an_error(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("demo").main(["--config-file", "any.yaml", "--input", "a.png", "--output", "result.jpg"])
    assert "--output result.jpg: give a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "output"), [("photos/a.png", "photos"), ("results/panoptic/a.png", "results"), ("clip.mp4", ".")]
)
def test_a_result_never_overwrites_an_input(
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    output: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(source).parent.mkdir(parents=True, exist_ok=True)
    Path(source).touch()
    with pytest.raises(SystemExit):
        script("demo").main(["--config-file", "any.yaml", "--input", str(tmp_path / source), "--output", output])
    assert f"would overwrite the input {tmp_path / source}" in capsys.readouterr().err


def test_a_config_without_weights_is_an_error(repository: Path) -> None:
    for name in ("quick/panoptic_fpn_synthetic.yaml", "PanopticFPN/panoptic_fpn_R_50_1x.yaml"):
        with pytest.raises(ConfigError, match="names no weights"):
            demo_config(name)
    with pytest.raises(ConfigError, match=r"threshold is 1\.5"):
        demo_config("quick/panoptic_fpn_synthetic.yaml", "any.pth", 1.5)


def test_a_zoo_name_brings_its_weights_and_classes() -> None:
    cfg = demo_config("COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml", confidence_threshold=0.3)
    assert cfg.MODEL.WEIGHTS.endswith("model_final_c10459.pkl")
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.3
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (80, 54)


def test_a_data_set_of_which_nothing_is_known_leaves_the_counts_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("MODEL:\n  ROI_HEADS:\n    NUM_CLASSES: 3\nDATASETS:\n  TRAIN: ('mine',)\n  TEST: ('mine_too',)\n")
    cfg = demo_config(str(path), "any.pth")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert cfg.DATASETS.TEST == ()


def test_results_of_objects_are_in_coco_format(tmp_path: Path) -> None:
    metadata = Metadata(thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id={17: 0, 18: 1})
    instances = Instances((10, 12))
    instances.pred_boxes = Boxes(torch.tensor([[2.0, 1.0, 5.0, 4.0], [0.0, 0.0, 1.0, 1.0]]))
    instances.pred_masks = torch.zeros(2, 10, 12, dtype=torch.bool)
    instances.pred_masks[0, 1:4, 2:5] = True
    instances.pred_classes = torch.tensor([1, 0])
    instances.scores = torch.tensor([0.75, 0.2])
    results = CocoResults(tmp_path, metadata, threshold=0.5)
    results.add(Path("a.png"), "a", (10, 12), {"instances": instances})
    assert sorted(path.name for path in results.write()) == ["images.json", "instances.json"]
    (dog,) = json.loads((tmp_path / "instances.json").read_text())
    assert (dog["image_id"], dog["category_id"], dog["bbox"]) == (1, 18, [2.0, 1.0, 3.0, 3.0])
    assert dog["score"] == pytest.approx(0.75)
    assert mask_util.area(dog["segmentation"]) == 9
