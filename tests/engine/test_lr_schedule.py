from __future__ import annotations

import math

import pytest
import torch

from convmask.config import get_cfg
from convmask.engine.lr_schedule import build_lr_scheduler


def rates(**solver: object) -> list[float]:
    cfg = get_cfg()
    for key, value in {"MAX_ITER": 20, "WARMUP_ITERS": 5, "WARMUP_FACTOR": 0.1, **solver}.items():
        cfg.merge_from_list([f"SOLVER.{key}", value])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_poly_falls_and_the_warm_up_multiplies_it() -> None:
    expected = []
    for iteration in range(20):
        warm = min(1.0, 0.1 * (1 - iteration / 5) + iteration / 5)
        expected.append(0.5 * warm * (1 - iteration / 20) ** 0.9)
    assert rates(LR_SCHEDULER_NAME="WarmupPolyLR") == pytest.approx(expected)


def test_poly_with_constant_parts() -> None:
    found = rates(LR_SCHEDULER_NAME="WarmupPolyLR", WARMUP_METHOD="constant", POLY_LR_CONSTANT_ENDING=0.4)
    assert found[1] == pytest.approx(0.05 * (19 / 20) ** 0.9)
    assert found[-1] == pytest.approx(0.2)


def test_cosine_falls_to_nothing_after_the_warm_up() -> None:
    found = rates(LR_SCHEDULER_NAME="WarmupCosineLR")
    expected = [0.25 * (1 + math.cos(math.pi * iteration / 20)) for iteration in range(20)]
    assert found[5:] == pytest.approx(expected[5:])
    # Detectron2's warm-up is a straight line to where the curve is at its end.
    assert found[:5] == pytest.approx([0.05 + (expected[5] - 0.05) * iteration / 5 for iteration in range(5)])


def test_detectron2s_schedules_remain() -> None:
    assert rates(LR_SCHEDULER_NAME="WarmupMultiStepLR", STEPS=(10,))[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("solver", [{"WARMUP_METHOD": "burnin"}, {"LR_SCHEDULER_NAME": "Sine"}])
def test_unknown_names(solver: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"WARMUP_METHOD|Unknown LR scheduler"):
        rates(**{"LR_SCHEDULER_NAME": "WarmupPolyLR", **solver})
