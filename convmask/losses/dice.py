"""Dice loss with squares in the denominator (V-Net, arXiv 1606.04797)."""

from __future__ import annotations

import torch

EPSILON = 1e-8


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """``1 - 2 sum(p t) / (sum p^2 + sum t^2)`` of each mask, with p the sigmoid of the logits.

    Args:
        logits: (N, K, P): K predictions of P pixels for each of N targets.
        targets: (N, P), 0 to 1.
        valid: (N, P), weights of the pixels; None for 1 everywhere.

    Returns:
        (N, K), 0 for a perfect mask to 1. A target without pixels against a prediction of zeros gives 1.
    """
    p = logits.sigmoid()
    if valid is not None:
        p, targets = p * valid[:, None], targets * valid
    intersection = torch.bmm(p, targets[:, :, None])[..., 0]
    union = p.square().sum(dim=-1) + targets.square().sum(dim=-1, keepdim=True)
    return 1 - 2 * intersection / union.clamp(min=EPSILON)
