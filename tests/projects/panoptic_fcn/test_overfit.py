"""Whether everything between the files and panoptic quality learns: four synthetic images by heart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from convmask.data.panoptic import register_panoptic_records
from convmask.engine import Trainer, prepare

NAME = "four_synthetic_images_of_panoptic_fcn"


@pytest.mark.slow
def test_four_images_are_learnt_in_400_iterations(small_cfg: Callable[..., CfgNode], tmp_path: Path) -> None:
    source = "synthetic_panoptic_train"
    register_panoptic_records(NAME, MetadataCatalog.get(source).categories, lambda: DatasetCatalog.get(source)[:4])
    try:
        cfg = small_cfg("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "OUTPUT_DIR", str(tmp_path), "SEED", 1)
        node = cfg.MODEL.PANOPTIC_FCN
        node.IN_FEATURES, node.TARGETS.SCALES = ["p3", "p4", "p5"], ((1, 40), (32, 72), (64, 2048))
        node.NUM_CLASSES, node.STUFF.NUM_CLASSES = 80, 54
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 4, 400
        cfg.INPUT.RANDOM_FLIP = "none"
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.TEST.EVAL_PERIOD = 0
        prepare(cfg)
        torch.manual_seed(1)
        trainer = Trainer(cfg)
        trainer.train()
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    # the evaluation after the last iteration
    assert trainer.storage.latest()["panoptic_seg/PQ"][0] >= 75
