"""Lovász hinge: a convex surrogate of the Jaccard loss (arXiv 1705.08790, section 3; of Berman, Triki, Blaschko)."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def lovasz_hinge(logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The Lovász hinge of each mask: sorted errors ``1 - z (2 y - 1)``, weighted by the growth of the Jaccard loss.

    Args:
        logits: (N, P) z, of P pixels of each mask.
        targets: (N, P) bool, y.
        valid: (N, P) bool, pixels that count; None for all.

    Returns:
        (N,), at least 0. A mask without pixels gives 0, a target without foreground the largest error above 0.
    """
    if logits.shape[1] == 0:
        return logits.sum(dim=1)
    signs = torch.where(targets, 1.0, -1.0).to(logits.dtype)
    errors = 1 - logits * signs
    foreground = targets
    if valid is not None:
        # they come last, where they have no weight
        errors, foreground = errors.masked_fill(~valid, -torch.inf), targets & valid
    errors, order = errors.sort(dim=1, descending=True)
    with torch.no_grad():
        gains = _jaccard_gains(foreground.gather(1, order)).to(torch.promote_types(logits.dtype, torch.float32))
    return (F.relu(errors) * gains).sum(dim=1)


def _jaccard_gains(foreground: torch.Tensor) -> torch.Tensor:
    """(N, P) float64: by how much the Jaccard loss grows when one more of the (N, P) sorted pixels is wrong."""
    wrong = foreground.cumsum(dim=1)
    count = wrong[:, -1:]
    union = count + (~foreground).cumsum(dim=1)
    # in double precision: neighbours differ by 1 / P
    jaccard = 1 - (count - wrong).double() / union.clamp(min=1)
    return torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], dim=1)
