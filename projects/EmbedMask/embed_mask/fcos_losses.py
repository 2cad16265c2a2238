"""Losses of FCOS: focal loss of the classes, IoU losses of the boxes, binary cross-entropy of the centerness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fvcore.nn import sigmoid_focal_loss
from torch.nn import functional as F

from convmask.utils.processes import mean_over_processes

from .fcos_head import FCOSOutputs, flatten_levels
from .fcos_targets import FCOSTargets

BOX_LOSSES = ("giou", "linear_iou", "iou")
_EPSILON = 1e-7
_LEAST_SUM = 1e-6


@dataclass(frozen=True)
class FCOSLossOptions:
    """See the keys of ``MODEL.EMBED_MASK.FCOS``.

    Attributes:
        box_loss: one of ``BOX_LOSSES``.
        focal_alpha: weight of positives.
        focal_gamma: exponent.
    """

    box_loss: str = "giou"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


def fcos_losses(outputs: FCOSOutputs, targets: FCOSTargets, options: FCOSLossOptions) -> dict[str, torch.Tensor]:
    """``loss_cls``, ``loss_reg`` and ``loss_centerness``.

    Numbers of positives, and sums of centerness, are means over all processes. Without positives the last two are 0,
    and their gradients zeros.
    """
    logits = flatten_levels(outputs.logits)
    positive = targets.classes >= 0
    normalizer = mean_over_processes(positive.sum().float()).clamp(min=1)
    one_hot = F.one_hot(targets.classes + 1, logits.shape[2] + 1)[..., 1:].to(logits.dtype)
    focal = sigmoid_focal_loss(logits, one_hot, alpha=options.focal_alpha, gamma=options.focal_gamma, reduction="sum")

    units = torch.cat(
        [x.new_full(x.shape[2:], unit).flatten() for x, unit in zip(outputs.distances, outputs.units, strict=True)]
    )
    wanted = (targets.distances / units[:, None])[positive]
    found = flatten_levels(outputs.distances)[positive]
    center = centerness_targets(wanted)
    box = box_loss(found, wanted, options.box_loss)
    predicted = flatten_levels(outputs.centerness)[..., 0][positive]
    bce = F.binary_cross_entropy_with_logits(predicted, center, reduction="sum")
    return {
        "loss_cls": focal / normalizer,
        "loss_reg": (box * center).sum() / mean_over_processes(center.sum()).clamp(min=_LEAST_SUM),
        "loss_centerness": bce / normalizer,
    }


def centerness_targets(distances: torch.Tensor) -> torch.Tensor:
    """(n,) 1 in the middle of the box to 0 at its sides, from (n, 4) distances (arXiv 1904.01355, equation 3)."""
    horizontal, vertical = distances[:, 0::2], distances[:, 1::2]
    ratios = horizontal.amin(1) / horizontal.amax(1) * vertical.amin(1) / vertical.amax(1)
    return ratios.sqrt()


def box_loss(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> torch.Tensor:
    """Loss of boxes given by their distances from the same locations.

    The release adds 1 to the areas of intersection and union, whatever the unit of the distances.

    Args:
        found: (n, 4), at least 0.
        wanted: (n, 4).
        kind: "giou", 1 - GIoU (arXiv 1902.09630); "linear_iou", 1 - IoU; "iou", -ln IoU (UnitBox, arXiv 1608.01471).

    Returns:
        (n,).

    Raises:
        ValueError: another kind.
    """
    if kind not in BOX_LOSSES:
        raise ValueError(f"MODEL.EMBED_MASK.FCOS.BOX_LOSS {kind!r} is not one of {', '.join(BOX_LOSSES)}")
    smaller, larger = torch.minimum(found, wanted), torch.maximum(found, wanted)
    intersection = (smaller[:, 0] + smaller[:, 2]) * (smaller[:, 1] + smaller[:, 3])
    union = _area(found) + _area(wanted) - intersection
    iou = (intersection + 1) / (union + 1)
    if kind == "iou":
        return -iou.log()
    if kind == "linear_iou":
        return 1 - iou
    hull = (larger[:, 0] + larger[:, 2]) * (larger[:, 1] + larger[:, 3]) + _EPSILON
    return 1 - (iou - (hull - union) / hull)


def _area(distances: torch.Tensor) -> torch.Tensor:
    return (distances[:, 0] + distances[:, 2]) * (distances[:, 1] + distances[:, 3])
