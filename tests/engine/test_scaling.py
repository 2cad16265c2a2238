"""The learning rate that follows the number of processes, or of images."""

from __future__ import annotations

import pytest
from detectron2.config import CfgNode

from convmask.engine import ConfigError, Trainer, load_config, prepare
from convmask.engine import trainer as trainer_module
from convmask.engine.trainer import scale_with_processes


@pytest.fixture
def cfg(tiny_options: list[str]) -> CfgNode:
    solver = {"IMS_PER_BATCH": 4, "MAX_ITER": 30, "STEPS": (10, 20), "WARMUP_ITERS": 6, "CHECKPOINT_PERIOD": 15}
    options = [str(part) for key, value in solver.items() for part in (f"SOLVER.{key}", value)]
    cfg = load_config("quick/panoptic_fpn_synthetic.yaml", [*tiny_options, *options, "SOLVER.BASE_LR", "0.02"])
    prepare(cfg)
    return cfg


def test_one_process_in_the_place_of_two_takes_half_the_images_twice_as_long(cfg: CfgNode) -> None:
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 2
    trainer = Trainer(cfg)
    solver = trainer.cfg.SOLVER
    assert (2, pytest.approx(0.01), 1) == (solver.IMS_PER_BATCH, solver.BASE_LR, solver.REFERENCE_WORLD_SIZE)
    assert (solver.MAX_ITER, solver.WARMUP_ITERS, solver.STEPS, solver.CHECKPOINT_PERIOD) == (60, 12, (20, 40), 30)
    # The trainer works by it; the config that it was given is as before.
    assert trainer.max_iter == 60
    assert all(group["initial_lr"] == pytest.approx(0.01) for group in trainer.optimizer.param_groups)
    assert len(next(iter(trainer._trainer.data_loader))) == 2
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (4, 0.02)


def test_four_processes_in_the_place_of_two(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 2
    monkeypatch.setattr(trainer_module.comm, "get_world_size", lambda: 4)
    solver = scale_with_processes(cfg).SOLVER
    assert (8, pytest.approx(0.04), 15) == (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER)
    # In as many processes as the config is for, nothing changes.
    monkeypatch.setattr(trainer_module.comm, "get_world_size", lambda: 2)
    assert scale_with_processes(cfg) is cfg


def test_a_rate_for_so_many_images(cfg: CfgNode) -> None:
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 16
    trainer = Trainer(cfg)
    assert all(group["initial_lr"] == pytest.approx(0.005) for group in trainer.optimizer.param_groups)
    assert trainer.max_iter == 30


@pytest.mark.parametrize(
    ("world_size", "images", "message"),
    [
        (3, 0, r"REFERENCE_WORLD_SIZE is 3; .* SOLVER\.IMS_PER_BATCH \(4\)"),
        (-2, 0, "REFERENCE_WORLD_SIZE is -2"),
        (2, 8, "REFERENCE_WORLD_SIZE 2 and SOLVER.REFERENCE_IMS_PER_BATCH 8 both"),
    ],
)
def test_references_that_cannot_be_followed(cfg: CfgNode, world_size: int, images: int, message: str) -> None:
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.REFERENCE_IMS_PER_BATCH = world_size, images
    with pytest.raises(ConfigError, match=message):
        Trainer(cfg)
