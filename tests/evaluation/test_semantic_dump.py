"""Semantic predictions on disk, beside Detectron2's own encoding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator

from convmask.config import get_cfg
from convmask.evaluation import build_evaluator

from .model_outputs import inputs_of


def detectron2_entries(labels, file_name, id_of_label):
    encoder = Detectron2SemSegEvaluator.__new__(Detectron2SemSegEvaluator)  # its constructor wants label files
    encoder._contiguous_id_to_dataset_id, encoder._dataset_name = id_of_label, "small"
    return encoder.encode_json_sem_seg(labels, file_name)


@pytest.mark.parametrize("layout", ["separated", "all"])
def test_equals_detectron2s_file(small_set, tmp_path, layout):
    name, _, images = small_set
    categories = MetadataCatalog.get(name).categories
    things = {
        label: identity for identity, label in MetadataCatalog.get(name).stuff_dataset_id_to_contiguous_id.items()
    }
    id_of_label = things if layout == "separated" else dict(enumerate(categories.all_order))
    cfg = get_cfg()
    cfg.TEST.DUMP_SEMANTIC, cfg.INPUT.SEMANTIC_LAYOUT = True, layout
    evaluator = build_evaluator(cfg, name, str(tmp_path))
    evaluator.reset()
    torch.manual_seed(0)
    expected = []
    for given, (id_map, _) in zip(inputs_of(name), images, strict=True):
        sem_seg = torch.randn(categories.num_semantic(layout), *id_map.shape)
        evaluator.process([given], [{"sem_seg": sem_seg}])
        expected += detectron2_entries(sem_seg.argmax(0).numpy(), given["file_name"], id_of_label)
    assert evaluator.evaluate()["sem_seg"]["mIoU"] >= 0
    assert json.loads((tmp_path / "sem_seg_predictions.json").read_text()) == expected


def test_nothing_is_written_by_default(small_set, tmp_path):
    name, _, images = small_set
    evaluator = build_evaluator(get_cfg(), name, str(tmp_path / "out"))
    evaluator.reset()
    for given, (id_map, _) in zip(inputs_of(name), images, strict=True):
        evaluator.process([given], [{"sem_seg": torch.from_numpy(np.zeros((3, *id_map.shape), dtype=np.float32))}])
    evaluator.evaluate()
    assert not (tmp_path / "out").exists()
