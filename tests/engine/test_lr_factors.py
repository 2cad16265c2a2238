from __future__ import annotations

import torch

from convmask.engine.lr_factors import apply_lr_factors


def test_groups_are_divided_by_factor() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    parameters[1].lr_factor = 3.0
    parameters[3].lr_factor = 3.0
    groups = [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    apply_lr_factors(optimizer)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in parameters] == [1.0, 3.0, 1.0, 1.5]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in parameters] == [0.1, 0.1, 0.1, 0.0]
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    optimizer.step()
    assert float(parameters[1].detach()) < float(parameters[0].detach()) < 0


def test_without_factors_nothing_changes() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.25)
    apply_lr_factors(optimizer)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.25
