from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

import convmask.data  # noqa: F401
from convmask.data.errors import DatasetError
from convmask.data.panoptic import register_panoptic, register_panoptic_records


def test_one_call_gives_records_and_metadata(panoptic_set):
    register_panoptic("p3_set", *panoptic_set.paths)
    metadata = MetadataCatalog.get("p3_set")
    assert metadata.thing_classes == ["ball", "cell"]
    assert metadata.stuff_classes == ["things", "sky", "ground"]
    assert metadata.thing_dataset_id_to_contiguous_id == {5: 0, 7: 1}
    assert metadata.stuff_dataset_id_to_contiguous_id == {0: 0, 3: 1, 90: 2}
    assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
    assert metadata.evaluator_type == "convmask_panoptic"
    assert (metadata.image_root, metadata.panoptic_json, metadata.panoptic_root) == panoptic_set.paths
    assert metadata.categories.num_things == 2

    first, second = DatasetCatalog.get("p3_set")
    assert first["file_name"] == panoptic_set.paths[0] + "/0.png"
    assert first["pan_seg_file_name"] == panoptic_set.paths[2] + "/0.png"
    assert (first["image_id"], first["height"], first["width"]) == (100, 8, 12)
    assert [(s["id"], s["category_id"], s["isthing"], s["iscrowd"]) for s in first["segments_info"]] == [
        (1, 1, True, 0),
        (300, 1, False, 0),
        (70000, 0, True, 1),
    ]
    assert first["annotations"] == [
        {"bbox": [1, 2, 3, 3], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0, "segment_id": 1},
        {"bbox": [6, 5, 6, 3], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1, "segment_id": 70000},
    ]
    assert [a["segment_id"] for a in second["annotations"]] == [9]


def test_registering_reads_nothing_and_missing_files_are_errors_at_use(tmp_path):
    register_panoptic("p3_absent", tmp_path, tmp_path / "absent.json", tmp_path)
    metadata = MetadataCatalog.get("p3_absent")
    assert metadata.evaluator_type == "convmask_panoptic"
    assert metadata.get("sem_seg_root") is None
    for use in (lambda: metadata.thing_classes, metadata.as_dict, lambda: DatasetCatalog.get("p3_absent")):
        with pytest.raises(DatasetError, match=r"no file .*absent\.json"):
            use()


def test_known_categories_need_no_file(tmp_path, panoptic_set):
    categories = panoptic_set.content["categories"]
    register_panoptic("p3_known", tmp_path, tmp_path / "absent.json", tmp_path, categories=categories)
    assert MetadataCatalog.get("p3_known").thing_classes == ["ball", "cell"]


def test_known_categories_must_agree_with_the_file(panoptic_set):
    categories = [{**category, "isthing": 1 - category["isthing"]} for category in panoptic_set.content["categories"]]
    register_panoptic("p3_other", *panoptic_set.paths, categories=categories)
    with pytest.raises(
        DatasetError, match=r"panoptic\.json: categories have .*; have isthing 1 for 7, registered as stuff"
    ):
        DatasetCatalog.get("p3_other")
    more = [*panoptic_set.content["categories"], {"id": 1, "name": "rope", "isthing": 0}]
    register_panoptic("p3_more", *panoptic_set.paths, categories=more)
    with pytest.raises(DatasetError, match=r"categories lack 1 \(rope\)"):
        DatasetCatalog.get("p3_more")


def test_values_given_replace_those_of_known_categories(tmp_path, panoptic_set):
    categories = panoptic_set.content["categories"]
    colors = [[1, 2, 3], [4, 5, 6]]
    register_panoptic("p3_absent", tmp_path, "absent.json", tmp_path, categories=categories, thing_colors=colors)
    register_panoptic_records("p3_records", categories, list, thing_colors=colors)
    for name in ("p3_absent", "p3_records"):
        metadata = MetadataCatalog.get(name)
        assert (metadata.thing_classes, metadata.thing_colors) == (["ball", "cell"], colors)


def test_metadata_can_be_copied_pickled_and_extended(panoptic_set):
    MetadataCatalog.get("p3_set").set(note="set before")
    register_panoptic("p3_set", *panoptic_set.paths, thing_colors=[[1, 2, 3], [4, 5, 6]], extra=5)
    metadata = MetadataCatalog.get("p3_set")
    assert (metadata.note, metadata.extra, metadata.thing_colors) == ("set before", 5, [[1, 2, 3], [4, 5, 6]])
    for other in (copy.deepcopy(metadata), copy.copy(metadata), pickle.loads(pickle.dumps(metadata))):
        assert other.as_dict() == metadata.as_dict()
    metadata.set(more=1)
    assert metadata.more == 1
    with pytest.raises(AttributeError):
        _ = metadata.absent


def test_a_name_is_registered_once(panoptic_set):
    register_panoptic("p3_set", *panoptic_set.paths)
    with pytest.raises(DatasetError, match="'p3_set' is already registered"):
        register_panoptic("p3_set", *panoptic_set.paths)


def test_image_path_replaces_the_file_name(panoptic_set):
    register_panoptic("p3_set", *panoptic_set.paths, image_path=lambda image: f"sub/{image['id']}.jpg")
    assert DatasetCatalog.get("p3_set")[0]["file_name"].endswith("images/sub/100.jpg")


def test_records_of_a_function(panoptic_set):
    register_panoptic("p3_set", *panoptic_set.paths)
    records = DatasetCatalog.get("p3_set")
    register_panoptic_records("p3_records", panoptic_set.content["categories"], lambda: records, image_root="elsewhere")
    metadata = MetadataCatalog.get("p3_records")
    assert DatasetCatalog.get("p3_records") == records
    assert metadata.stuff_classes == ["things", "sky", "ground"]
    assert (metadata.image_root, metadata.evaluator_type) == ("elsewhere", "convmask_panoptic")


def _drop_area(content):
    del content["annotations"][1]["segments_info"][0]["area"]


def _unknown_category(content):
    content["annotations"][1]["segments_info"][0]["category_id"] = 4


def _unknown_image(content):
    content["annotations"][1]["image_id"] = 7


def _no_annotations(content):
    content["annotations"] = []


def _short_box(content):
    content["annotations"][1]["segments_info"][0]["bbox"] = [1, 2, 3]


def _no_list(content):
    content["annotations"] = {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_area, "image 101 ('1.png'): field area is missing"),
        (_unknown_category, "unknown category_id 4; categories has [3, 5, 7, 90]"),
        (_unknown_image, "image 7 ('1.png'): image_id is not in images"),
        (_no_annotations, "annotations is empty"),
        (_short_box, "image 101 ('1.png'): a field has a wrong value"),
        (_no_list, "annotations is not a list"),
    ],
)
def test_loading_names_what_is_wrong(panoptic_set, spoil, message):
    spoil(panoptic_set.content)
    panoptic_set.write()
    register_panoptic("p3_set", *panoptic_set.paths)
    with pytest.raises(DatasetError) as error:
        DatasetCatalog.get("p3_set")
    assert message in str(error.value)
    assert panoptic_set.paths[1] in str(error.value)


def test_detectron2s_dataset_tools_work_on_it(panoptic_set):
    from detectron2.data import get_detection_dataset_dicts

    register_panoptic("p3_set", *panoptic_set.paths)
    # The first image has one object that is no crowd, and so has the second.
    assert len(get_detection_dataset_dicts(["p3_set"], filter_empty=True)) == 2
    for segment in panoptic_set.content["annotations"][1]["segments_info"]:
        segment["iscrowd"] = 1
    panoptic_set.write()
    assert len(get_detection_dataset_dicts(["p3_set"], filter_empty=True)) == 1


def test_nuclei(dataset_root):
    root = dataset_root("nuclei")
    register_panoptic("p3_nuclei", root / "images", root / "panoptic_val.json", root / "panoptic")
    records = DatasetCatalog.get("p3_nuclei")
    assert len(records) == 86
    assert np.mean([len(record["annotations"]) for record in records]) > 20
    assert MetadataCatalog.get("p3_nuclei").thing_classes == ["nucleus"]
