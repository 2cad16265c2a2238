"""Whether everything between the files and AP learns: four synthetic images by heart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from convmask.engine import Trainer, prepare


@pytest.mark.slow
def test_four_images_are_learnt_in_300_iterations(
    small_cfg: Callable[..., CfgNode], few_images: str, tmp_path: Path
) -> None:
    cfg = small_cfg("DATASETS.TRAIN", (few_images,), "DATASETS.TEST", (few_images,), "OUTPUT_DIR", str(tmp_path))
    cfg.merge_from_list(["MODEL.EMBED_MASK.NUM_CLASSES", 80, "MODEL.NARROW_RESNET.WIDTH", 16, "SEED", 1])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 300, "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["INPUT.RANDOM_FLIP", "none", "TEST.EVAL_PERIOD", 0])
    prepare(cfg)
    torch.manual_seed(1)
    trainer = Trainer(cfg)
    trainer.train()
    # the evaluation after the last iteration
    assert trainer.storage.latest()["segm/AP50"][0] >= 80
