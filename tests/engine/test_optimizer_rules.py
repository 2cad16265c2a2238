"""The rules of parameter groups that Detectron2 does not have."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from convmask.config import get_cfg
from convmask.engine.optimizer import build_optimizer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"bottom_up": nn.Linear(2, 2), "fpn": nn.Linear(2, 2)})
        self.backbone["bottom_up"].relative_position_bias_table = nn.Parameter(torch.zeros(3))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def adamw(*options: object) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.05, *options])
    return cfg


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_multiplier_and_embedding_decay(name: str) -> None:
    model = Model()
    options = [
        "SOLVER.OPTIMIZER",
        name,
        "SOLVER.BACKBONE_MULTIPLIER",
        0.25,
        "SOLVER.WEIGHT_DECAY_EMBED",
        0.0,
        "SOLVER.WEIGHT_DECAY_NORM",
        0.01,
    ]
    optimizer = build_optimizer(adamw(*options), model)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        # the FPN is no part of the backbone
        assert rate[parameter] == (0.25 if "bottom_up" in name else 1.0), name
    assert decay[model.backbone["bottom_up"].relative_position_bias_table] == 0
    assert decay[model.backbone["bottom_up"].weight] == 0.05
    assert decay[model.head[1].weight] == 0.01


def test_a_backbone_without_fpn() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = build_optimizer(adamw("SOLVER.BACKBONE_MULTIPLIER", 0.5), model)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[model["backbone"].weight] == 0.5 and rate[model["head"].weight] == 1.0


def test_the_norm_of_all_gradients_is_clipped() -> None:
    model = Model()
    options = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
    optimizer = build_optimizer(adamw(*options, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5), model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)
