from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from PIL import Image

import convmask.data  # noqa: F401
from convmask.data.categories import PanopticCategories
from convmask.data.images import read_panoptic_map
from convmask.data.panoptic import register_panoptic_records
from convmask.inference import panoptic_segmentation

DATASET = "three_synthetic_images"


@pytest.fixture(scope="module")
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/merge_panoptic.py")


@pytest.fixture
def categories() -> Iterator[PanopticCategories]:
    source = "synthetic_panoptic_val"
    found = MetadataCatalog.get(source).categories
    register_panoptic_records(DATASET, found, lambda: DatasetCatalog.get(source)[:3])
    yield found
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


def encoded(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def random_predictions(record: dict[str, Any], categories: PanopticCategories) -> tuple[Instances, torch.Tensor]:
    size = (record["height"], record["width"])
    instances = Instances(size)
    instances.pred_masks = torch.zeros(6, *size, dtype=torch.bool)
    for mask in instances.pred_masks:
        y, x = (int(torch.randint(0, side // 2, ())) for side in size)
        mask[y : y + size[0] // 3, x : x + size[1] // 3] = True
    instances.scores = torch.rand(6)
    instances.pred_classes = torch.randint(0, categories.num_things, (6,))
    coarse = torch.randn(1, categories.num_stuff + 1, 6, 6)
    return instances, torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0]


def results_of(record: dict[str, Any], instances: Instances, categories: PanopticCategories) -> list[dict[str, Any]]:
    return [
        {
            "image_id": record["image_id"],
            "category_id": categories.category_id(int(label), True),
            "score": score.item(),
            "segmentation": encoded(mask.numpy()),
        }
        for mask, score, label in zip(instances.pred_masks, instances.scores, instances.pred_classes, strict=True)
    ]


def read_result(folder: Path) -> dict[Any, tuple[np.ndarray, list[dict[str, Any]]]]:
    annotations = json.loads((folder / "panoptic_predictions.json").read_text())["annotations"]
    return {
        a["image_id"]: (
            read_panoptic_map(str(folder / "panoptic_predictions" / a["file_name"])),
            a["segments_info"],
        )
        for a in annotations
    }


@pytest.mark.parametrize("form", ["json", "separated", "all"])
def test_equals_the_models_merge(tool: ModuleType, categories: PanopticCategories, tmp_path: Path, form: str) -> None:
    torch.manual_seed(3)
    results, semantic, expected = [], [], {}
    ids_of_label = {0: -1, **{index: identity for identity, index in categories.stuff_ids.items()}}
    (tmp_path / "png").mkdir()
    for record in DatasetCatalog.get(DATASET):
        instances, sem_seg = random_predictions(record, categories)
        results += results_of(record, instances, categories)
        labels = sem_seg.argmax(0).numpy()
        semantic += [
            {
                "file_name": record["file_name"],
                "category_id": ids_of_label[label],
                "segmentation": encoded(labels == label),
            }
            for label in np.unique(labels).tolist()
        ]
        table = np.array([categories.thing_labels("all")[0], *categories.stuff_labels("all")])
        stem = Path(record["file_name"]).stem
        picture = table[labels] if form == "all" else labels
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "png" / f"{stem}.png")
        options = {"overlap_threshold": 0.4, "stuff_area_limit": 300, "score_threshold": 0.2}
        expected[record["image_id"]] = panoptic_segmentation(instances, sem_seg, **options)
    (tmp_path / "instances.json").write_text(json.dumps(results))
    (tmp_path / "semantic.json").write_text(json.dumps(semantic))
    arguments = [
        "--dataset",
        DATASET,
        "--instances",
        str(tmp_path / "instances.json"),
        "--output",
        str(tmp_path / "out"),
    ]
    arguments += ["--overlap-threshold", "0.4", "--stuff-area-limit", "300", "--score-threshold", "0.2"]
    if form == "json":
        arguments += ["--semantic", str(tmp_path / "semantic.json")]
    else:
        arguments += ["--semantic", str(tmp_path / "png"), "--layout", form]
    assert tool.main(arguments) == 0
    found = read_result(tmp_path / "out")
    assert found.keys() == expected.keys()
    for image_id, (ids, segments) in expected.items():
        np.testing.assert_array_equal(found[image_id][0], ids.numpy())
        wanted = [
            {"id": s["id"], "category_id": categories.category_id(s["category_id"], s["isthing"])} for s in segments
        ]
        assert found[image_id][1] == wanted
        assert {s["isthing"] for s in segments} == {True, False}


def test_the_ground_truth_has_full_quality(
    tool: ModuleType, categories: PanopticCategories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, semantic = [], []
    for record in DatasetCatalog.get(DATASET):
        ids = read_panoptic_map(record["pan_seg_file_name"])
        for segment in record["segments_info"]:
            if segment["iscrowd"]:
                continue
            entry = {
                "image_id": record["image_id"],
                "category_id": categories.category_id(segment["category_id"], segment["isthing"]),
                "segmentation": encoded(ids == segment["id"]),
                "score": 0.9,
            }
            (results if segment["isthing"] else semantic).append(entry)
    (tmp_path / "instances.json").write_text(json.dumps(results))
    (tmp_path / "semantic.json").write_text(json.dumps(semantic))
    arguments = ["--dataset", DATASET, "--instances", str(tmp_path / "instances.json"), "--evaluate"]
    arguments += ["--semantic", str(tmp_path / "semantic.json"), "--output", str(tmp_path / "out")]
    assert tool.main([*arguments, "--stuff-area-limit", "1"]) == 0
    assert "PQ 100.00 (things 100.00, stuff 100.00)" in capsys.readouterr().out


def test_images_of_one_name_are_told_apart_by_their_folder(tool: ModuleType) -> None:
    records = {1: {"file_name": "x/a.png"}, 2: {"file_name": "y/a.png"}, 3: {"file_name": "y/b.png"}}
    assert tool._images_by_name(records) == {"x/a.png": 1, "y/a.png": 2, "y/b.png": 3, "b": 3}


INSTANCE = '{"image_id": %s, "category_id": %s, "score": %s, "segmentation": %s}'


@pytest.mark.parametrize(
    ("instances", "semantic", "message"),
    [
        ("{", "[]", "instances.json: cannot be read"),
        ("{}", "[]", "instances.json: holds a dict"),
        ('[{"image_id": 1}]', "[]", "instances.json: entry 0 has no category_id"),
        (
            '[{"image_id": "none", "category_id": 1, "score": 1, "segmentation": {}}]',
            "[]",
            "instances.json: entry 0 names the image 'none'",
        ),
        (f"[{INSTANCE % ('[]', 1, 1, '{}')}]", "[]", "instances.json: entry 0 names the image []"),
        (f"[{INSTANCE % (1, '{}', 1, '{}')}]", "[]", "entry 0 has the category {}"),
        (f"[{INSTANCE % (1, 1, 'NaN', '{}')}]", "[]", "entry 0 has the score nan"),
        (f"[{INSTANCE % (1, 1, '[1]', '{}')}]", "[]", "entry 0 has the score [1]"),
        (f"[{INSTANCE % (1, 1, 1, '[[1, 2]]')}]", "[]", "image 1: a segmentation is no RLE: [[1, 2]]"),
        (f"[{INSTANCE % (1, 1, 1, '{}')}]", "[]", "image 1: a segmentation: RLE size is None"),
        ("[]", '[{"image_id": {}, "category_id": 1, "segmentation": {}}]', "names the image {}"),
        ("[]", '[{"image_id": 1, "category_id": [], "segmentation": {}}]', "entry 0 has the category []"),
        ("[]", '[{"file_name": "none.png", "category_id": 1, "segmentation": {}}]', "names the image 'none.png'"),
        ("[]", "[]", "semantic.json: no semantic prediction for image"),
    ],
)
def test_broken_files_are_named(
    tool: ModuleType,
    categories: PanopticCategories,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    instances: str,
    semantic: str,
    message: str,
) -> None:
    (tmp_path / "instances.json").write_text(instances)
    (tmp_path / "semantic.json").write_text(semantic)
    arguments = ["--dataset", DATASET, "--instances", str(tmp_path / "instances.json")]
    assert tool.main([*arguments, "--semantic", str(tmp_path / "semantic.json"), "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "panoptic_predictions.json").exists()
