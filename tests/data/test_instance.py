from __future__ import annotations

import copy
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

import convmask.data  # noqa: F401
from convmask.data.errors import DatasetError
from convmask.data.instance import register_instances

POLYGON = [[1, 1, 4, 1, 4, 5, 1, 5]]
CONTENT = {
    "categories": [
        {"id": 40, "name": "dog"},
        {"id": 3, "name": "cat", "isthing": 1},
        {"id": 9, "name": "grass", "isthing": 0},
    ],
    "images": [
        {"id": 6, "file_name": "b.jpg", "height": 9, "width": 10},
        {"id": 2, "file_name": "a.jpg", "height": 9, "width": 10},
    ],
    "annotations": [
        {"id": 1, "image_id": 6, "category_id": 3, "bbox": [1, 1, 3, 4], "area": 12, "segmentation": POLYGON},
        {"id": 2, "image_id": 6, "category_id": 9, "bbox": [0, 0, 9, 9], "area": 81, "segmentation": POLYGON},
        {"id": 3, "image_id": 6, "category_id": 40, "bbox": [0, 0, 1, 9], "area": 9, "iscrowd": 1,
         "segmentation": {"size": [9, 10], "counts": [0, 9, 81]}},
    ],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "instances.json").write_text(json.dumps(content))
        register_instances("p3_instances", tmp_path / "images", tmp_path / "instances.json")

    return write


def test_polygons_rle_stuff_and_ids_with_gaps(write, tmp_path):
    write(CONTENT)
    metadata = MetadataCatalog.get("p3_instances")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 40: 1}
    assert metadata.evaluator_type == "coco"
    assert metadata.get("stuff_classes") is None
    empty, full = DatasetCatalog.get("p3_instances")
    assert (empty["image_id"], empty["annotations"]) == (2, [])
    assert full["file_name"] == str(tmp_path / "images" / "b.jpg")
    cat, dog = full["annotations"]
    assert cat == {
        "bbox": [1, 1, 3, 4],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "segmentation": POLYGON,
    }
    assert (dog["category_id"], dog["iscrowd"]) == (1, 1)
    mask = mask_util.decode(dog["segmentation"])
    assert np.array_equal(np.argwhere(mask), [[row, 0] for row in range(9)])


def test_same_dicts_as_detectron2(tmp_path, write):
    from detectron2.data.datasets.coco import load_coco_json

    content = copy.deepcopy(CONTENT)
    content["categories"].pop()
    content["annotations"].pop(1)
    content["annotations"][0]["iscrowd"] = 0
    content["annotations"][0]["keypoints"] = [1, 2, 2, 5, 6, 1]
    write(content)
    MetadataCatalog.get("p3_theirs").thing_classes = ["cat", "dog"]
    theirs = load_coco_json(str(tmp_path / "instances.json"), str(tmp_path / "images"), "p3_theirs")
    assert DatasetCatalog.get("p3_instances") == theirs


def test_a_file_for_testing_has_no_annotations(write):
    write({key: value for key, value in CONTENT.items() if key != "annotations"})
    assert [record["annotations"] for record in DatasetCatalog.get("p3_instances")] == [[], []]


def test_degenerate_polygons_are_left_out_and_ignored_objects_are_crowds(write):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]
    content["annotations"][2].update(iscrowd=0, ignore=1)
    write(content)
    annotations = DatasetCatalog.get("p3_instances")[1]["annotations"]
    assert [(a["category_id"], a["iscrowd"]) for a in annotations] == [(1, 1)]


@pytest.mark.parametrize("absent", [None, [], "key"])
def test_among_masks_annotations_without_one_are_left_out(write, caplog, absent):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["segmentation"] = absent
    if absent == "key":
        del content["annotations"][0]["segmentation"]
    write(content)
    assert [a["category_id"] for a in DatasetCatalog.get("p3_instances")[1]["annotations"]] == [1]
    assert "1 annotations without a mask" in caplog.text


def test_boxes_alone(write):
    content = copy.deepcopy(CONTENT)
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    write(content)
    annotations = DatasetCatalog.get("p3_instances")[1]["annotations"]
    assert [a["category_id"] for a in annotations] == [0, 1]
    assert not any("segmentation" in a for a in annotations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 4}, "image 6 ('b.jpg'), annotation 1: unknown category_id 4; categories has [3, 40]"),
        ({"bbox": [1, 2]}, "annotation 1: a field has a wrong value"),
        ({"segmentation": [[0, 0, 1, 1, float("nan"), 2]]}, "annotation 1: segmentation: a polygon holds a coordinate"),
        ({"segmentation": {"size": [9, 10], "counts": "0"}}, "annotation 1: segmentation: RLE counts cover 0 pixels"),
    ],
)
def test_loading_names_what_is_wrong(write, change, message):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0].update(change)
    write(content)
    with pytest.raises(DatasetError) as error:
        DatasetCatalog.get("p3_instances")
    assert message in str(error.value)


def test_stuff_only_is_refused(write):
    write({**CONTENT, "categories": [{"id": 1, "name": "sky", "isthing": 0}]})
    with pytest.raises(DatasetError, match="instances need things"):
        _ = MetadataCatalog.get("p3_instances").thing_classes
