"""Focal loss for targets between 0 and 1."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def soft_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Element-wise ``alpha_t (1 - p_t)^gamma BCE(p, t)`` (arXiv 1708.02002), linear in the target t.

    ``p_t = p t + (1 - p)(1 - t)`` and ``alpha_t = alpha t + (1 - alpha)(1 - t)``, with p the sigmoid of the logits.

    Args:
        logits: any shape.
        targets: same shape, 0 to 1.
        alpha: weight of positives; a negative value weighs all alike.
        gamma: exponent of the focus on elements that are wrong.

    Returns:
        The loss of each element.
    """
    p = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    # 1 - p_t
    loss = loss * (p + targets - 2 * p * targets).pow(gamma)
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss
