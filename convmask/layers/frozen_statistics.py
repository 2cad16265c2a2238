"""Batch normalisation of which the statistics are frozen and the affine part learns."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class FrozenStatisticsBatchNorm2d(nn.BatchNorm2d):
    """Normalises by the stored statistics in training too, and never changes them; weight and bias are trained.

    The fine-tuning that OpenMMLab calls ``norm_eval=True``. Detectron2's ``FrozenBatchNorm2d`` freezes all four. Its
    parameters and buffers have the names of :class:`torch.nn.BatchNorm2d`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape."""
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )
