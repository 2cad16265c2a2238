from __future__ import annotations

import pytest
from detectron2.config import CfgNode

from convmask.engine import ConfigError, budget, load_config, prepare


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("25m", 1500), ("1.5h", 5400), ("7", 7), (" 2 m ", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert budget.parse_duration(text) == seconds
    assert budget.parse_duration(budget.format_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "fast", "-3m", "0s", "3 minutes", "1m30s", "nan"])
def test_wrong_durations_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"duration '{text}'"):
        budget.parse_duration(text)


@pytest.fixture
def cfg(few_images: str, tmp_path) -> CfgNode:
    cfg = load_config("quick/panoptic_fpn_synthetic.yaml")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (few_images,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    prepare(cfg)
    cfg.freeze()
    return cfg


def test_schedule_is_stretched(cfg: CfgNode) -> None:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 900, (600, 800), 50
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 450, 300
    longer, shorter = (budget.with_iterations(cfg, n) for n in (1800, 90))
    assert longer.SOLVER.STEPS == (1200, 1600) and longer.SOLVER.WARMUP_ITERS == 100
    assert (longer.SOLVER.CHECKPOINT_PERIOD, longer.TEST.EVAL_PERIOD) == (900, 600)
    assert shorter.SOLVER.STEPS == (60, 80) and shorter.SOLVER.WARMUP_ITERS == 9
    assert budget.with_iterations(cfg, 1).SOLVER.STEPS == ()
    assert budget.with_iterations(cfg, 4).SOLVER.STEPS == (3,), "steps that fall together are one"
    assert cfg.SOLVER.MAX_ITER == 900


def test_the_trial_counts_whole_iterations_and_writes_nothing(
    cfg: CfgNode, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a clock that runs one second a step, of the measured steps alone
    steps = []
    original = budget._Trial.run_step

    def run_step(self) -> None:
        steps.append(self.iter)
        if self.iter == 0:
            original(self)

    monkeypatch.setattr(budget._Trial, "run_step", run_step)
    monkeypatch.setitem(budget.CLOCKS, "steps", lambda: float(len(steps)))
    assert budget.seconds_per_iteration(cfg, 5.0, "steps") == 1.0
    assert steps == list(range(8)), "three to warm up, five to measure"
    steps.clear()
    assert budget.iterations_within(cfg, 100.0, "steps") == 100
    assert len(steps) == 6, "at least three are measured"
    assert not (tmp_path / "output").exists()


def test_a_schedule_too_short_to_measure(cfg: CfgNode) -> None:
    short = budget.with_iterations(cfg, 2)
    with pytest.raises(ConfigError, match="MAX_ITER 2"):
        budget.seconds_per_iteration(short, 1.0)
