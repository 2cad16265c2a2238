from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator
from PIL import Image

from convmask.data.errors import DatasetError
from convmask.evaluation import SemSegEvaluator
from convmask.evaluation.semantic import semantic_metrics

from .model_outputs import inputs_of

SEPARATED = {3: 0, 7: 0, 11: 1, 20: 2}
ALL = {3: 0, 7: 1, 11: 2, 20: 3}


def run(evaluator, inputs, outputs):
    evaluator.reset()
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def scores_of(labels, num_classes):
    """(C, H, W) scores whose highest is that of the label."""
    return {"sem_seg": torch.nn.functional.one_hot(torch.as_tensor(labels), num_classes).permute(2, 0, 1).float()}


def label_map(id_map, segments, labels, ignore_crowd):
    result = np.full(id_map.shape, 255, dtype=np.uint8)
    for segment in segments:
        crowd_thing = segment["iscrowd"] and segment["category_id"] in (3, 7)
        result[id_map == segment["id"]] = 255 if crowd_thing and ignore_crowd else labels[segment["category_id"]]
    return result


@pytest.mark.parametrize(("layout", "labels"), [("separated", SEPARATED), ("all", ALL)])
def test_equals_detectron2_on_the_label_files(small_set, tmp_path, registered, layout, labels):
    name, _, images = small_set
    classes = ["things", "sky", "wall"] if layout == "separated" else ["disc", "ring", "sky", "wall"]
    rng = np.random.default_rng(0)
    records, outputs = [], []
    for number, (record, image) in enumerate(zip(DatasetCatalog.get(name), images, strict=True)):
        truth = label_map(*image, labels, ignore_crowd=layout == "all")
        Image.fromarray(truth).save(tmp_path / f"{number}.png")
        records.append({**record, "sem_seg_file_name": str(tmp_path / f"{number}.png")})
        noise = rng.integers(0, len(classes), truth.shape)
        predicted = np.where((rng.random(truth.shape) < 0.6) & (truth != 255), truth, noise)
        outputs.append(scores_of(predicted, len(classes)))
    other = registered(f"label_files_{layout}")
    DatasetCatalog.register(other, lambda: records)
    MetadataCatalog.get(other).set(stuff_classes=classes, ignore_label=255, evaluator_type="sem_seg")
    expected = run(Detectron2SemSegEvaluator(other), inputs_of(name), outputs)["sem_seg"]
    from_maps = run(SemSegEvaluator(name, layout=layout), inputs_of(name), outputs)["sem_seg"]
    from_files = run(SemSegEvaluator(other), inputs_of(other), outputs)["sem_seg"]
    assert from_maps == from_files
    # Detectron2 on GitHub adds boundary IoU.
    assert from_maps == pytest.approx({key: expected[key] for key in from_maps}, nan_ok=True)
    assert set(expected) - set(from_maps) == {key for key in expected if "oundary" in key or "B-Iou" in key}
    assert from_maps["mIoU"] > 20


def test_class_that_does_not_occur_is_left_out():
    confusion = np.array([[6, 0, 0, 5], [2, 0, 0, 1], [1, 0, 3, 0]])  # class 1 is predicted only
    result = semantic_metrics(confusion, ["a", "b", "c"])
    assert result["mIoU"] == pytest.approx(100 * (6 / 9 + 3 / 4) / 2)
    assert result["fwIoU"] == pytest.approx(100 * (6 / 9 * 9 + 3 / 4 * 3) / 12)
    assert result["mACC"] == pytest.approx(100 * (6 / 9 + 1) / 2)
    assert result["pACC"] == pytest.approx(100 * 9 / 12)
    assert np.isnan(result["IoU-b"]) and np.isnan(result["ACC-b"])
    assert all(np.isnan(value) for value in semantic_metrics(np.zeros((2, 3), dtype=int), ["a", "b"]).values())


def test_wrong_prediction_names_the_image(small_set):
    name, _, _ = small_set
    for shape in ((3, 39, 50), (4, 40, 50)):
        with pytest.raises(ValueError, match=r"image1\.jpg.* are \(3, 40, 50\)"):
            run(SemSegEvaluator(name), inputs_of(name)[:1], [{"sem_seg": torch.zeros(shape)}])


def test_label_that_is_no_class_names_the_file(tmp_path, registered):
    Image.fromarray(np.full((4, 5), 9, dtype=np.uint8)).save(tmp_path / "labels.png")
    name = registered("wrong_label")
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "labels.png")}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(stuff_classes=["a", "b"], ignore_label=255)
    with pytest.raises(DatasetError, match=r"labels\.png.*label 9.*2 classes"):
        run(SemSegEvaluator(name), [record], [{"sem_seg": torch.zeros(2, 4, 5)}])


@pytest.mark.parametrize("kind", ["separated", "standard"])
def test_detectron2_panoptic_dataset_without_label_files(small_set, registered, kind):
    name, root, images = small_set
    separated = kind == "separated"
    classes = ["things", "sky", "wall"] if separated else ["disc", "ring", "sky", "wall"]
    other = registered(f"detectron2_{kind}")
    records = [{"file_name": r["file_name"], "image_id": r["image_id"]} for r in DatasetCatalog.get(name)]
    DatasetCatalog.register(other, lambda: records)
    MetadataCatalog.get(other).set(
        thing_classes=["disc", "ring"],
        stuff_classes=classes,
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
        stuff_dataset_id_to_contiguous_id={0: 0, 11: 1, 20: 2} if separated else ALL,
        panoptic_json=str(root / "panoptic.json"),
        panoptic_root=str(root / "panoptic"),
        ignore_label=255,
    )
    rng = np.random.default_rng(0)
    outputs = [scores_of(rng.integers(0, len(classes), image[0].shape), len(classes)) for image in images]
    content = json.loads((root / "panoptic.json").read_text())
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = 0
    (root / "panoptic.json").write_text(json.dumps(content))
    expected = run(SemSegEvaluator(name, layout="separated" if separated else "all"), inputs_of(name), outputs)
    assert run(SemSegEvaluator(other), inputs_of(other), outputs) == expected


def test_model_without_semantic_output_is_skipped(small_set):
    name, _, images = small_set
    assert run(SemSegEvaluator(name), inputs_of(name), [{"instances": None}] * len(images)) == {}
    with pytest.raises(ValueError, match=r"image2\.jpg.*no sem_seg"):
        run(SemSegEvaluator(name), inputs_of(name), [{"sem_seg": torch.zeros(3, 40, 50)}, {}])
