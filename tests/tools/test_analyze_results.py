from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from convmask.analysis import AnalysedDataset
from convmask.data.panoptic import register_panoptic
from convmask.evaluation.panoptic_dump import PanopticDump

from .own_data import write_own_data


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/analyze_results.py")


def write_run(folder: Path, name: str, blind: int = -1) -> Path:
    """The ground truth as predictions; nothing but stuff in the image ``blind``."""
    dataset = AnalysedDataset(name)
    inference = folder / "inference"
    dump = PanopticDump(str(inference), dataset.panoptic.records)
    dump.start(remove_json=True)
    detections: list[dict[str, Any]] = []
    annotations = []
    for index, image_id in enumerate(dataset.panoptic.records):
        for region in dataset.true_objects(image_id) if index != blind else []:
            entry = {"image_id": image_id, "category_id": region.category_id, "score": 0.9}
            detections.append({**entry, "segmentation": dict(region.code)})
        image = dataset.panoptic.image(image_id)
        ids = dataset.panoptic.categories.ids
        segments = [
            {"id": int(identity), "category_id": ids[category]}
            for identity, category in zip(image.ids, image.categories, strict=True)
        ]
        annotations.append(dump.write_image(image_id, image.runs.decode(), segments))
    dump.write_json(annotations)
    (inference / "coco_instances_results.json").write_text(json.dumps(detections))
    return folder


def test_one_run_and_two(tool: ModuleType, few_images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after, before = (write_run(tmp_path / name, few_images, blind) for name, blind in (("after", -1), ("before", 1)))
    common = ["--dataset", few_images, "--output", str(tmp_path / "report"), "--pictures", "1"]
    assert tool.main([str(after), *common]) == 0
    printed = capsys.readouterr().out
    for title in (
        "panoptic: totals",
        "panoptic: by class",
        "instances (masks): by size",
        "instances (masks): what became of each class",
    ):
        assert title in printed
    assert "100.0" in printed
    content = json.loads((tmp_path / "report" / "results.json").read_text())
    assert content["runs"]["after"]["instances"]["totals"]["AP"] == pytest.approx(100)
    assert len(list((tmp_path / "report" / "pictures").iterdir())) == 2
    assert tool.main([str(after / "inference"), "--baseline", str(before), *common]) == 0
    printed = capsys.readouterr().out
    assert "instances (masks): 1 of 4 images got better, 0 worse" in printed
    assert "panoptic: 0 of 4 images got better, 0 worse" in printed


def test_the_config_of_a_run_registers_its_datasets(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_own_data(tmp_path / "data", images=3)
    files = [str(tmp_path / "data" / name) for name in ("images", "panoptic.json", "panoptic")]
    names = ["of_the_test", "of_the_config"]
    config = tmp_path / "config.yaml"
    content = {"REGISTER": [[names[1], "panoptic", *files]], "TEST": [names[1]]}
    config.write_text(json.dumps({"DATASETS": content}))
    register_panoptic(names[0], *files)
    try:
        run = write_run(tmp_path / "run", names[0])
        common = [str(run), "--config-file", str(config), "--output", str(tmp_path / "report"), "--pictures", "0"]
        assert tool.main(common) == 0
        assert json.loads((tmp_path / "report" / "results.json").read_text())["dataset"] == names[1]
        assert tool.main([*common, "--dataset", names[0]]) == 0
        assert json.loads((tmp_path / "report" / "results.json").read_text())["dataset"] == names[0]
    finally:
        for name in set(names) & set(DatasetCatalog.list()):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    config.write_text("DATASETS: {TEST: []}")
    for given, code, message in ((common, 1, "DATASETS.TEST is empty"), ([str(run), "--output", "o"], 2, "--dataset")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            tool.main(given)
        assert ended.value.code == code and message in capsys.readouterr().err


def test_errors_are_one_line(tool: ModuleType, few_images: str, tmp_path: Path, capsys: Any) -> None:
    common = ["--output", str(tmp_path / "report"), "--dataset"]
    for name, message in ((few_images, "holds neither"), ("none", "no dataset named 'none'")):
        with pytest.raises(SystemExit) as ended:
            tool.main([str(tmp_path), *common, name])
        error = capsys.readouterr().err
        assert ended.value.code == 1 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "report").exists()
    with pytest.raises(SystemExit) as ended:
        tool.main([str(tmp_path), *common, few_images, "--quantiles", "0"])
    assert ended.value.code == 2 and "--quantiles is 0" in capsys.readouterr().err
