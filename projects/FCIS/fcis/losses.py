"""The losses of RoIs, and online hard example mining (arXiv 1611.07709, section 4; the release's normalisation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fvcore.nn import smooth_l1_loss
from torch.nn import functional as F

from .heads import RoiOutputs
from .targets import IGNORED, RoiTargets


@dataclass(frozen=True)
class LossOptions:
    """See the keys of ``MODEL.FCIS.LOSSES`` and ``OHEM``.

    Attributes:
        class_weight: factor of the class loss.
        mask_weight: factor of the mask loss.
        box_weight: factor of the box loss.
        box_beta: where smooth L1 becomes linear.
        hard_rois: losses are those of so many RoIs with the largest sum; None: of all.
        normalizer: what mask and box losses of an image are divided by; None: the number of its RoIs.
    """

    class_weight: float = 1.0
    mask_weight: float = 10.0
    box_weight: float = 1.0
    box_beta: float = 1.0
    hard_rois: int | None = 128
    normalizer: int | None = 128


def roi_losses(outputs: RoiOutputs, targets: RoiTargets, options: LossOptions) -> dict[str, torch.Tensor]:
    """(R,) weighted losses of each RoI, before any division: ``loss_cls``, ``loss_mask``, ``loss_box_reg``.

    The mask loss of a RoI is the mean cross entropy over all its bins. Ignored RoIs have none.
    """
    labels = targets.labels
    entropy = F.cross_entropy(outputs.scores.float(), labels, ignore_index=IGNORED, reduction="none")
    mask = F.cross_entropy(outputs.masks.float(), targets.masks, ignore_index=IGNORED, reduction="none")
    box = smooth_l1_loss(outputs.deltas.float(), targets.deltas, options.box_beta, reduction="none").sum(dim=1)
    return {
        "loss_cls": options.class_weight * entropy,
        "loss_mask": options.mask_weight * mask.mean(dim=(1, 2)),
        "loss_box_reg": options.box_weight * torch.where(labels > 0, box, 0),
    }


def hardest(losses: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    """(min(R, number),) int64: the RoIs with the largest sum of losses, the largest first."""
    total = torch.stack(list(losses.values())).sum(dim=0).detach()
    return torch.sort(total, descending=True, stable=True).indices[:number]


def image_losses(outputs: RoiOutputs, targets: RoiTargets, options: LossOptions) -> dict[str, torch.Tensor]:
    """The losses of one image: the mean class loss of RoIs that are not ignored, and sums by the normaliser."""
    losses = roi_losses(outputs, targets, options)
    labels = targets.labels
    if options.hard_rois is not None:
        hard = hardest(losses, options.hard_rois)
        losses = {name: loss[hard] for name, loss in losses.items()}
        labels = labels[hard]
    counted = max(int((labels != IGNORED).sum()), 1)
    divisor = options.normalizer or max(len(labels), 1)
    return {name: loss.sum() / (counted if name == "loss_cls" else divisor) for name, loss in losses.items()}


def fcis_losses(
    outputs: Sequence[RoiOutputs], targets: Sequence[RoiTargets], options: LossOptions
) -> dict[str, torch.Tensor]:
    """The mean over the images of their losses. The release has one image a GPU and adds up gradients, so that its
    learning rate is to be multiplied by the number of GPUs here."""
    every = [image_losses(*pair, options) for pair in zip(outputs, targets, strict=True)]
    return {name: torch.stack([losses[name] for losses in every]).mean() for name in every[0]}
