"""Each task learns a few images by heart, through the whole program: data, training, inference and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convmask.config import get_cfg
from convmask.data.class_counts import set_class_counts
from convmask.engine import Trainer

# Least value after training, in percent.
TARGETS = {
    "panoptic": ("panoptic_seg/PQ", 60.0),
    "instance": ("segm/AP50", 60.0),
    "semantic": ("sem_seg/mIoU", 60.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TARGETS)
def test_overfit(repository: Path, tmp_path: Path, few_images: str, task: str) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(repository / "configs" / "quick" / f"knet_{task}_synthetic.yaml"))
    options: list[Any] = [
        *("DATASETS.TRAIN", (few_images,), "DATASETS.TEST", (few_images,), "MODEL.DEVICE", "cpu"),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 200, "SEED", 1, "OUTPUT_DIR", str(tmp_path)),
        *("INPUT.RANDOM_FLIP", "none", "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0),
        *("MODEL.NARROW_RESNET.WIDTH", 16),
    ]
    cfg.merge_from_list(options)
    set_class_counts(cfg)
    torch.manual_seed(1)
    trainer = Trainer(cfg)
    trainer.train()
    name, least = TARGETS[task]
    assert trainer.storage.latest()[name][0] >= least
