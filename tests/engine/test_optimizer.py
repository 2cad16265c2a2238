from __future__ import annotations

import pytest
import torch

from convmask.config import get_cfg
from convmask.engine.optimizer import build_optimizer, scale_learning_rate


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


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
@pytest.mark.parametrize("kind", ["full_model", "norm", "value"])
def test_what_each_kind_of_clipping_does(model, name, kind):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    optimizer = build_optimizer(cfg, model)
    before = {}
    for parameter in model.parameters():
        before[parameter] = torch.randn_like(parameter) * 10
        parameter.grad = before[parameter].clone()
    optimizer.step()
    total = torch.stack([gradient.norm() for gradient in before.values()]).norm()
    for parameter, gradient in before.items():
        expected = {
            "full_model": gradient / total,
            "norm": gradient / max(gradient.norm(), 1),
            "value": gradient.clamp(-1, 1),
        }[kind]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)


def test_the_learning_rate_scales_with_the_batch():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH = 0.02, 4
    assert scale_learning_rate(cfg) is cfg
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 16
    cfg.freeze()
    scaled = scale_learning_rate(cfg)
    assert pytest.approx(0.005) == scaled.SOLVER.BASE_LR and scaled.is_frozen()
    assert cfg.SOLVER.BASE_LR == 0.02
    assert scale_learning_rate(scaled) is scaled
    cfg.defrost()
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = -1
    with pytest.raises(ValueError, match="REFERENCE_IMS_PER_BATCH is -1"):
        scale_learning_rate(cfg)


def test_parameters_of_one_rule_are_one_group(model):
    cfg = get_cfg()
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.WEIGHT_DECAY_BIAS = cfg.SOLVER.WEIGHT_DECAY
    groups = build_optimizer(cfg, model).param_groups
    assert sum(len(group["params"]) for group in groups) == 4
    # Detectron2 0.5 decays the bias of a normalisation as any other.
    assert [group["weight_decay"] for group in groups] == [cfg.SOLVER.WEIGHT_DECAY, 0.0]


def test_an_unknown_kind_of_clipping_is_an_error(model):
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "all"
    with pytest.raises(ValueError, match="CLIP_TYPE is 'all', not one of value, norm, full_model"):
        build_optimizer(cfg, model)
