"""Losses, and how they go together with branches that an iteration does not train."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F


def semantic_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, ignore_value: int) -> torch.Tensor:
    """Cross entropy, mean over the labelled pixels of the whole batch; 0, with gradient 0, where no pixel is labelled.

    Args:
        logits: (N, C, H, W).
        targets: (N, H, W) int64, values 0..C-1 or ``ignore_value``.
        ignore_value: label of pixels that do not count.
    """
    total = F.cross_entropy(logits, targets, ignore_index=ignore_value, reduction="sum")
    return total / (targets != ignore_value).sum().clamp(min=1)


def scaled(
    losses: dict[str, torch.Tensor], weight: float, prefixes: tuple[str, ...] = ("",)
) -> dict[str, torch.Tensor]:
    """The same losses, those whose name begins with one of ``prefixes`` times ``weight``."""
    if weight == 1.0:
        return losses
    return {name: loss * weight if name.startswith(prefixes) else loss for name, loss in losses.items()}


def with_zero_gradients(losses: dict[str, torch.Tensor], modules: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
    """The same losses, through which the trainable parameters of ``modules`` get gradients of zero instead of none.

    Distributed data parallel training waits for the gradient of every parameter; and an optimizer step (momentum,
    weight decay) is then the same with one process and with many.
    """
    # an empty slice: its gradient is all zeros, and no value, infinite ones included, enters the loss
    empty = [p.reshape(-1)[:0].sum() for module in modules for p in module.parameters() if p.requires_grad]
    if not empty or not losses:
        return losses
    first = next(iter(losses))
    return {**losses, first: losses[first] + torch.stack(empty).sum()}
