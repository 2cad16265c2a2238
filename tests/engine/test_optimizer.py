from __future__ import annotations

import pytest
import torch

from convmask.config import get_cfg
from convmask.engine.optimizer import build_optimizer


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))


def test_sgd_is_the_default(model):
    optimizer = build_optimizer(get_cfg(), model)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_adamw_keeps_weight_decay_off_norms(model):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BASE_LR = 1e-3
    cfg.SOLVER.WEIGHT_DECAY = 0.05
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[model[0].weight] == 0.05
    assert decay[model[1].weight] == cfg.SOLVER.WEIGHT_DECAY_NORM
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_gradients_are_clipped(model, name):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.BASE_LR = 1.0
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    optimizer = build_optimizer(cfg, model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    optimizer.step()
    assert all(float(p.grad.max()) == 0.5 for p in model.parameters())


def test_unknown_name_is_an_error(model):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER is 'LION'"):
        build_optimizer(cfg, model)
