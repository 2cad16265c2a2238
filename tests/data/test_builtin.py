from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils.file_io import PathManager
from PIL import Image
from scipy.io import savemat

import convmask.data  # noqa: F401
from convmask.data.builtin import register_builtin
from convmask.data.builtin_classes import CITYSCAPES_PANOPTIC_CATEGORIES, COCO_STUFF_CLASSES, VOC_CLASSES
from convmask.data.builtin_voc import read_sbd_instances
from convmask.data.errors import DatasetError
from convmask.data.validation import validate


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder whose datasets are registered with a name beginning in ``p3_``."""
    register_builtin(str(tmp_path), "p3_{}")
    return tmp_path


def _picture(path: Path, size=(6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def _labels(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def _panoptic(
    json_file: Path, png: Path, image: dict, categories: list, image_id: object, first: int, second: int
) -> None:
    """A map whose left half is of the category ``first`` (id 1), and whose right half of ``second`` (id 2)."""
    ids = np.zeros((4, 6, 3), dtype=np.uint8)
    ids[:, :3, 0], ids[:, 3:, 0] = 1, 2
    _labels(png, ids)
    segments = [
        {"id": 1, "category_id": first, "area": 12, "bbox": [0, 0, 3, 4], "iscrowd": 0},
        {"id": 2, "category_id": second, "area": 12, "bbox": [3, 0, 3, 4], "iscrowd": 0},
    ]
    content = {
        "categories": categories,
        "images": [{"height": 4, "width": 6, **image}],
        "annotations": [{"image_id": image_id, "file_name": png.name, "segments_info": segments}],
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(content))


def test_coco_panoptic(root):
    coco = root / "coco"
    _picture(coco / "val2017/000000000001.jpg")
    _panoptic(
        coco / "annotations/panoptic_val2017.json", coco / "panoptic_val2017/000000000001.png",
        {"id": 1, "file_name": "000000000001.jpg"}, COCO_CATEGORIES, 1, first=90, second=200,
    )  # fmt: skip
    (record,) = DatasetCatalog.get("p3_convmask_coco_2017_val_panoptic")
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [(79, True), (53, False)]
    assert validate("p3_convmask_coco_2017_val_panoptic") == []


def test_coco_stuff_pixel_maps(root):
    _picture(root / "coco/train2017/1.jpg")
    _labels(root / "coco/stuff_train2017_pixelmaps/1.png", [[0, 92, 182, 183, 91, 255]] * 4)
    (record,) = DatasetCatalog.get("p3_convmask_coco_2017_train_stuff")
    with PathManager.open(record["sem_seg_file_name"], "rb") as file:
        assert np.asarray(Image.open(file))[0].tolist() == [255, 0, 90, 91, 255, 255]
    classes = MetadataCatalog.get("p3_convmask_coco_2017_train_stuff").stuff_classes
    assert (classes[0], classes[90], classes[91], len(classes)) == ("banner", "wood", "other", 92)
    assert validate("p3_convmask_coco_2017_train_stuff") == []


def test_coco_stuff_and_things(root):
    _picture(root / "coco/train2017/1.jpg")
    _labels(root / "coco/stuffthingmaps/train2017/1.png", [[0, 89, 91, 181, 11, 255]] * 4)
    (record,) = DatasetCatalog.get("p3_convmask_coco_2017_train_stuffthing")
    with PathManager.open(record["sem_seg_file_name"], "rb") as file:
        # 11 is a category that COCO removed.
        assert np.asarray(Image.open(file))[0].tolist() == [0, 79, 80, 170, 255, 255]
    classes = MetadataCatalog.get("p3_convmask_coco_2017_train_stuffthing").stuff_classes
    assert (classes[0], classes[79], classes[80], len(classes)) == ("person", "toothbrush", "banner", 171)


def test_names_of_coco_stuff_agree_with_those_of_coco_panoptic():
    shared = {c["id"]: c["name"] for c in COCO_CATEGORIES if 92 <= c["id"] <= 182}
    assert len(shared) > 30
    assert {i: COCO_STUFF_CLASSES[i - 92] for i in shared} == shared


def test_cityscapes(root):
    city = root / "cityscapes"
    name = "aachen_000000_000019"
    _picture(city / f"leftImg8bit/train/aachen/{name}_leftImg8bit.png")
    _panoptic(
        city / "gtFine/cityscapes_panoptic_train.json",
        city / f"gtFine/cityscapes_panoptic_train/{name}_gtFine_panoptic.png",
        {"id": name, "file_name": f"{name}_gtFine_leftImg8bit.png"},
        CITYSCAPES_PANOPTIC_CATEGORIES, name, first=26, second=7,
    )  # fmt: skip
    (record,) = DatasetCatalog.get("p3_convmask_cityscapes_train_panoptic")
    assert record["image_id"] == name
    assert PathManager.isfile(record["file_name"])
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [(2, True), (1, False)]
    categories = MetadataCatalog.get("p3_convmask_cityscapes_train_panoptic").categories
    # Train ids: road 0, car 13.
    assert [categories.semantic_label_of(2, True, "all"), categories.semantic_label_of(1, False, "all")] == [13, 0]
    assert categories.num_semantic("all") == 19
    assert validate("p3_convmask_cityscapes_train_panoptic") == []


def test_ade20k(root):
    ade = root / "ADEChallengeData2016"
    name = "ADE_val_00000001"
    _picture(ade / f"images/validation/{name}.jpg")
    _labels(ade / f"annotations/validation/{name}.png", [[0, 1, 2, 150, 13, 0]] * 4)
    categories = [
        {"id": 0, "name": "wall", "isthing": 0, "color": [120, 120, 120]},
        {"id": 7, "name": "bed", "isthing": 1, "color": [204, 5, 255]},
        {"id": 9, "name": "grass", "isthing": 0, "color": [4, 250, 7]},
    ]
    _panoptic(
        ade / "ade20k_panoptic_val.json", ade / f"ade20k_panoptic_val/{name}.png",
        {"id": name, "file_name": f"{name}.jpg"}, categories, name, first=7, second=0,
    )  # fmt: skip
    (record,) = DatasetCatalog.get("p3_convmask_ade20k_val_panoptic")
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [(0, True), (1, False)]
    metadata = MetadataCatalog.get("p3_convmask_ade20k_val_panoptic")
    assert metadata.categories.semantic_classes("all") == ["wall", "bed", "grass"]
    assert validate("p3_convmask_ade20k_val_panoptic") == []
    (record,) = DatasetCatalog.get("p3_convmask_ade20k_val_semantic")
    with PathManager.open(record["sem_seg_file_name"], "rb") as file:
        assert np.asarray(Image.open(file))[0].tolist() == [255, 0, 1, 149, 12, 255]
    assert MetadataCatalog.get("p3_convmask_ade20k_val_semantic").stuff_classes[12] == "person"


def test_mapillary(root):
    folder = root / "mapillary_vistas/training"
    _picture(folder / "images/abc.jpg")
    categories = [{"id": 1, "name": "Bird", "isthing": 1}, {"id": 3, "name": "Curb", "isthing": 0}]
    _panoptic(
        folder / "panoptic/panoptic_2018.json", folder / "panoptic/abc.png",
        {"id": "abc", "file_name": "abc.jpg"}, categories, "abc", first=1, second=3,
    )  # fmt: skip
    assert len(DatasetCatalog.get("p3_convmask_mapillary_train_panoptic")) == 1
    assert validate("p3_convmask_mapillary_train_panoptic") == []


def test_nuclei(root, dataset_root):
    os.symlink(dataset_root("nuclei"), root / "nuclei")
    assert len(DatasetCatalog.get("p3_nuclei_train")) == 498
    assert validate("p3_nuclei_val", quick=True) == []


OBJECTS = np.array([[1, 1, 255, 2, 2, 0], [1, 1, 255, 2, 0, 0], [0, 0, 0, 255, 0, 0], [1, 0, 0, 0, 0, 0]])


def _voc(root: Path) -> Path:
    voc = root / "VOC2012"
    for name in ("2007_000001", "2007_000002"):
        _picture(voc / f"JPEGImages/{name}.jpg")
        _labels(voc / f"SegmentationObject/{name}.png", OBJECTS)
        _labels(voc / f"SegmentationClass/{name}.png", np.choose(np.minimum(OBJECTS, 3), [0, 20, 9, 255]))
    for folder in ("Segmentation", "Main"):
        (voc / "ImageSets" / folder).mkdir(parents=True)
        (voc / "ImageSets" / folder / "val.txt").write_text("2007_000001\n2007_000002\n")
    return voc


def test_voc_instances(root):
    _voc(root)
    records = DatasetCatalog.get("p3_convmask_voc_2012_val_instances")
    assert [record["image_id"] for record in records] == ["2007_000001", "2007_000002"]
    first, second = records[0]["annotations"]
    assert (first["bbox"], first["category_id"]) == ([0, 0, 2, 4], 19)
    assert (second["bbox"], second["category_id"]) == ([3, 0, 2, 2], 8)
    assert np.array_equal(mask_util.decode(first["segmentation"]), OBJECTS == 1)
    assert MetadataCatalog.get("p3_convmask_voc_2012_val_instances").thing_classes == list(VOC_CLASSES)
    assert validate("p3_convmask_voc_2012_val_instances") == []


def test_voc_object_of_two_classes_is_an_error(root):
    voc = _voc(root)
    _labels(voc / "SegmentationClass/2007_000001.png", np.arange(24).reshape(4, 6))
    with pytest.raises(DatasetError, match=r"2007_000001\.png: object 1 is of no single class"):
        DatasetCatalog.get("p3_convmask_voc_2012_val_instances")


def _sbd(root: Path) -> Path:
    sbd = root / "sbd"
    _picture(sbd / "img/2007_000002.jpg")
    (sbd / "inst").mkdir()
    content = {
        "Segmentation": np.where(OBJECTS == 255, 0, OBJECTS).astype(np.uint8),
        "Categories": np.array([[20.0], [9.0]]),
    }
    savemat(sbd / "inst/2007_000002.mat", {"GTinst": content})
    (sbd / "train.txt").write_text("2007_000002\n")
    return sbd


def test_sbd_in_its_own_split_and_in_that_of_voc(root):
    _voc(root)
    _sbd(root)
    for name in ("p3_convmask_sbd_train_instances", "p3_convmask_sds_val_instances"):
        (record,) = DatasetCatalog.get(name)
        assert record["image_id"] == "2007_000002"
        assert [annotation["category_id"] for annotation in record["annotations"]] == [19, 8]
        assert np.array_equal(mask_util.decode(record["annotations"][1]["segmentation"]), OBJECTS == 2)
        assert validate(name) == []


def test_sbd_with_one_object_or_none(root):
    folder = _sbd(root) / "inst"
    savemat(
        folder / "one.mat", {"GTinst": {"Segmentation": np.ones((2, 3), np.uint8), "Categories": np.array([[5.0]])}}
    )
    savemat(
        folder / "none.mat", {"GTinst": {"Segmentation": np.zeros((2, 3), np.uint8), "Categories": np.zeros((0, 1))}}
    )
    assert read_sbd_instances(str(root / "sbd"), "one")[1].tolist() == [5]
    assert read_sbd_instances(str(root / "sbd"), "none")[1].tolist() == []


@pytest.mark.parametrize(
    "content",
    [
        {"GTcls": np.ones((2, 2))},
        {"GTinst": {"Segmentation": np.ones((2, 2))}},
        {"GTinst": {"Segmentation": np.full((2, 2), 3, np.uint8), "Categories": np.array([[5.0]])}},
        {"GTinst": {"Segmentation": np.ones((2, 2), np.uint8), "Categories": np.array([[21.0]])}},
        None,
    ],
)
def test_broken_mat_files_are_errors(root, content):
    path = _sbd(root) / "inst/2007_000002.mat"
    if content is None:
        path.write_bytes(path.read_bytes()[:100])
    else:
        savemat(path, content)
    with pytest.raises(DatasetError, match=r"2007_000002\.mat"):
        DatasetCatalog.get("p3_convmask_sbd_train_instances")


def test_absent_data_cost_nothing_at_import_and_name_the_folder_at_use(tmp_path):
    code = """
import json
from detectron2.data import DatasetCatalog, MetadataCatalog
import convmask.data
names = [name for name in DatasetCatalog.list() if name.startswith(("convmask_", "nuclei_"))]
messages = []
for name in names:
    try:
        DatasetCatalog.get(name)
    except convmask.data.errors.DatasetError as error:
        messages.append(str(error))
print(json.dumps([names, messages]))
print(MetadataCatalog.get("nuclei_val").thing_classes)
"""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "nowhere")}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()[-2:]
    names, messages = json.loads(first)
    assert len(names) == len(messages) == 23
    for message in messages:
        assert str(tmp_path / "nowhere") in message
        assert "DETECTRON2_DATASETS" in message
    assert second == "['nucleus']"


def test_detectron2_converts_voc_for_coco_evaluation(root):
    from detectron2.data.datasets.coco import convert_to_coco_dict

    _voc(root)
    converted = convert_to_coco_dict("p3_convmask_voc_2012_val_instances")
    assert [annotation["area"] for annotation in converted["annotations"]] == [5, 3, 5, 3]
