from __future__ import annotations

import copy
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.structures import BoxMode

from convmask.data.panoptic import register_panoptic
from convmask.evaluation import COCOEvaluator
from convmask.evaluation.coco import panoptic_to_coco
from convmask.evaluation.ground_truth import PanopticGroundTruth

from .model_outputs import inputs_of, instances_output
from .oracle import CATEGORIES, write_panoptic_set

TOTALS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def detect(name, images, seed):
    """Detections made from ground truth: shifted masks with random scores, some of a wrong class."""
    things = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    rng = np.random.default_rng(seed)
    outputs = []
    for id_map, segments in images:
        shift = tuple(rng.integers(-1, 2, size=2))
        found = [s for s in segments if s["category_id"] in things and rng.random() < 0.9]
        masks = np.array([np.roll(id_map == s["id"], shift, (0, 1)) for s in found]).reshape(-1, *id_map.shape)
        classes = [things[s["category_id"]] if rng.random() < 0.8 else int(rng.integers(2)) for s in found]
        outputs.append(instances_output(masks, classes, rng.random(len(found)).tolist()))
    return outputs


def run(evaluator, name, outputs):
    evaluator.reset()
    evaluator.process(inputs_of(name), outputs)
    return evaluator.evaluate()


def coco_json(name, images, path):
    """The COCO json of the things of a panoptic set, written with pycocotools' own encoder."""
    annotations = []
    for image_id, (id_map, segments) in enumerate(images, start=1):
        for segment in segments:
            if segment["category_id"] in (3, 7):
                rle = mask_util.encode(np.asfortranarray(id_map == segment["id"], dtype=np.uint8))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": segment["category_id"],
                        "iscrowd": segment["iscrowd"],
                        "area": segment["area"],
                        "bbox": segment["bbox"],
                        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
                    }
                )
    infos = [
        {"id": i, "file_name": f"{i}.jpg", "height": m.shape[0], "width": m.shape[1]}
        for i, (m, _) in enumerate(images, start=1)
    ]
    path.write_text(json.dumps({"images": infos, "annotations": annotations, "categories": CATEGORIES[:2]}))
    return path


@pytest.fixture
def nuclei_like(tmp_path, registered):
    """One image with 144 small things in a grid on stuff."""
    id_map = np.full((120, 120), 9999, dtype=np.int32)
    segments = [{"id": 9999, "category_id": 11, "iscrowd": 0, "area": 0, "bbox": [0, 0, 120, 120]}]
    for number in range(144):
        row, column = divmod(number, 12)
        id_map[10 * row : 10 * row + 6, 10 * column : 10 * column + 6] = number + 1
        box = [10 * column, 10 * row, 6, 6]
        segments.append({"id": number + 1, "category_id": 3, "iscrowd": 0, "area": 36, "bbox": box})
    segments[0]["area"] = int((id_map == 9999).sum())
    write_panoptic_set(tmp_path / "grid", [(id_map, segments)], [CATEGORIES[0], CATEGORIES[2]])
    name = registered("grid_of_things")
    root = tmp_path / "grid"
    register_panoptic(name, root / "images", root / "panoptic.json", root / "panoptic")
    masks = np.array([id_map == number for number in range(1, 145)])
    return name, instances_output(masks, [0] * 144, np.linspace(1, 0.5, 144).tolist())


@pytest.mark.parametrize("seed", [1, 2])
def test_equals_detectron2_on_a_coco_json(small_set, tmp_path, registered, seed):
    """The ground truth made in memory is the json's, and the measures at 100 detections are Detectron2's."""
    name, _, images = small_set
    outputs = detect(name, images, seed)
    other = registered("same_as_json")
    DatasetCatalog.register(other, lambda: DatasetCatalog.get(name))
    MetadataCatalog.get(other).set(
        thing_classes=["disc", "ring"],
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
        json_file=str(coco_json(name, images, tmp_path / "instances.json")),
    )
    expected = run(Detectron2COCOEvaluator(other, ("bbox", "segm"), use_fast_impl=False), name, copy.deepcopy(outputs))
    for dataset in (name, other):
        result = run(COCOEvaluator(dataset), name, outputs)
        assert list(result) == ["bbox", "segm"]
        for task in result:
            assert result[task] == pytest.approx(expected[task], nan_ok=True, abs=1e-9)
    assert result["segm"]["AP50"] > 0 and result["segm"]["AP-disc"] >= 0


def test_json_of_a_panoptic_map_is_that_of_pycocotools(small_set, tmp_path):
    name, _, images = small_set
    written = json.loads(coco_json(name, images, tmp_path / "instances.json").read_text())["annotations"]
    truth = PanopticGroundTruth(name)
    made = [a for image_id in range(1, 6) for a in panoptic_to_coco(truth, image_id)[1]]
    assert made == [{key: value for key, value in annotation.items() if key != "id"} for annotation in written]


@pytest.mark.parametrize(("limit", "expected"), [(5, 5 / 144), (100, 100 / 144), (144, 1), (400, 1)])
def test_detection_limit(nuclei_like, limit, expected):
    name, output = nuclei_like
    result = run(COCOEvaluator(name, max_dets_per_image=limit), name, [output])
    for task in ("bbox", "segm"):
        # Interpolated at 101 recalls, of which those up to the limit's recall are reached with precision 1.
        reached = (math.floor(100 * expected) + 1) / 101
        assert result[task]["AP"] == pytest.approx(100 * reached)
        assert result[task]["APs"] == result[task]["AP50"] == result[task]["AP"]
        assert math.isnan(result[task]["APl"]) and math.isnan(result[task]["APm"])


def test_image_with_more_instances_than_a_byte_counts(tmp_path, registered):
    id_map = np.arange(1, 301, dtype=np.int32).reshape(15, 20).repeat(2, axis=0)
    segments = [{"id": i, "category_id": 3, "iscrowd": 0, "area": 2, "bbox": [0, 0, 1, 2]} for i in range(1, 301)]
    write_panoptic_set(tmp_path, [(id_map, segments)], CATEGORIES[:1])
    name = registered("three_hundred_things")
    register_panoptic(name, tmp_path / "images", tmp_path / "panoptic.json", tmp_path / "panoptic")
    masks = np.array([id_map == segment["id"] for segment in segments])
    output = instances_output(masks, [0] * 300, np.linspace(1, 0.5, 300).tolist())
    assert run(COCOEvaluator(name, max_dets_per_image=400), name, [output])["segm"]["AP"] == pytest.approx(100)


def test_no_detection_is_zero_not_nan(small_set):
    name, _, images = small_set
    outputs = [instances_output(np.zeros((0, *image[0].shape), dtype=bool), [], []) for image in images]
    result = run(COCOEvaluator(name), name, outputs)
    assert result["bbox"]["AP"] == result["segm"]["AP"] == result["segm"]["AP50"] == 0
    assert -1 not in result["segm"].values()
    for output in outputs:
        output["instances"].remove("pred_masks")
    assert list(run(COCOEvaluator(name), name, outputs)) == ["bbox"]


def test_set_without_any_instance_gives_nan(tmp_path, registered):
    write_panoptic_set(tmp_path, [(np.zeros((8, 9), dtype=np.int32), [])], CATEGORIES)
    name = registered("no_instances")
    register_panoptic(name, tmp_path / "images", tmp_path / "panoptic.json", tmp_path / "panoptic")
    detection = instances_output(np.ones((1, 8, 9), dtype=bool), [1], [0.5])
    result = run(COCOEvaluator(name), name, [detection])
    assert all(math.isnan(result[task][key]) for task in ("bbox", "segm") for key in TOTALS)


def test_images_that_were_not_evaluated_count_as_missed(nuclei_like, small_set):
    name, _, images = small_set
    outputs = detect(name, images, 3)
    everything = run(COCOEvaluator(name), name, outputs)
    partial = COCOEvaluator(name)
    partial.process(inputs_of(name)[:2], outputs[:2])
    assert partial.evaluate()["segm"]["AP50"] < everything["segm"]["AP50"]
    assert COCOEvaluator(name).evaluate() == {}


def test_nothing_of_the_ground_truth_is_written_or_remembered(small_set, tmp_path):
    name, _, images = small_set
    out = tmp_path / "out"
    outputs = detect(name, images, 1)
    run(COCOEvaluator(name, output_dir=str(out)), name, outputs)
    assert [file.name for file in out.iterdir()] == ["coco_instances_results.json"]
    written = json.loads((out / "coco_instances_results.json").read_text())
    assert {detection["category_id"] for detection in written} <= {3, 7}
    assert not hasattr(MetadataCatalog.get(name), "json_file")


def test_dataset_of_plain_detectron2_dicts(registered):
    """Boxes and polygons in the dicts themselves: no json, no panoptic map."""
    polygon = [[5.0, 5.0, 25.0, 5.0, 25.0, 25.0, 5.0, 25.0]]
    annotation = {"bbox": [5, 5, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": polygon}
    record = {"file_name": "a.jpg", "image_id": "a", "height": 40, "width": 40, "annotations": [annotation]}
    name = registered("plain_dicts")
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["box"], evaluator_type="coco")
    mask = np.zeros((1, 40, 40), dtype=bool)
    mask[0, 5:25, 5:25] = True
    result = run(COCOEvaluator(name), name, [instances_output(mask, [0], [0.9])])
    assert result["bbox"]["AP"] == result["segm"]["AP"] == pytest.approx(100)


def test_json_with_stuff_categories(small_set, tmp_path, registered):
    name, _, images = small_set
    path = coco_json(name, images, tmp_path / "instances.json")
    content = json.loads(path.read_text())
    content["categories"] = CATEGORIES
    path.write_text(json.dumps(content))
    other = registered("json_with_stuff")
    MetadataCatalog.get(other).set(
        thing_classes=["disc", "ring"], thing_dataset_id_to_contiguous_id={3: 0, 7: 1}, json_file=str(path)
    )
    outputs = detect(name, images, 1)
    expected = run(COCOEvaluator(name), name, outputs)
    result = run(COCOEvaluator(other), name, outputs)
    for task in expected:
        assert result[task] == pytest.approx(expected[task], nan_ok=True)


def test_errors(small_set):
    name, _, images = small_set
    with pytest.raises(ValueError, match="keypoints"):
        COCOEvaluator(name, ("keypoints",))
    with pytest.raises(ValueError, match="max_dets_per_image is 0"):
        COCOEvaluator(name, max_dets_per_image=0)
    mask = np.ones((1, *images[0][0].shape), dtype=bool)
    with pytest.raises(ValueError, match="image 1: a detection has the class 2, but the dataset has 2 thing classes"):
        run(COCOEvaluator(name), name, [instances_output(mask, [2], [0.5])] * 5)


def test_model_without_instances_is_skipped(small_set, caplog):
    name, _, images = small_set
    with caplog.at_level("INFO", logger="convmask"):
        assert run(COCOEvaluator(name), name, [{"sem_seg": None}] * len(images)) == {}
    assert "The model gives no instances" in caplog.text
