from __future__ import annotations

import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image

import convmask.data  # noqa: F401
from convmask.data.errors import DatasetError
from convmask.data.semantic import register_semantic


def _write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


@pytest.fixture
def roots(tmp_path):
    for name in ("city/b", "a"):
        _write(tmp_path / "images" / f"{name}_leftImg8bit.JPG", np.zeros((3, 4, 3)))
        _write(tmp_path / "labels" / f"{name}_labelIds.png", [[0, 1, 7, 255], [26, 26, 0, 0], [1, 1, 1, 1]])
    _write(tmp_path / "images" / "c_leftImg8bit.JPG", np.zeros((3, 4, 3)))
    _write(tmp_path / "labels" / "a_color.png", np.zeros((3, 4)))
    return tmp_path / "images", tmp_path / "labels"


SUFFIXES = {"image_suffix": "_leftImg8bit.jpg", "label_suffix": "_labelIds.png"}


def test_files_are_paired_in_subfolders(roots, caplog):
    register_semantic("p3_semantic", *roots, ["road", "sky"], ignore_label=254, **SUFFIXES)
    with caplog.at_level(logging.WARNING):
        records = DatasetCatalog.get("p3_semantic")
    assert [record["image_id"] for record in records] == ["a", "city/b"]
    assert records[1] == {
        "file_name": str(roots[0] / "city" / "b_leftImg8bit.JPG"),
        "sem_seg_file_name": str(roots[1] / "city" / "b_labelIds.png"),
        "image_id": "city/b",
    }
    assert "3 pictures" in caplog.text
    metadata = MetadataCatalog.get("p3_semantic")
    assert metadata.stuff_classes == ["road", "sky"]
    assert (metadata.ignore_label, metadata.evaluator_type) == (254, "sem_seg")


def test_label_map_is_applied_when_a_file_is_opened(roots):
    register_semantic("p3_mapped", *roots, ["road", "car"], label_map={7: 0, 26: 1}, **SUFFIXES)
    path = DatasetCatalog.get("p3_mapped")[0]["sem_seg_file_name"]
    assert path == "label-map://p3_mapped/a_labelIds.png"
    assert PathManager.isfile(path)
    with PathManager.open(path, "rb") as file:
        labels = np.asarray(Image.open(file))
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[255, 255, 0, 255], [1, 1, 255, 255], [255, 255, 255, 255]]


def test_detectron2s_evaluator_reads_mapped_labels(roots):
    import torch
    from detectron2.evaluation import SemSegEvaluator

    register_semantic("p3_mapped", *roots, ["road", "car"], label_map={7: 0, 26: 1}, **SUFFIXES)
    evaluator = SemSegEvaluator("p3_mapped", distributed=False)
    evaluator.reset()
    logits = torch.zeros(2, 3, 4)
    logits[1, 1] = 1
    for record in DatasetCatalog.get("p3_mapped"):
        evaluator.process([record], [{"sem_seg": logits}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100


def test_wrong_files_and_arguments_are_errors(roots, tmp_path):
    with pytest.raises(DatasetError, match="3 colours for 1 classes"):
        register_semantic("p3_a", *roots, ["road"], colors=[[0, 0, 0]] * 3)
    with pytest.raises(DatasetError, match="classes is not a list"):
        register_semantic("p3_a", *roots, "road")
    with pytest.raises(DatasetError, match="70000"):
        register_semantic("p3_a", *roots, ["road"], label_map={70000: 0})
    register_semantic("p3_b", *roots, ["road"], label_suffix="_trainIds.png")
    with pytest.raises(DatasetError, match=r"found 3 pictures .* and 0 label files \(\*_trainIds.png\)"):
        DatasetCatalog.get("p3_b")
    register_semantic("p3_c", tmp_path / "absent", roots[1], ["road"])
    with pytest.raises(DatasetError, match=r"no folder .*absent"):
        DatasetCatalog.get("p3_c")
    (roots[1] / "a_labelIds.png").write_bytes(b"broken")
    register_semantic("p3_d", *roots, ["road"], label_map={7: 0}, **SUFFIXES)
    with pytest.raises(DatasetError, match=r"a_labelIds\.png"):
        PathManager.open(DatasetCatalog.get("p3_d")[0]["sem_seg_file_name"], "rb")
    with pytest.raises(DatasetError, match="no label map 'nobody'"):
        PathManager.open("label-map://nobody/a.png", "rb")
