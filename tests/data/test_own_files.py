"""Datasets that a config registers, the split by image, and the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog

from convmask.config import get_cfg
from convmask.data.categories import PanopticCategories
from convmask.data.config_datasets import register_datasets_of
from convmask.data.errors import DatasetError
from convmask.data.splitting import split_by_image
from convmask.data.summary import summarise
from convmask.engine import load_config, prepare


def content(images: int) -> dict[str, Any]:
    return {
        "categories": [{"id": 4, "name": "thing"}],
        "images": [{"id": 10 * i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(images)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 10 * (i // 2),
                "category_id": 4,
                "bbox": [1, 2, 20, 5],
                "segmentation": [[1, 2, 21, 2, 21, 7]],
                "iscrowd": 0,
            }
            for i in range(2 * images)
        ],
    }


def test_a_config_registers_its_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content(3)))
    (tmp_path / "config.yaml").write_text(
        f"DATASETS:\n  REGISTER:\n  - [registered_by_config, instances, {tmp_path}, {tmp_path / 'a.json'}]\n"
        "  TRAIN: ('registered_by_config',)\n  TEST: ()\nMODEL:\n  META_ARCHITECTURE: EmbedMask\n  DEVICE: cpu\n"
        "INPUT:\n  TARGETS: ('instances',)\n"
    )
    cfg = load_config(str(tmp_path / "config.yaml"))
    prepare(cfg)
    prepare(cfg)  # again is no error
    assert cfg.MODEL.EMBED_MASK.NUM_CLASSES == 1
    assert len(DatasetCatalog.get("registered_by_config")) == 3
    # it survives being written and read
    (tmp_path / "again.yaml").write_text(cfg.dump())
    assert load_config(str(tmp_path / "again.yaml")).DATASETS.REGISTER == cfg.DATASETS.REGISTER
    cfg.DATASETS.REGISTER[0][3] = str(tmp_path / "other.json")
    with pytest.raises(DatasetError, match="'registered_by_config' is registered already, with other files"):
        register_datasets_of(cfg)


@pytest.mark.parametrize("entry", ["name", ["name"], ["name", "coco", "a", "b"], ["name", "instances", "a"], [1, 2]])
def test_malformed_entries_are_named(entry: Any) -> None:
    cfg = get_cfg()
    cfg.DATASETS.REGISTER = [entry]
    with pytest.raises(DatasetError, match=r"DATASETS\.REGISTER: .* is not \[name, 'panoptic', image_root"):
        register_datasets_of(cfg)


def test_a_split_is_the_same_whatever_the_order() -> None:
    whole = content(20)
    train, val = split_by_image(whole, 0.2, "f")
    assert (len(train["images"]), len(val["images"])) == (16, 4)
    for part in (train, val):
        ids = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} == ids
        assert len(part["annotations"]) == 2 * len(ids) and part["categories"] == whole["categories"]
    names = {image["file_name"] for image in val["images"]}
    again = split_by_image({**whole, "images": whole["images"][::-1]}, 0.2, "f")[1]
    assert {image["file_name"] for image in again["images"]} == names
    # More images leave the order of the old ones: both sets are the first ones of it.
    more = split_by_image({**content(30)}, 0.2, "f")[1]
    old = {image["file_name"] for image in more["images"]} & {image["file_name"] for image in whole["images"]}
    assert old <= names or names <= old


def test_either_part_has_an_image() -> None:
    for share in (0.01, 0.99):
        train, val = split_by_image(content(3), share, "f")
        assert train["images"] and val["images"]
    with pytest.raises(DatasetError, match=r"f\.json: cannot be split: it has 1 images"):
        split_by_image(content(1), 0.5, "f.json")


CATEGORIES = PanopticCategories.from_coco([{"id": 1, "name": "a", "isthing": 1}, {"id": 2, "name": "b", "isthing": 0}])


def record(*boxes: tuple[float, float], **more: Any) -> dict[str, Any]:
    objects = [{"bbox": [0, 0, w, h], "segmentation": [[0, 0, 1, 0, 1, 1]], **more} for w, h in boxes]
    return {"height": 40, "width": 60, "annotations": objects}


def test_a_summary_counts_objects_and_measures_them() -> None:
    summary = summarise([record((9, 4), (16, 1)), record(), record((100, 100), iscrowd=1)], CATEGORIES, "mine")
    assert (summary.images, summary.objects, summary.most_objects, summary.empty_images) == (3, 2, 2, 2)
    assert (summary.short_side, summary.long_side, summary.things, summary.stuff) == (40, 60, 1, 1)
    assert summary.object_sizes == (pytest.approx(4.2), pytest.approx(5.0), pytest.approx(5.8))
    assert summary.kind == "panoptic" and "2 images without one" in str(summary)


def test_nothing_to_learn_from() -> None:
    with pytest.raises(DatasetError, match="mine: has 1 images and 0 objects"):
        summarise([record((5, 5), iscrowd=1)], CATEGORIES, "mine")
    boxes = record((5, 5))
    del boxes["annotations"][0]["segmentation"]
    with pytest.raises(DatasetError, match="mine: has boxes without masks"):
        summarise([boxes], CATEGORIES, "mine")
