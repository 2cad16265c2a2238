from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from convmask.analysis import AnalysedDataset, SavedResults, analyse, compare
from convmask.analysis.page import write_report
from convmask.data.errors import DatasetError
from convmask.data.images import read_panoptic_map
from convmask.evaluation.panoptic_quality import image_quality

from .conftest import FLAWED, id_map


def analysis_of(folder: Path, dataset: AnalysedDataset, **options: Any) -> Any:
    return analyse(SavedResults.read(str(folder), dataset), **options)


def test_a_perfect_run(perfect: Path, dataset: AnalysedDataset) -> None:
    kinds = analysis_of(perfect, dataset).kinds
    assert list(kinds) == ["panoptic", "instances"]
    for analysis in kinds.values():
        assert all(value == pytest.approx(100) for value in analysis.totals.values())
        assert all(row[analysis.measure] == pytest.approx(100) for row in analysis.by_class)
        assert {score.quality for score in analysis.images.values()} == {1.0}
        off = analysis.confusion.counts.copy()
        np.fill_diagonal(off, 0)
        assert not off.any()
    assert [row["objects"] for row in kinds["instances"].by_class] == [3, 1]
    assert kinds["instances"].threshold == pytest.approx(0.9)


def test_a_flawed_run(flawed: Path, dataset: AnalysedDataset) -> None:
    kinds = analysis_of(flawed, dataset, score_threshold=0.5).kinds
    instances = kinds["instances"]
    # rows: cat, dog, nothing
    assert instances.confusion.counts.tolist() == [[2, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert instances.confusion.most_frequent() == [("d<o>g", "cat", 1)]
    assert instances.images[1].confused == 1 and instances.images[2].missed == instances.images[2].false == 1
    assert instances.images[3].quality == 1
    assert instances.worst_images(2) == [2, 1]  # of one quality, but two errors
    dog = instances.by_class[1]
    assert dog["AP"] == 0 and dog["APs"] == 0 and math.isnan(dog["APl"])
    assert {row["name"]: row["objects"] for row in instances.by_size}["small"] == 4
    high = analysis_of(flawed, dataset, score_threshold=0.95).kinds["instances"]
    assert high.confusion.counts[:, :2].sum() == 0


def test_panoptic_numbers_are_those_of_the_evaluation(flawed: Path, dataset: AnalysedDataset) -> None:
    analysis = analysis_of(flawed, dataset).kinds["panoptic"]
    total = None
    for image_id, things in FLAWED.items():
        truth = dataset.panoptic.records[image_id]
        predicted = id_map([thing[:3] for thing in things])
        counts = image_quality(
            read_panoptic_map(truth["pan_seg_file_name"]), truth["segments_info"], *predicted, [3, 7, 11]
        )
        total = counts if total is None else total.__iadd__(counts)
    assert total is not None
    assert [row["PQ"] for row in analysis.by_class] == pytest.approx((100 * total.per_category()["PQ"]).tolist())
    assert [row["TP"] for row in analysis.by_class] == total.true_positives.tolist()
    # every true segment is in one quarter, and in one of COCO's sizes
    for names in (("small", "medium", "large"), ("Q1", "Q2", "Q3", "Q4")):
        assert sum(row["objects"] for row in analysis.by_size if row["name"] in names) == 7


def test_what_got_better_and_worse(flawed: Path, perfect: Path, dataset: AnalysedDataset) -> None:
    before, after = (analysis_of(folder, dataset) for folder in (flawed, perfect))
    for change in compare(before, after).values():
        assert change.changed_images(10) == sorted(
            (image for image in (1, 2)), key=lambda image: -abs(change.images[image])
        )
        assert all(change.images[image] > 0 for image in (1, 2)) and change.images[3] == 0
        assert next(x for x in change.by_class if x.name == "d<o>g").difference == pytest.approx(100)
    back = compare(after, before)
    assert back["instances"].images[1] < 0


def test_runs_without_a_common_kind_are_refused(flawed: Path, perfect: Path, dataset: AnalysedDataset) -> None:
    (flawed / "inference" / "panoptic_predictions.json").unlink()
    (perfect / "inference" / "coco_instances_results.json").unlink()
    with pytest.raises(DatasetError, match="no kind of results in common: instances and panoptic"):
        compare(analysis_of(flawed, dataset), analysis_of(perfect, dataset))


def test_a_report_of_two_runs(flawed: Path, perfect: Path, dataset: AnalysedDataset, tmp_path: Path) -> None:
    runs = [analysis_of(folder, dataset) for folder in (flawed, perfect)]
    page = Path(write_report(str(tmp_path / "out"), runs, ["old", "new"], compare(*runs), num_pictures=1))
    text = page.read_text()
    assert "http" not in text and "d<o>g" not in text and "d&lt;o&gt;g" in text
    pictures = sorted((tmp_path / "out" / "pictures").iterdir())
    assert len(pictures) == 2 and all(f"pictures/{p.name}" in text for p in pictures)
    with Image.open(pictures[0]) as picture:
        assert picture.width > 5 * 480
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(content["runs"]) == {"old", "new"} and content["comparison"]["panoptic"]["measure"] == "PQ"


def remove_masks(folder: Path) -> None:
    path = folder / "inference" / "coco_instances_results.json"
    entries = json.loads(path.read_text())
    for entry in entries:
        del entry["segmentation"]
    path.write_text(json.dumps(entries))


def test_masks_are_not_compared_with_boxes(flawed: Path, perfect: Path, dataset: AnalysedDataset) -> None:
    remove_masks(flawed)
    boxes, masks = (analysis_of(folder, dataset) for folder in (flawed, perfect))
    titles = [run.kinds["instances"].title for run in (boxes, masks)]
    assert titles == ["instances (boxes)", "instances (masks)"]
    with pytest.raises(
        DatasetError, match=r"flawed/inference and .*perfect/inference cannot be compared: .* \(boxes\)"
    ):
        compare(boxes, masks)
    # nothing found is the same by either
    (perfect / "inference" / "coco_instances_results.json").write_text("[]")
    nothing = analysis_of(perfect, dataset)
    for change in (compare(boxes, nothing), compare(nothing, boxes)):
        assert change["instances"].title == "instances (boxes)"
        assert change["instances"].as_json()["task"] == "bbox"


@pytest.mark.parametrize("box", [[0, 0, 5, 10**400], [0, 0, 5, float("inf")], [float("nan"), 0, 5, 5], [0, 0, True, 5]])
def test_boxes_that_are_no_numbers_are_named(flawed: Path, dataset: AnalysedDataset, box: Any) -> None:
    remove_masks(flawed)
    change_detection(flawed, bbox=box)
    with pytest.raises(DatasetError, match="entry 1 has neither a segmentation nor a bbox of four numbers"):
        SavedResults.read(str(flawed), dataset)


def test_boxes_without_masks(flawed: Path, dataset: AnalysedDataset) -> None:
    remove_masks(flawed)
    analysis = analysis_of(flawed, dataset, score_threshold=0.5).kinds["instances"]
    assert analysis.confusion.counts.tolist() == [[2, 0, 1], [1, 0, 0], [0, 1, 0]]


def change_detection(folder: Path, **values: Any) -> None:
    path = folder / "inference" / "coco_instances_results.json"
    entries = json.loads(path.read_text())
    entries[1].update(values)
    path.write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_id": 99}, r"results\.json: entry 1 names the image 99, which is not in"),
        ({"image_id": [1]}, r"entry 1 names the image \[1\]"),
        ({"category_id": 11}, r"entry 1 has the category 11, which is no thing"),
        ({"score": float("nan")}, r"entry 1 has the score nan"),
        ({"score": 10**400}, r"entry 1 has the score 1000.*, which is no number below 1e\+15"),
        ({"score": "high"}, r"entry 1 has the score 'high'"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, r"entry 1 has a segmentation that is no run-length code"),
        ({"segmentation": {"size": [40, 60], "counts": "zz"}}, r"entry 1 has a wrong segmentation"),
        ({"segmentation": {"size": [4, 6], "counts": [24]}}, r"entry 1 has a wrong segmentation: RLE size"),
    ],
)
def test_bad_detections_are_named(flawed: Path, dataset: AnalysedDataset, values: Any, message: str) -> None:
    change_detection(flawed, **values)
    with pytest.raises(DatasetError, match=message):
        SavedResults.read(str(flawed), dataset)


@pytest.mark.parametrize("content", ["", "[1]", "{}", "[" * 3000])
def test_files_that_hold_no_detections(flawed: Path, dataset: AnalysedDataset, content: str) -> None:
    (flawed / "inference" / "coco_instances_results.json").write_text(content)
    with pytest.raises(DatasetError, match=r"coco_instances_results\.json: "):
        SavedResults.read(str(flawed), dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(), r"predictions\.json: has no prediction for image 3"),
        (lambda a: a.append(a[0]), r"entry 3 of annotations is a second one of image 1"),
        (lambda a: a[1].update(image_id=9), r"entry 1 of annotations names the image 9"),
        (lambda a: a[1].update(file_name="../2.png"), r"entry 1 of annotations has the file_name '\.\./2\.png'"),
        (lambda a: a[1].update(segments_info=[{"id": 1}]), r"entry 1 of annotations has a segment without"),
        (lambda a: a[1]["segments_info"][0].update(id=10**30), r"entry 1 of annotations has the segment id 1000"),
        (lambda a: a[1]["segments_info"][0].update(id=-1), r"entry 1 of annotations has the segment id -1"),
        (lambda a: a[1]["segments_info"][0].update(category_id=5), r"entry 1 of annotations has the category 5"),
    ],
)
def test_bad_panoptic_files_are_named(flawed: Path, dataset: AnalysedDataset, change: Any, message: str) -> None:
    path = flawed / "inference" / "panoptic_predictions.json"
    content = json.loads(path.read_text())
    change(content["annotations"])
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        SavedResults.read(str(flawed), dataset)


def test_bad_maps_are_named(flawed: Path, dataset: AnalysedDataset) -> None:
    png = flawed / "inference" / "panoptic_predictions" / "2.png"
    results = SavedResults.read(str(flawed), dataset)
    Image.fromarray(np.full((4, 6, 3), (9, 0, 0), np.uint8)).save(png)
    with pytest.raises(DatasetError, match=r"2\.png: "):
        analyse(results)
    png.write_bytes(b"\x89PNG")
    with pytest.raises(DatasetError, match=r"2\.png"):
        analyse(results)


def test_a_folder_without_results(tmp_path: Path, dataset: AnalysedDataset) -> None:
    with pytest.raises(DatasetError, match=r"holds neither coco_instances_results\.json nor"):
        SavedResults.read(str(tmp_path), dataset)
    with pytest.raises(DatasetError, match="no dataset named 'none'"):
        AnalysedDataset("none")


def test_an_instance_set_whose_images_have_no_size(
    dataset: AnalysedDataset, flawed: Path, tmp_path: Path, registered: Any
) -> None:
    content = copy.deepcopy(dataset.instances.dataset)
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.png"
        del image["height"], image["width"]
    boxes_alone = copy.deepcopy(content)
    for entry in boxes_alone["annotations"]:
        del entry["segmentation"]
    for name, part in (("masks", content), ("boxes", boxes_alone), ("nothing", {"images": [], "categories": []})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(part, default=lambda value: value.decode()))
        records = [
            {"file_name": str(tmp_path / "set" / "images" / f"{image['id']}.png"), "image_id": image["id"]}
            for image in part["images"]
        ]
        DatasetCatalog.register(registered(f"without_size_{name}"), lambda records=records: records)
        MetadataCatalog.get(f"without_size_{name}").json_file = str(path)
        mapping = {3: 0, 7: 1}
        MetadataCatalog.get(f"without_size_{name}").thing_dataset_id_to_contiguous_id = mapping
    (flawed / "inference" / "panoptic_predictions.json").unlink()
    for name in ("masks", "boxes"):
        found = analysis_of(flawed, AnalysedDataset(f"without_size_{name}"), score_threshold=0.5).kinds["instances"]
        assert found.confusion.counts.tolist() == [[2, 0, 1], [1, 0, 0], [0, 1, 0]]
    with pytest.raises(DatasetError, match="'without_size_nothing' has no annotations"):
        analysis_of(flawed, AnalysedDataset("without_size_nothing"))
