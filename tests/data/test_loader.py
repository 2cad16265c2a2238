from __future__ import annotations

import itertools
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

import convmask.data  # noqa: F401
from convmask.config import get_cfg
from convmask.data.errors import DatasetError
from convmask.data.loader import build_test_loader, build_train_loader
from convmask.data.panoptic import register_panoptic
from convmask.utils.random_state import get_random_state, set_random_state


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


def _without_things(panoptic_set: Any, categories: bool) -> None:
    """Makes the first image one of stuff alone; with ``categories`` every image and the list of categories, too."""
    content = panoptic_set.content
    things = {category["id"] for category in content["categories"] if category["isthing"]}
    for index, annotation in enumerate(content["annotations"]):
        if index == 0 or categories:
            gone = {segment["id"] for segment in annotation["segments_info"] if segment["category_id"] in things}
            annotation["segments_info"] = [s for s in annotation["segments_info"] if s["id"] not in gone]
            panoptic_set.maps[index][np.isin(panoptic_set.maps[index], list(gone))] = 0
    if categories:
        content["categories"] = [category for category in content["categories"] if not category["isthing"]]
    register_panoptic("loader_set", *panoptic_set.write().paths)


@pytest.fixture
def small(cfg: CfgNode) -> CfgNode:
    cfg.DATASETS.TRAIN = ("loader_set",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    cfg.freeze()
    return cfg


def _some_ids(cfg: CfgNode) -> set[Any]:
    return {batch[0]["image_id"] for batch in itertools.islice(build_train_loader(cfg), 6)}


def test_images_of_stuff_alone_are_left_out_only_where_instances_are_asked_for(
    small: CfgNode, panoptic_set: Any
) -> None:
    _without_things(panoptic_set, categories=False)
    assert len(_some_ids(small)) == 1
    small.defrost()
    small.INPUT.TARGETS = ("sem_seg",)
    small.freeze()
    assert len(_some_ids(small)) == 2
    assert small.DATALOADER.FILTER_EMPTY_ANNOTATIONS


@pytest.mark.parametrize("targets", [("sem_seg",), ("instances", "sem_seg")])
def test_a_panoptic_set_without_thing_categories(small: CfgNode, panoptic_set: Any, targets: tuple[str, ...]) -> None:
    _without_things(panoptic_set, categories=True)
    small.defrost()
    small.INPUT.TARGETS = targets
    assert len(_some_ids(small)) == 2


def test_no_image_left_is_an_error_that_names_the_reason(small: CfgNode, panoptic_set: Any) -> None:
    _without_things(panoptic_set, categories=False)
    for annotation in panoptic_set.content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = 1
    panoptic_set.write()
    with pytest.raises(DatasetError, match="loader_set: no image has an instance, and DATALOADER"):
        build_train_loader(small)


class _Noisy:
    """A mapper that draws from every generator; None for the images in ``missing``."""

    def __init__(self, missing: tuple[int, ...] = ()) -> None:
        self.missing = missing

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        if record["image_id"] in self.missing:
            return None
        numbers = (random.random(), np.random.rand(), torch.rand(()).item())
        return {"image_id": record["image_id"], "numbers": numbers}


def _drawn(cfg: CfgNode, iteration: int, count: int, mapper: _Noisy | None = None) -> list[Any]:
    loader = build_train_loader(cfg, mapper or _Noisy())
    loader.start_at(iteration)
    return list(itertools.islice(loader, count))


@pytest.fixture
def seeded_cfg(cfg: CfgNode, few_images: str) -> CfgNode:
    cfg.DATASETS.TRAIN = (few_images,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.SEED = 11
    return cfg


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_follow_from_seed_and_iteration_alone(seeded_cfg: CfgNode, workers: int) -> None:
    expected = _drawn(seeded_cfg, 0, 6)
    assert len({sample["numbers"] for batch in expected for sample in batch}) == 18
    seeded_cfg.DATALOADER.NUM_WORKERS = workers
    torch.manual_seed(workers)
    assert _drawn(seeded_cfg, 0, 6) == expected
    assert _drawn(seeded_cfg, 4, 2) == expected[4:]
    seeded_cfg.SEED = 12
    assert _drawn(seeded_cfg, 0, 6) != expected


def test_loading_leaves_the_generators_of_the_process_alone(seeded_cfg: CfgNode) -> None:
    def numbers() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    state = get_random_state()
    expected = numbers()
    set_random_state(state)
    _drawn(seeded_cfg, 0, 3)
    assert numbers() == expected


def test_passes_share_out_the_images_of_an_iteration(seeded_cfg: CfgNode) -> None:
    seeded_cfg.SOLVER.IMS_PER_BATCH = 4
    seeded_cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    whole = _drawn(seeded_cfg, 2, 1)[0]
    seeded_cfg.SOLVER.ACCUMULATION_STEPS = 2
    halves = _drawn(seeded_cfg, 2, 2)
    assert [len(half) for half in halves] == [2, 2]
    assert [sample for half in halves for sample in half] == whole
    seeded_cfg.SOLVER.ACCUMULATION_STEPS = 3
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH is 4, no multiple of .* 3 x 1"):
        build_train_loader(seeded_cfg)


def test_an_image_that_the_mapper_leaves_out_is_replaced_in_the_same_way_each_time(seeded_cfg: CfgNode) -> None:
    mapper = _Noisy(missing=(1, 2))
    batches = _drawn(seeded_cfg, 0, 5, mapper)
    assert {sample["image_id"] for batch in batches for sample in batch} == {3, 4}
    seeded_cfg.DATALOADER.NUM_WORKERS = 1
    assert _drawn(seeded_cfg, 3, 2, mapper) == batches[3:]
    seeded_cfg.DATALOADER.NUM_WORKERS = 0
    with pytest.raises(DatasetError, match="None for 100 images in a row"):
        _drawn(seeded_cfg, 0, 1, _Noisy(missing=(1, 2, 3, 4)))


def test_a_random_seed_is_kept_by_the_state(
    seeded_cfg: CfgNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("convmask"), "propagate", True)
    seeded_cfg.SEED = -1
    first, second = (build_train_loader(seeded_cfg, _Noisy()) for _ in range(2))
    assert first.dataset.seed != second.dataset.seed
    second.load_state_dict(first.state_dict())
    assert next(iter(first)) == next(iter(second))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    second.load_state_dict({**first.state_dict(), "images": 5})
    assert "images 5 -> 3" in caplog.text


def test_samplers(seeded_cfg: CfgNode) -> None:
    seeded_cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    seeded_cfg.DATALOADER.REPEAT_THRESHOLD = 1.0
    assert len(_drawn(seeded_cfg, 0, 3)) == 3
    seeded_cfg.DATALOADER.SAMPLER_TRAIN = "NoSampler"
    with pytest.raises(ValueError, match=r"DATALOADER\.SAMPLER_TRAIN is 'NoSampler'"):
        build_train_loader(seeded_cfg)
