"""Losses of the first kernels and of every round (arXiv 2106.14855, section 3.3).

Shapes: N images, P thing kernels, S stuff classes, Q = P + S kernels, K classes (things, then stuff), h x w cells at
the stride of supervision. Loss names are the release's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from convmask.losses import soft_focal_loss
from convmask.utils.processes import mean_over_processes

from .assignment import DICE_EPSILON, CostOptions, cost_matrix, resize_logits, solve
from .kernel_head import KernelHeadOutputs
from .targets import ImageTargets
from .update_head import Round

Losses = dict[str, torch.Tensor]

# PyTorch's own: a number that no kernel can have. The release's 255 is a kernel where there are 256 of them.
_IGNORED = -100


@dataclass(frozen=True)
class LossOptions:
    """See the keys of ``MODEL.KNET.LOSSES``.

    Attributes:
        class_weight: factor of the focal loss of each round.
        mask_weight: of the binary cross-entropy of masks.
        dice_weight: of the dice loss.
        rank_weight: of the cross-entropy over kernels; 0: there is none.
        seg_weight: of the dense classifier's focal loss.
        focal_alpha: weight of positives.
        focal_gamma: exponent.
    """

    class_weight: float = 2.0
    mask_weight: float = 1.0
    dice_weight: float = 4.0
    rank_weight: float = 0.1
    seg_weight: float = 1.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    @property
    def focal(self) -> dict[str, float]:
        """Arguments of the focal loss."""
        return {"alpha": self.focal_alpha, "gamma": self.focal_gamma}


class RoundTargets(NamedTuple):
    """What the kernels of a batch are assigned to.

    Attributes:
        assigned: (N, P) thing of each kernel, -1 for none.
        positive: (N, Q) bool: kernels with a mask to learn.
        masks: (positives, h, w) those masks, in the order of ``positive.nonzero()``.
        labels: (N, Q) class of each kernel, K for none.
    """

    assigned: torch.Tensor
    positive: torch.Tensor
    masks: torch.Tensor
    labels: torch.Tensor


def knet_losses(
    outputs: KernelHeadOutputs,
    rounds: Sequence[Round],
    targets: Sequence[ImageTargets],
    *,
    num_thing_classes: int,
    num_stuff_classes: int,
    cost: CostOptions,
    options: LossOptions,
) -> Losses:
    """All losses of a batch.

    ``loss_rpn_{mask,dice,rank,seg}`` of the first kernels, ``s<k>_loss_{cls,mask,dice,rank}`` of round k. Each round is
    assigned by the predictions of the one before it, the first by those of the first kernels, as is the kernel head.
    Without positives the mask losses are 0 and have gradients.
    """
    counts = num_thing_classes, num_stuff_classes
    size = targets[0].masks.shape[1:]
    before = outputs.start._replace(mask_logits=resize_logits(outputs.start.mask_logits, size))
    assigned = assign(before, targets, counts, cost)
    things = before.mask_logits[:, : before.mask_logits.shape[1] - num_stuff_classes]
    losses = {f"loss_rpn_{name}": loss for name, loss in _mask_losses(things, assigned, options, stuff=False).items()}
    losses["loss_rpn_seg"] = options.seg_weight * seg_loss(outputs.seg_logits, targets, assigned, counts, options)
    for number, this in enumerate(rounds):
        if number:
            assigned = assign(before, targets, counts, cost)
        this = this._replace(mask_logits=resize_logits(this.mask_logits, size))
        assert this.class_logits is not None
        losses[f"s{number}_loss_cls"] = options.class_weight * class_loss(this.class_logits, assigned, counts, options)
        for name, loss in _mask_losses(this.mask_logits, assigned, options, stuff=True).items():
            losses[f"s{number}_loss_{name}"] = loss
        before = this
    return losses


@torch.no_grad()
def assign(
    before: Round, targets: Sequence[ImageTargets], counts: tuple[int, int], options: CostOptions
) -> RoundTargets:
    """Thing kernels by Hungarian assignment on the predictions ``before``; stuff kernel j learns stuff class j."""
    assigned = torch.stack(solve(thing_costs(before, targets, counts, options)))
    num_things, num_stuff = counts
    images, num_kernels = before.mask_logits.shape[:2]
    labels = assigned.new_full((images, num_kernels), num_things + num_stuff)
    masks = []
    for image, target in enumerate(targets):
        rows = (assigned[image] >= 0).nonzero()[:, 0]
        labels[image, rows] = target.classes[assigned[image, rows]]
        labels[image, num_kernels - num_stuff + target.stuff_classes] = num_things + target.stuff_classes
        masks += [target.masks[assigned[image, rows]], target.stuff_masks]
    return RoundTargets(assigned, labels < num_things + num_stuff, torch.cat(masks), labels)


def thing_costs(
    before: Round, targets: Sequence[ImageTargets], counts: tuple[int, int], options: CostOptions
) -> list[torch.Tensor]:
    """Costs (P, T_i) of each image, of thing kernels and thing classes alone."""
    num_things, num_stuff = counts
    num_kernels = before.mask_logits.shape[1] - num_stuff
    return [
        cost_matrix(
            before.mask_logits[image, :num_kernels].detach().float(),
            None if before.class_logits is None else before.class_logits[image, :num_kernels, :num_things].float(),
            target.masks,
            target.classes,
            options,
        )
        for image, target in enumerate(targets)
    ]


def _mask_losses(logits: torch.Tensor, assigned: RoundTargets, options: LossOptions, stuff: bool) -> Losses:
    """Mask, dice and rank losses of (N, Q or P, h, w) logits; without ``stuff`` of thing kernels alone."""
    positive, masks = assigned.positive, assigned.masks
    if not stuff:
        things = positive.nonzero()[:, 1] < logits.shape[1]
        positive, masks = positive[:, : logits.shape[1]], masks[things]
    rows = logits[positive]
    if len(rows):
        losses = {
            "mask": options.mask_weight * F.binary_cross_entropy_with_logits(rows, masks),
            "dice": options.dice_weight * dice_loss(rows.flatten(1), masks.flatten(1)).mean(),
        }
    else:
        losses = {"mask": logits.sum() * 0, "dice": logits.sum() * 0}
    if options.rank_weight > 0:
        losses["rank"] = options.rank_weight * rank_loss(logits, positive, masks)
    return losses


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``1 - 2 sum(p t) / (sum p^2 + sum t^2)`` with 1e-3 added to each squared sum: (n, cells) to (n,)."""
    p = logits.sigmoid()
    squares = p.square().sum(dim=1) + DICE_EPSILON + targets.square().sum(dim=1) + DICE_EPSILON
    return 1 - 2 * (p * targets).sum(dim=1) / squares


def rank_loss(logits: torch.Tensor, positive: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over kernels in each cell: the last kernel whose mask reaches it should have the highest logit.

    Cells that no mask reaches have no loss, and count in the mean.

    Args:
        logits: (N, Q, h, w).
        positive: (N, Q) bool.
        masks: (positives, h, w), in the order of ``positive.nonzero()``.
    """
    images, kernels = positive.nonzero(as_tuple=True)
    target = torch.full((len(logits), *logits.shape[2:]), -1, dtype=torch.int64, device=logits.device)
    # the last kernel is the one of the highest index
    owners = torch.where(masks > 0, kernels[:, None, None], -1)
    target.scatter_reduce_(0, images[:, None, None].expand_as(owners), owners, "amax")
    target.masked_fill_(target < 0, _IGNORED)
    return F.cross_entropy(logits, target, reduction="none", ignore_index=_IGNORED).mean()


def seg_target(
    targets: Sequence[ImageTargets], assigned: RoundTargets, counts: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """(N, h, w) class of each cell, K for none: stuff, and over it the assigned things in the order of their kernels,
    wherever their masks reach."""
    num_things, num_stuff = counts
    result = []
    for target, kernels in zip(targets, assigned.assigned, strict=True):
        order = kernels[kernels >= 0]
        masks = torch.cat([target.stuff_masks, target.masks[order]])
        labels = torch.cat([num_things + target.stuff_classes, target.classes[order], kernels.new_tensor([-1])])
        ranks = torch.arange(len(masks), device=masks.device)[:, None, None]
        # the last that reaches a cell; -1 is the entry after all of them
        last = torch.where(masks > 0, ranks, -1).amax(dim=0) if len(masks) else kernels.new_full(size, -1)
        result.append(labels[last])
    stacked = torch.stack(result)
    return stacked.masked_fill(stacked < 0, num_things + num_stuff)


def seg_loss(
    logits: torch.Tensor,
    targets: Sequence[ImageTargets],
    assigned: RoundTargets,
    counts: tuple[int, int],
    options: LossOptions,
) -> torch.Tensor:
    """Focal loss of the dense classifier (N, K, h', w'), by the number of cells that have a class."""
    size = (targets[0].masks.shape[1], targets[0].masks.shape[2])
    target = seg_target(targets, assigned, counts, size)
    # F.one_hot would make 8-byte integers first
    classes = torch.arange(sum(counts), device=target.device)[:, None, None]
    one_hot = (target[:, None] == classes).to(logits.dtype)
    loss = soft_focal_loss(resize_logits(logits, size), one_hot, **options.focal).sum()
    return loss / (target < sum(counts)).sum().clamp(min=1)


def class_loss(
    logits: torch.Tensor, assigned: RoundTargets, counts: tuple[int, int], options: LossOptions
) -> torch.Tensor:
    """Focal loss of (N, Q, K) logits, by the mean number of positives a process (1 at least).

    Thing kernels learn thing classes only; stuff kernel j its own class only, whether it is in the image or not.
    """
    target = F.one_hot(assigned.labels, sum(counts) + 1)[..., :-1].to(logits.dtype)
    loss = soft_focal_loss(logits, target, **options.focal) * class_weights(logits.shape[1], counts, logits.device)
    return loss.sum() / mean_over_processes(assigned.positive.sum().float()).clamp(min=1)


def class_weights(num_kernels: int, counts: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(Q, K) which class logits of which kernels have a loss: 1 or 0."""
    num_things, num_stuff = counts
    weights = torch.zeros(num_kernels, num_things + num_stuff, device=device)
    weights[: num_kernels - num_stuff, :num_things] = 1
    weights[num_kernels - num_stuff :, num_things:] = torch.eye(num_stuff, device=device)
    return weights
