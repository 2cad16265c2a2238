from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image

import convmask.data  # noqa: F401
from convmask.config import get_cfg
from convmask.data.errors import DatasetError
from convmask.data.instance import register_instances
from convmask.data.panoptic import register_panoptic, register_panoptic_records
from convmask.data.problems import Problem
from convmask.data.semantic import register_semantic
from convmask.data.validation import check_before_training, validate, validate_instances, validate_panoptic


def _segment(content, image=1, segment=0):
    return content["annotations"][image]["segments_info"][segment]


def _set(target, **values):
    target.update(values)


# (what to spoil in the json, field, message, image)
JSON_CASES = {
    "NaN box": (
        lambda c: _set(_segment(c), bbox=[1, math.nan, 2, 2]),
        "segments_info[0].bbox",
        "NaN or infinity",
        "1.png",
    ),
    "infinite box": (lambda c: _set(_segment(c), bbox=[1, 1, math.inf, 2]), "bbox", "NaN or infinity", "1.png"),
    "negative box": (lambda c: _set(_segment(c), bbox=[1, 1, -2, 2]), "bbox", "negative size: [1, 1, -2, 2]", "1.png"),
    "empty box": (lambda c: _set(_segment(c), bbox=[1, 1, 0, 2]), "bbox", "has no area", "1.png"),
    "box outside": (lambda c: _set(_segment(c), bbox=[5, 1, 9, 2]), "bbox", "outside the image of 10 x 9", "1.png"),
    "box of text": (lambda c: _set(_segment(c), bbox="1234"), "bbox", "is not four numbers", "1.png"),
    "no box": (lambda c: _segment(c).pop("bbox"), "bbox", "is not four numbers", "1.png"),
    "area 0": (lambda c: _set(_segment(c), area=0), "area", "is 0", "1.png"),
    "NaN area": (lambda c: _set(_segment(c), area=math.nan), "area", "not a number of pixels", "1.png"),
    "infinite area": (lambda c: _set(_segment(c), area=math.inf), "area", "not a number of pixels", "1.png"),
    "unknown category": (lambda c: _set(_segment(c), category_id=4), "category_id", "unknown category 4", "1.png"),
    "category of text": (lambda c: _set(_segment(c), category_id=[3]), "category_id", "unknown category [3]", "1.png"),
    "segment twice": (lambda c: _set(_segment(c, 1, 1), id=2), "segments_info[1].id", "id 2 occurs twice", "1.png"),
    "segment id 0": (lambda c: _set(_segment(c), id=0), "segments_info[0].id", "not an integer from 1", "1.png"),
    "isthing": (lambda c: _set(_segment(c), isthing=1), "isthing", "category 90 is stuff", "1.png"),
    "crowd": (lambda c: _set(_segment(c), iscrowd=2), "iscrowd", "neither 0 nor 1: 2", "1.png"),
    "segment of text": (lambda c: c["annotations"][1]["segments_info"].append("x"), "segments_info[2]", "no", "1.png"),
    "no segments": (lambda c: c["annotations"][1].pop("segments_info"), "segments_info", "missing", "1.png"),
    "image twice": (
        lambda c: _set(c["images"][1], id=100),
        "images[1].id",
        "image id 100 is also that of 0.png",
        "1.png",
    ),
    "no size": (lambda c: c["images"][1].pop("height"), "images[1].height", "not a size in pixels: None", "1.png"),
    "no file name": (lambda c: _set(c["images"][1], file_name=3), "images[1].file_name", "not a file name: 3", "101"),
    "unknown image": (
        lambda c: _set(c["annotations"][1], image_id=5),
        "image_id",
        "not the id of an image: 5",
        "1.png",
    ),
    "two annotations": (
        lambda c: c["annotations"].append(c["annotations"][0]),
        "image_id",
        "second annotation",
        "0.png",
    ),
    "no annotation": (lambda c: c["annotations"].pop(), "annotations", "1 images have none", ""),
    "category twice": (lambda c: _set(c["categories"][1], id=7), "categories[1].id", "once as a thing and once as", ""),
    "name of two kinds": (
        lambda c: _set(c["categories"][1], name="cell"),
        "categories[1].isthing",
        "a thing in one",
        "",
    ),
    "no images": (lambda c: c["images"].clear(), "images", "is empty", ""),
    "no annotations": (lambda c: c["annotations"].clear(), "annotations", "is empty", ""),
}


@pytest.mark.parametrize("case", JSON_CASES)
def test_wrong_panoptic_json(panoptic_set, case):
    spoil, field, message, image = JSON_CASES[case]
    spoil(panoptic_set.content)
    problems = validate_panoptic(*panoptic_set.write().paths, quick=True)
    found = [problem for problem in problems if message in problem.message and problem.field.endswith(field)]
    assert found, problems
    assert found[0].file == panoptic_set.paths[1]
    assert image in found[0].image


def _spoil_picture(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


FILE_CASES = {
    "missing image": (lambda s: (s.root / "images/1.png").unlink(), "file_name", "no file", True),
    "missing PNG": (lambda s: (s.root / "panoptic/1.png").unlink(), "pan_seg_file_name", "no file", True),
    "truncated PNG": (lambda s: _spoil_picture(s.root / "panoptic/1.png"), "pan_seg_file_name", "1.png", False),
    "truncated image": (lambda s: _spoil_picture(s.root / "images/1.png"), "file_name", "1.png", False),
    "empty image": (lambda s: (s.root / "images/1.png").write_bytes(b""), "file_name", "1.png", False),
    "grey PNG": (
        lambda s: Image.new("L", (10, 9)).save(s.root / "panoptic/1.png"), "pan_seg_file_name", "mode L", False
    ),
    "image of other size": (
        lambda s: Image.new("RGB", (9, 10)).save(s.root / "images/1.png"), "width, height", "9 x 10 pixels", False
    ),
    "PNG of other size": (
        lambda s: Image.new("RGB", (9, 10)).save(s.root / "panoptic/1.png"), "pan_seg_file_name", "9 x 10", False
    ),
    "segment not in PNG": (
        lambda s: Image.new("RGB", (10, 9), (2, 0, 0)).save(s.root / "panoptic/1.png"),
        "segments_info", "segment id 9 is not in", False,
    ),
    "PNG id not listed": (
        lambda s: Image.new("RGB", (10, 9), (0, 1, 1)).save(s.root / "panoptic/1.png"),
        "segments_info", f"id {256 + 65536} of", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILE_CASES)
def test_wrong_files(panoptic_set, case):
    spoil, field, message, quickly = FILE_CASES[case]
    spoil(panoptic_set)
    problems = validate_panoptic(*panoptic_set.paths)
    assert [problem for problem in problems if message in problem.message and problem.field == field], problems
    assert all(problem.fatal and "1.png" in problem.image for problem in problems)
    assert bool(validate_panoptic(*panoptic_set.paths, quick=True)) == quickly


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b'{"images": [', "is no valid json"),
        (b"\xff\xfe\x00", "is no valid json"),
        (b"[" * 100000, "is no valid json"),
        (b"[1, 2]", "holds a list, not an object"),
        (b'{"images": [], "annotations": []}', "categories is missing"),
        (b'{"images": {}, "annotations": [], "categories": []}', "images is not a list"),
    ],
)
def test_broken_json(panoptic_set, data, message):
    Path(panoptic_set.paths[1]).write_bytes(data)
    for problems in (validate_panoptic(*panoptic_set.paths), validate_instances("x", panoptic_set.paths[1])):
        if "categories" not in message and "images" not in message:
            assert len(problems) == 1
        assert message in problems[0].message
        assert problems[0].file == panoptic_set.paths[1]


def test_missing_json(tmp_path):
    (problem,) = validate_panoptic(tmp_path, tmp_path / "absent.json", tmp_path)
    assert "absent.json: does not exist" in str(problem)


def test_sound_data_have_no_problems(panoptic_set):
    # Among them: ids with gaps, a crowd, unlabelled pixels.
    assert validate_panoptic(*panoptic_set.paths) == []
    register_panoptic("p3_set", *panoptic_set.paths)
    assert validate("p3_set") == []
    assert validate(DatasetCatalog.get("p3_set")) == []


def test_all_problems_are_found_and_max_problems_stops(panoptic_set):
    _segment(panoptic_set.content)["area"] = -1
    _segment(panoptic_set.content, 1, 1)["category_id"] = 4
    panoptic_set.write()
    (panoptic_set.root / "images/0.png").unlink()
    problems = validate_panoptic(*panoptic_set.paths)
    assert [problem.field for problem in problems] == [
        "segments_info[0].area", "segments_info[1].category_id", "file_name",
    ]  # fmt: skip
    assert validate_panoptic(*panoptic_set.paths, max_problems=2) == problems[:2]


INSTANCES = {
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
    "images": [{"id": 6, "file_name": "0.png", "height": 8, "width": 12}],
    "annotations": [
        {"id": 1, "image_id": 6, "category_id": 3, "bbox": [1, 1, 3, 4], "area": 12, "iscrowd": 0,
         "segmentation": [[1, 1, 4, 1, 4, 5, 1, 5]]},
        {"id": 2, "image_id": 6, "category_id": 9, "bbox": [0, 0, 1, 8], "area": 8,
         "segmentation": {"size": [8, 12], "counts": [0, 8, 88]}},
    ],
}  # fmt: skip

INSTANCE_CASES = {
    "annotation twice": ({"id": 2}, "annotations[1].id", "annotation id 2 occurs twice", True),
    "no id": ({"id": None}, "annotations[0].id", "neither an integer nor text", True),
    "unknown category": ({"category_id": 4}, "category_id", "unknown category 4", True),
    "unknown image": ({"image_id": 4}, "image_id", "not the id of an image: 4", False),
    "NaN box": ({"bbox": [math.nan, 0, 1, 1]}, "bbox", "NaN", True),
    "empty box": ({"bbox": [1, 1, 0, 4]}, "bbox", "has no area", False),
    "outside": ({"bbox": [1, 1, 30, 4]}, "bbox", "outside the image of 12 x 8 pixels", True),
    "area 0": ({"area": 0}, "area", "is 0", False),
    "crowd": ({"iscrowd": "no"}, "iscrowd", "neither 0 nor 1: 'no'", True),
    "NaN polygon": ({"segmentation": [[1, 1, 4, math.nan, 4, 5]]}, "segmentation", "NaN", True),
    "short polygon": ({"segmentation": [[1, 1, 4, 5]]}, "segmentation", "no polygon has three points", False),
    "no mask": ({"segmentation": []}, "segmentation", "while other annotations have one", False),
    "text": ({"segmentation": "abc"}, "segmentation", "neither polygons nor RLE", True),
    "RLE size": ({"segmentation": {"size": [12, 8], "counts": [96]}}, "segmentation", "RLE size is [12, 8]", True),
    "RLE runs": ({"segmentation": {"size": [8, 12], "counts": [95]}}, "segmentation", "cover 95 pixels", True),
}


@pytest.mark.parametrize("case", INSTANCE_CASES)
def test_wrong_instance_json(panoptic_set, case):
    change, field, message, fatal = INSTANCE_CASES[case]
    content = copy.deepcopy(INSTANCES)
    json_file = panoptic_set.root / "instances.json"
    json_file.write_text(json.dumps(content))
    assert validate_instances(panoptic_set.paths[0], json_file) == []
    content["annotations"][0].update(change)
    json_file.write_text(json.dumps(content))
    problems = validate_instances(panoptic_set.paths[0], json_file, quick=True)
    found = [problem for problem in problems if problem.field.endswith(field)]
    assert [problem.fatal for problem in found] == [fatal], problems
    assert message in found[0].message


def test_instance_picture_of_another_size(panoptic_set):
    content = copy.deepcopy(INSTANCES)
    content["images"][0]["width"] = 13
    content["annotations"].pop()
    (panoptic_set.root / "instances.json").write_text(json.dumps(content))
    (problem,) = validate_instances(panoptic_set.paths[0], panoptic_set.root / "instances.json")
    assert problem.field == "width, height"
    assert "0.png is of 12 x 8 pixels, annotated are 13 x 8" in problem.message


def test_dataset_dicts_of_ones_own(panoptic_set):
    categories = panoptic_set.content["categories"]
    box = {"bbox": [0, 0, 2, 2], "bbox_mode": BoxMode.XYXY_ABS}
    picture = {"file_name": panoptic_set.paths[0] + "/0.png", "height": 8, "width": 12}
    records = [
        {**picture, "image_id": 1, "annotations": [{**box, "category_id": 2}, {**box, "category_id": "1"}]},
        {**picture, "image_id": 1, "annotations": [{**box, "category_id": 0, "bbox": [0, 0, 50, 3]}]},
        {"image_id": 3},
        {**picture, "image_id": 4, "annotations": ["x"]},
        {**picture, "image_id": 5, "segments_info": [{"id": 1, "category_id": 0, "isthing": True}] * 2},
    ]
    register_panoptic_records("p3_records", categories, lambda: records)
    messages = [str(problem) for problem in validate("p3_records", quick=True)]
    expected = ["no thing class 2", "not a class index: '1'", "id 1 occurs twice", "outside the image", "no file_name",
                "not a dict of Detectron2's format", "segment id 1 occurs twice"]  # fmt: skip
    assert len(messages) == len(expected)
    for text, message in zip(expected, messages, strict=True):
        assert text in message


def test_datasets_that_cannot_be_loaded():
    (problem,) = validate("p3_nobody")
    assert "is not registered" in problem.message

    def fail() -> list:
        raise RuntimeError("on purpose")

    DatasetCatalog.register("p3_failing", fail)
    (problem,) = validate("p3_failing")
    assert (problem.file, problem.message) == ("p3_failing", "cannot be loaded: on purpose")


def test_semantic_labels_out_of_range_and_sizes(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images/a.jpg")
    Image.fromarray(np.array([[0, 1], [2, 255]], dtype=np.uint8)).save(tmp_path / "labels/a.png")
    register_semantic("p3_semantic", tmp_path / "images", tmp_path / "labels", ["x", "y"])
    labels, size = validate("p3_semantic")
    assert "a.png holds [2]; labels are 0 to 1 and 255 (ignored)" in labels.message
    assert "is of 2 x 2 pixels" in size.message


def _config(*names):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = names[:1], names[1:]
    return cfg


def test_check_before_training_lists_ten_and_counts_all(panoptic_set):
    register_panoptic("p3_set", *panoptic_set.paths)
    register_panoptic("p3_absent", "x", "absent.json", "x")
    check_before_training(_config("p3_set", "p3_set"))
    for segment in panoptic_set.content["annotations"][0]["segments_info"]:
        segment.update(bbox=[math.nan] * 4, area=-1, category_id=1, iscrowd=3)
    panoptic_set.write()
    with pytest.raises(DatasetError) as error:
        check_before_training(_config("p3_set", "p3_absent"))
    lines = str(error.value).splitlines()
    assert lines[0] == "datasets p3_set, p3_absent cannot be trained on: 13 problems"
    assert len(lines) == 12
    assert "panoptic.json: image 0.png (id 100): segments_info[0].category_id: unknown category 1" in lines[1]
    assert "and 3 more" in lines[-1]
    cfg = _config("p3_set", "p3_absent")
    cfg.DATASETS.VALIDATE = False
    check_before_training(cfg)


def test_check_before_training_decodes_a_sample(panoptic_set):
    register_panoptic("p3_set", *panoptic_set.paths)
    _spoil_picture(panoptic_set.root / "panoptic/0.png")
    with pytest.raises(DatasetError, match=r"0\.png"):
        check_before_training(_config("p3_set"))


def test_categories_of_the_registration_are_what_counts(panoptic_set):
    categories = copy.deepcopy(panoptic_set.content["categories"])
    del categories[1]
    register_panoptic("p3_fewer", *panoptic_set.paths, categories=categories)
    (problem,) = validate("p3_fewer")
    assert (problem.image, problem.field) == ("0.png (id 100)", "segments_info[1].category_id")
    assert "unknown category 3" in problem.message
    categories[0]["isthing"] = 0
    register_panoptic("p3_other", *panoptic_set.paths, categories=categories)
    messages = [str(problem) for problem in validate("p3_other")]
    assert any("categories: have isthing 1 for 7, registered as stuff (cell)" in message for message in messages)


@pytest.mark.parametrize(
    ("side", "count", "expected"),
    [(1000, 800, 100), (100, 800, 500), (100, 7, 7), (4000, 90, 16), (4000, 9, 9), (None, 800, 200)],
)
def test_the_sample_is_smaller_where_images_are_large(side, count, expected, monkeypatch):
    decoded = []

    def read_image(name, _):
        decoded.append(name)
        raise DatasetError(name)

    monkeypatch.setattr("convmask.data.validation_files.read_image", read_image)
    monkeypatch.setattr("convmask.data.validation_files.PathManager.isfile", lambda path: True)
    size = {} if side is None else {"height": side, "width": side}
    validate([{"file_name": str(i), "image_id": i, **size} for i in range(count)], quick=True, sample=500)
    assert len(decoded) == len(set(decoded)) == expected


def test_one_process_checks_for_all(panoptic_set, monkeypatch):
    register_panoptic("p3_set", *panoptic_set.paths)
    found = Problem("file", "image", "field", "found by the first process")
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda own: [[found], own])
    monkeypatch.setattr("convmask.data.validation.validate", None)
    with pytest.raises(DatasetError, match="found by the first process"):
        check_before_training(_config("p3_set"))


def test_check_before_training_goes_on_with_harmless_problems(panoptic_set, caplog):
    # COCO's own training set holds boxes without area.
    content = copy.deepcopy(INSTANCES)
    content["annotations"][0].update(area=0, bbox=[1, 1, 0, 4])
    (panoptic_set.root / "instances.json").write_text(json.dumps(content))
    register_instances("p3_instances", panoptic_set.paths[0], panoptic_set.root / "instances.json")
    check_before_training(_config("p3_instances"))
    assert "annotations[0].area: is 0" in caplog.text


def test_nuclei(dataset_root):
    root = dataset_root("nuclei")
    paths = root / "images", root / "panoptic_val.json", root / "panoptic"
    assert validate_panoptic(*paths, quick=True) == []
    register_panoptic("p3_nuclei", *paths)
    assert validate(DatasetCatalog.get("p3_nuclei")[::10]) == []


def test_coco_sample(dataset_root):
    root = dataset_root("coco_panoptic_sample")
    assert validate_panoptic(root / "input_images", root / "panoptic_examples.json", root / "panoptic_examples") == []


def test_synthetic():
    assert validate("synthetic_panoptic_val", quick=True, sample=4) == []
    assert validate(DatasetCatalog.get("synthetic_panoptic_hard_val")[:16]) == []
