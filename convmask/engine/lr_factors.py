"""Learning rates of single parameters."""

from __future__ import annotations

import torch

ATTRIBUTE = "lr_factor"


def apply_lr_factors(optimizer: torch.optim.Optimizer) -> None:
    """Multiplies the learning rate of every parameter that has the attribute ``lr_factor`` by it, in place.

    A module sets the attribute on its parameters. Groups of parameters are divided where their factors differ; a
    schedule built afterwards, relative to each group's rate, keeps the factors.

    Args:
        optimizer: newly built.
    """
    divided = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(float(getattr(parameter, ATTRIBUTE, 1.0)), []).append(parameter)
        divided += [{**group, "params": some, "lr": factor * group["lr"]} for factor, some in by_factor.items()]
    optimizer.param_groups[:] = divided
