from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

import convmask.data  # noqa: F401
from convmask.config import get_cfg
from convmask.data.loader import build_test_loader, build_train_loader


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("synthetic_panoptic_hard_train",)
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.SOLVER.IMS_PER_BATCH = 4
    return cfg


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches(cfg: CfgNode, workers: int) -> None:
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    loader = build_train_loader(cfg)
    batches = list(itertools.islice(loader, 5))
    assert [len(batch) for batch in batches] == [4] * 5
    for sample in itertools.chain.from_iterable(batches):
        assert sample["image"].dtype == torch.uint8
        assert sample["sem_seg"].shape == sample["image"].shape[1:]
        assert sample["instances"].has("gt_masks")
    assert len({sample["image_id"] for sample in itertools.chain.from_iterable(batches)}) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_test_loader_gives_every_image_once_in_order(cfg: CfgNode, workers: int) -> None:
    cfg.DATALOADER.NUM_WORKERS = workers
    batches = list(build_test_loader(cfg, "synthetic_panoptic_hard_val"))
    records = DatasetCatalog.get("synthetic_panoptic_hard_val")
    assert [[sample["image_id"] for sample in batch] for batch in batches] == [[r["image_id"]] for r in records]
    for (sample,), record in zip(batches, records, strict=True):
        assert sample["image"].shape == (3, record["height"], record["width"])
        assert "instances" not in sample


def test_a_mapper_of_ones_own(cfg: CfgNode) -> None:
    def names(record: dict[str, Any]) -> dict[str, Any]:
        return {"width": record["width"], "height": record["height"], "name": record["file_name"]}

    cfg.DATALOADER.NUM_WORKERS = 0
    assert "name" in next(iter(build_train_loader(cfg, names)))[0]
    assert "name" in next(iter(build_test_loader(cfg, "synthetic_panoptic_val", names)))[0]


def test_an_unknown_dataset_is_an_error(cfg: CfgNode) -> None:
    with pytest.raises(KeyError, match="nothing_val"):
        build_test_loader(cfg, "nothing_val")
