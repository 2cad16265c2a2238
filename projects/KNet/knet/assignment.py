"""Which kernel learns which object: Hungarian assignment by masks and classes (arXiv 2106.14855, section 3.3).

Shapes: P kernels, T objects, K classes, h x w cells at the stride of supervision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

# Added to each squared sum of the dice coefficient, and inside logarithms.
DICE_EPSILON, LOG_EPSILON = 1e-3, 1e-12


@dataclass(frozen=True)
class CostOptions:
    """See the keys of ``MODEL.KNET.COST``.

    Attributes:
        class_weight: of the focal class cost.
        mask_weight: of the share of cells that agree.
        dice_weight: of the dice coefficient.
        focal_alpha: weight of positives in the class cost.
        focal_gamma: exponent of the class cost.
    """

    class_weight: float = 2.0
    mask_weight: float = 1.0
    dice_weight: float = 4.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


def cost_matrix(
    mask_logits: torch.Tensor,
    class_logits: torch.Tensor | None,
    masks: torch.Tensor,
    classes: torch.Tensor,
    options: CostOptions,
) -> torch.Tensor:
    """Cost (P, T) of giving each kernel each object; all pairs come from one matrix product.

    Args:
        mask_logits: (P, h, w).
        class_logits: (P, K); None: classes do not count.
        masks: (T, h, w), 0 to 1.
        classes: (T,).
        options: see :class:`CostOptions`.
    """
    p, t = mask_logits.flatten(1).sigmoid(), masks.flatten(1)
    overlap = p @ t.T
    cells = t.shape[1]
    # p t + (1 - p)(1 - t), summed over cells
    agreement = 2 * overlap + (cells - p.sum(dim=1))[:, None] - t.sum(dim=1)
    squares = (p.square().sum(dim=1) + DICE_EPSILON)[:, None] + (t.square().sum(dim=1) + DICE_EPSILON)
    cost = -options.mask_weight * agreement / cells - options.dice_weight * 2 * overlap / squares
    if class_logits is not None:
        cost = cost + options.class_weight * class_cost(class_logits, options)[:, classes]
    return cost


def class_cost(logits: torch.Tensor, options: CostOptions) -> torch.Tensor:
    """Focal loss as a positive less that as a negative, of each class: (P, K) to (P, K)."""
    p = logits.sigmoid()
    positive = -(p + LOG_EPSILON).log() * options.focal_alpha * (1 - p).pow(options.focal_gamma)
    negative = -(1 - p + LOG_EPSILON).log() * (1 - options.focal_alpha) * p.pow(options.focal_gamma)
    return positive - negative


def solve(costs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The assignments of least cost.

    Args:
        costs: (P, T_i) of each image.

    Returns:
        For each image (P,) int64: the object of each kernel, -1 for none. Of more objects than kernels, the most
        expensive go without.

    Raises:
        FloatingPointError: a cost is not finite.
    """
    # one transfer from the device, however many images
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()
    if not flat.isfinite().all():
        raise FloatingPointError("K-Net: a cost of the Hungarian assignment is not finite: the training has diverged")
    result = []
    for cost, values in zip(costs, flat.split([cost.numel() for cost in costs]), strict=True):
        rows, columns = linear_sum_assignment(values.view(cost.shape).numpy())
        assigned = torch.full((len(cost),), -1, dtype=torch.int64)
        assigned[torch.from_numpy(rows)] = torch.from_numpy(columns)
        result.append(assigned.to(cost.device))
    return result


def resize_logits(mask_logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mask logits (N, Q, h, w) at the stride of supervision; as they are where they have its size."""
    if mask_logits.shape[2:] == size:
        return mask_logits
    return F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)
