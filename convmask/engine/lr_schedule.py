"""Learning-rate schedules: Detectron2's, and the polynomial one with warm-up."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2s
from fvcore.common.param_scheduler import ParamScheduler


class WarmupPolyScheduler(ParamScheduler):
    """``(1 - t)^power`` at the share t of the training, times a warm-up that rises to 1.

    That is the schedule of Detectron2's DeepLab project: its warm-up multiplies the falling curve.
    """

    def __init__(
        self,
        *,
        power: float = 0.9,
        warmup_factor: float = 0.001,
        warmup_length: float = 0.0,
        warmup_method: str = "linear",
        constant_ending: float = 0.0,
    ) -> None:
        """Takes the shape of the curve.

        Args:
            power: exponent.
            warmup_factor: of the warm-up, at its start.
            warmup_length: share of the training that the warm-up takes, 0 to 1.
            warmup_method: "linear", or "constant" for ``warmup_factor`` throughout.
            constant_ending: after the warm-up the curve does not fall below this.

        Raises:
            ValueError: an unknown ``warmup_method``.
        """
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f'SOLVER.WARMUP_METHOD is {warmup_method!r}; it has to be "linear" or "constant"')
        self.power = power
        self.warmup_factor = warmup_factor
        self.warmup_length = warmup_length
        self.warmup_method = warmup_method
        self.constant_ending = constant_ending

    def __call__(self, where: float) -> float:
        """The factor of the base learning rate at the share ``where`` of the training, 0 to 1."""
        curve = (1 - where) ** self.power
        if where >= self.warmup_length:
            return max(curve, self.constant_ending)
        if self.warmup_method == "constant":
            return curve * self.warmup_factor
        progress = where / self.warmup_length
        return curve * (self.warmup_factor * (1 - progress) + progress)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Builds the schedule that ``SOLVER.LR_SCHEDULER_NAME`` names: "WarmupPolyLR", or one of Detectron2's.

    Raises:
        ValueError: another name, or another ``SOLVER.WARMUP_METHOD``.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2s(cfg, optimizer)
    schedule = WarmupPolyScheduler(
        power=solver.POLY_LR_POWER,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_length=min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        warmup_method=solver.WARMUP_METHOD,
        constant_ending=solver.POLY_LR_CONSTANT_ENDING,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)
