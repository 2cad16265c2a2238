from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator
from panopticapi.evaluation import pq_compute
from panopticapi.utils import rgb2id
from PIL import Image

from convmask.data.errors import DatasetError
from convmask.data.panoptic import register_panoptic
from convmask.evaluation import PanopticEvaluator
from convmask.evaluation.ground_truth import PanopticGroundTruth
from convmask.evaluation.panoptic_dump import PanopticDump

from .model_outputs import inputs_of, panoptic_output, perturbed_outputs
from .oracle import CATEGORIES

GROUPS = [(f"{measure}{suffix}") for measure in ("PQ", "SQ", "RQ") for suffix in ("", "_th", "_st")]


def run(evaluator, name, outputs):
    evaluator.reset()
    for given, output in zip(inputs_of(name), outputs, strict=True):
        evaluator.process([given], [output])
    return evaluator.evaluate()


def pq_of_files(truth_json, truth_folder, prediction_json):
    with contextlib.redirect_stdout(io.StringIO()):
        return pq_compute(str(truth_json), str(prediction_json), gt_folder=str(truth_folder))


@pytest.mark.parametrize("cache", [False, True])
def test_equals_detectron2_evaluator(small_set, cache):
    name, _, images = small_set
    outputs, _ = perturbed_outputs(name, images, seed=1)
    theirs = COCOPanopticEvaluator(name)
    expected = run(theirs, name, copy.deepcopy(outputs))["panoptic_seg"]
    evaluator = PanopticEvaluator(name, cache_ground_truth=cache)
    for _ in range(2):
        result = run(evaluator, name, outputs)["panoptic_seg"]
        assert {key: result[key] for key in GROUPS} == pytest.approx(expected, abs=1e-9)
    assert 0 < result["PQ"] < 100


def test_dump_is_what_panopticapi_reads(small_set, tmp_path):
    name, root, images = small_set
    outputs, predictions = perturbed_outputs(name, images, seed=2)
    evaluator = PanopticEvaluator(name, str(tmp_path / "out"), dump=True)
    result = run(evaluator, name, outputs)["panoptic_seg"]
    json_file = tmp_path / "out" / "panoptic_predictions.json"
    oracle = pq_of_files(root / "panoptic.json", root / "panoptic", json_file)
    for title, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for measure in ("PQ", "SQ", "RQ"):
            assert result[measure + suffix] == pytest.approx(100 * oracle[title][measure.lower()], abs=1e-9)
    for category in CATEGORIES:
        pq = oracle["per_class"][category["id"]]["pq"]
        assert result[f"PQ-{category['name']}"] == pytest.approx(100 * pq, abs=1e-9)
    annotation = json.loads(json_file.read_text())["annotations"][2]
    with Image.open(tmp_path / "out" / "panoptic_predictions" / annotation["file_name"]) as png:
        np.testing.assert_array_equal(rgb2id(np.array(png)), predictions[2][0])
    assert not [file for file in os.listdir(tmp_path / "out" / "panoptic_predictions") if file.endswith(".tmp")]
    evaluator.reset()
    assert not json_file.exists()


def test_images_of_one_name_get_files_of_their_own(small_set, tmp_path, registered):
    name, _, images = small_set
    records = copy.deepcopy(DatasetCatalog.get(name))
    for record in records:
        record["file_name"] = f"folder{record['image_id']}/frame.jpg"
    other = registered("same_file_names")
    DatasetCatalog.register(other, lambda: records)
    MetadataCatalog.get(other).set(**{k: v for k, v in MetadataCatalog.get(name).as_dict().items() if k != "name"})
    outputs, _ = perturbed_outputs(name, images, seed=2)
    run(PanopticEvaluator(other, str(tmp_path), dump=True), other, outputs)
    assert len(list((tmp_path / "panoptic_predictions").glob("*.png"))) == len(images)


def test_ids_of_text_give_names_of_their_own(tmp_path):
    records = {name: {"file_name": f"{name}.jpg"} for name in ("a/1", "b/1", "b/2")}
    dump = PanopticDump(str(tmp_path), records)
    dump.start(remove_json=True)
    names = [dump.write_image(name, np.zeros((2, 2), dtype=np.int32), [])["file_name"] for name in records]
    assert len(set(names)) == 3
    assert {path.name for path in (tmp_path / "panoptic_predictions").iterdir()} == set(names)
    records = {2: {"file_name": "x/a.jpg"}, 3: {"file_name": "y/a.jpg"}, 4: {"file_name": "a_3.jpg"}}
    with pytest.raises(ValueError, match="both be named a_3"):
        PanopticDump(str(tmp_path), records)


def test_dump_refuses_ids_beyond_24_bits_and_a_missing_folder(small_set, tmp_path):
    name, _, images = small_set
    with pytest.raises(ValueError, match="output_dir"):
        PanopticEvaluator(name, dump=True)
    output = {"panoptic_seg": (torch.full(images[0][0].shape, 2**24), [{"id": 2**24, "category_id": 3}])}
    with pytest.raises(ValueError, match="16777216"):
        PanopticEvaluator(name, str(tmp_path), dump=True).process(inputs_of(name)[:1], [output])
    assert not list((tmp_path / "panoptic_predictions").iterdir())


def test_map_alone_holds_labels_of_the_layout_all(small_set):
    name, _, images = small_set
    outputs, predictions = perturbed_outputs(name, images, seed=4)
    expected = run(PanopticEvaluator(name), name, outputs)
    labels = {3: 0, 7: 1, 11: 2, 20: 3}
    encoded = []
    for id_map, segments in predictions:
        label_map = np.full(id_map.shape, -1, dtype=np.int32)
        for number, segment in enumerate(segments):
            label_map[id_map == segment["id"]] = 1000 * labels[segment["category_id"]] + number
        encoded.append({"panoptic_seg": (torch.as_tensor(label_map), None)})
    assert run(PanopticEvaluator(name), name, encoded) == expected
    encoded[0]["panoptic_seg"][0][:] = 7000
    with pytest.raises(ValueError, match=r"image 1.*7000.*no class 7"):
        run(PanopticEvaluator(name), name, encoded)


def test_model_that_predicts_nothing_misses_everything(small_set):
    name, _, images = small_set
    outputs = [{"panoptic_seg": (torch.zeros(image[0].shape, dtype=torch.int32), [])} for image in images]
    result = run(PanopticEvaluator(name), name, outputs)["panoptic_seg"]
    assert result["PQ"] == result["SQ"] == result["RQ"] == 0


def test_set_without_stuff_and_without_segments_gives_nan(tmp_path, registered):
    from .oracle import write_panoptic_set

    things = CATEGORIES[:2]
    segments = [{"id": 5, "category_id": 3, "iscrowd": 0, "area": 12, "bbox": [0, 0, 4, 3]}]
    write_panoptic_set(tmp_path, [(np.full((3, 4), 5), segments), (np.zeros((3, 4), dtype=int), [])], things)
    name = registered("things_only")
    register_panoptic(name, tmp_path / "images", tmp_path / "panoptic.json", tmp_path / "panoptic")
    perfect = [panoptic_output(name, np.full((3, 4), 5), segments), panoptic_output(name, np.zeros((3, 4)), [])]
    result = run(PanopticEvaluator(name), name, perfect)["panoptic_seg"]
    assert result["PQ"] == result["PQ_th"] == result["PQ-disc"] == 100
    assert np.isnan(result["PQ_st"]) and np.isnan(result["PQ-ring"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, segments: (ids[:-1], segments), "image 1: the prediction has 39 x 50 pixels, the ground truth 40"),
        (lambda ids, segments: (ids + 1, segments), "image 1: the map holds the id"),
        (lambda ids, segments: (ids, [*segments, {**segments[0], "id": 9999}]), "image 1: segment 9999 is listed but"),
        (lambda ids, segments: (ids, [{**segments[0], "category_id": 40}]), "image 1: segment .* category_id 40"),
        (lambda ids, segments: (ids.float(), segments), "image 1: the map is float32"),
    ],
)
def test_wrong_prediction_is_an_error_that_names_the_image(small_set, change, message):
    name, _, images = small_set
    output = panoptic_output(name, *images[0])
    with pytest.raises(ValueError, match=message):
        PanopticEvaluator(name).process(inputs_of(name), [{"panoptic_seg": change(*output["panoptic_seg"])}])


def test_every_image_is_evaluated_once(small_set):
    name, _, images = small_set
    outputs = [panoptic_output(name, *image) for image in images]
    evaluator = PanopticEvaluator(name)
    evaluator.process(inputs_of(name), outputs)
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] > 0
    evaluator.process(inputs_of(name)[2:3], outputs[2:3])
    with pytest.raises(ValueError, match="image 3 was evaluated more than once"):
        evaluator.evaluate()
    evaluator.reset()
    evaluator.process(inputs_of(name)[:3], outputs[:3])
    with pytest.raises(ValueError, match="no prediction for 2 of 5 images of 'small_panoptic_set', such as image 4"):
        evaluator.evaluate()
    with pytest.raises(ValueError, match="image 77 is not in dataset"):
        evaluator.process([{"image_id": 77}], outputs[:1])


def test_model_without_panoptic_output_is_skipped_with_one_line(small_set, caplog):
    name, _, images = small_set
    evaluator = PanopticEvaluator(name)
    with caplog.at_level(logging.INFO, logger="convmask"):
        assert run(evaluator, name, [{"sem_seg": None}] * len(images)) == {}
    assert [record.message for record in caplog.records if "panoptic_seg" in record.message] == [
        "The model gives no panoptic_seg: panoptic quality is not evaluated."
    ]
    evaluator.reset()
    evaluator.process(inputs_of(name)[:1], [panoptic_output(name, *images[0])])
    with pytest.raises(ValueError, match="image 2: the model gave no panoptic_seg"):
        evaluator.process(inputs_of(name)[1:2], [{}])


def test_contradictory_ground_truth_names_file_and_image(small_set):
    name, root, images = small_set
    content = json.loads((root / "panoptic.json").read_text())
    content["annotations"][0]["segments_info"] *= 2
    (root / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"image1\.png: image 1: segments_info: the segment id \d+ is listed more"):
        PanopticEvaluator(name).process(inputs_of(name), [panoptic_output(name, *images[0])])


def test_cached_ground_truth_is_read_once(small_set, monkeypatch):
    from convmask.evaluation import ground_truth as module

    name, _, images = small_set
    read: list[str] = []
    original = module.read_panoptic_map
    monkeypatch.setattr(module, "read_panoptic_map", lambda path: (read.append(path), original(path))[1])
    truth = PanopticGroundTruth(name, cache=True)
    outputs = [panoptic_output(name, *image) for image in images]
    for _ in range(2):
        run(PanopticEvaluator(name, ground_truth=truth), name, outputs)
    assert len(read) == len(set(read)) == len(images)


def test_detectron2_dataset_without_panoptic_dicts(small_set, registered):
    """A dataset as Detectron2's "separated" COCO: dicts without panoptic fields, panoptic_json in the metadata."""
    name, root, images = small_set
    records = [{"file_name": r["file_name"], "image_id": r["image_id"]} for r in DatasetCatalog.get(name)]
    other = registered("detectron2_separated")
    DatasetCatalog.register(other, lambda: records)
    MetadataCatalog.get(other).set(
        thing_classes=["disc", "ring"],
        stuff_classes=["things", "sky", "wall"],
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
        stuff_dataset_id_to_contiguous_id={0: 0, 11: 1, 20: 2},
        panoptic_json=str(root / "panoptic.json"),
        panoptic_root=str(root / "panoptic"),
        evaluator_type="coco_panoptic_seg",
    )
    outputs, _ = perturbed_outputs(name, images, seed=5)
    assert run(PanopticEvaluator(other), other, outputs) == run(PanopticEvaluator(name), name, outputs)
    without_isthing = copy.deepcopy(outputs)
    for output, (_, segments) in zip(without_isthing, perturbed_outputs(name, images, seed=5)[1], strict=True):
        output["panoptic_seg"] = (output["panoptic_seg"][0], segments)
    assert run(PanopticEvaluator(other), other, without_isthing) == run(PanopticEvaluator(name), name, outputs)


def test_standard_dataset_of_detectron2_numbers_all_categories_together(small_set, registered):
    from detectron2.data.datasets.coco_panoptic import register_coco_panoptic

    name, root, images = small_set
    other = registered("detectron2_standard")
    classes = [category["name"] for category in CATEGORIES]
    metadata = {
        "thing_classes": classes,
        "stuff_classes": classes,
        "thing_dataset_id_to_contiguous_id": {3: 0, 7: 1},
        "stuff_dataset_id_to_contiguous_id": {3: 0, 7: 1, 11: 2, 20: 3},
    }
    register_coco_panoptic(other, metadata, str(root / "images"), str(root / "panoptic"), str(root / "panoptic.json"))
    _, predictions = perturbed_outputs(name, images, seed=6)
    outputs = [panoptic_output(other, *prediction) for prediction in predictions]
    expected = run(COCOPanopticEvaluator(other), other, copy.deepcopy(outputs))["panoptic_seg"]
    result = run(PanopticEvaluator(other), other, outputs)["panoptic_seg"]
    assert {key: result[key] for key in GROUPS} == pytest.approx(expected, abs=1e-9)
