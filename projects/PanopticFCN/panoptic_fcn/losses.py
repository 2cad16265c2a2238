"""The four losses (arXiv 2012.00720, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from convmask.losses import dice_loss, soft_focal_loss
from convmask.ops.region_kernels import region_kernels

from .heads import HeadOutputs
from .targets import Targets

# Cells in which the reduced mask of an instance has at least this share may give its kernels.
_LEAST_SHARE = 0.1
_EPSILON = 1e-8


@dataclass(frozen=True)
class LossOptions:
    """See the keys of ``MODEL.PANOPTIC_FCN.LOSSES``.

    Attributes:
        position_weight: factor of the focal losses.
        region_weight: another factor of that of regions.
        segment_weight: factor of the dice losses.
        focal_alpha: weight of positives.
        focal_gamma: exponent.
        num_kernels: thing kernels an instance and level.
        kernel_average: of stuff, "map" or "region".
    """

    position_weight: float = 1.0
    region_weight: float = 1.0
    segment_weight: float = 3.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    num_kernels: int = 7
    kernel_average: Literal["map", "region"] = "map"


def panoptic_fcn_losses(
    outputs: HeadOutputs,
    targets: Targets,
    thing_embedding: nn.Module,
    stuff_embedding: nn.Module,
    options: LossOptions,
) -> dict[str, torch.Tensor]:
    """``loss_pos_th``, ``loss_pos_st``, ``loss_seg_th`` and ``loss_seg_st``.

    Without instances, or without regions, the loss of the segments is 0 and its gradients are zeros.
    """
    instances = sum(len(member) for member in targets.members)
    position, segment = options.position_weight, options.segment_weight
    focal = {"alpha": options.focal_alpha, "gamma": options.focal_gamma}
    return {
        "loss_pos_th": position * center_loss(outputs.centers, targets.centers, focal) / max(instances, 1),
        "loss_pos_st": position * options.region_weight * region_loss(outputs.regions, targets, focal),
        "loss_seg_th": segment * thing_loss(outputs, targets, thing_embedding, options.num_kernels),
        "loss_seg_st": segment * stuff_loss(outputs, targets, stuff_embedding, options.kernel_average),
    }


def center_loss(
    logits: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], focal: dict[str, float]
) -> torch.Tensor:
    """Sum of the focal loss over all levels, images, classes and cells."""
    return torch.stack([soft_focal_loss(x, t, **focal).sum() for x, t in zip(logits, targets, strict=True)]).sum()


def region_loss(logits: Sequence[torch.Tensor], targets: Targets, focal: dict[str, float]) -> torch.Tensor:
    """Focal loss, mean over the cells of a level, summed over levels and classes, mean over the images."""
    total = logits[0].new_zeros(())
    for x, target in zip(logits, targets.regions, strict=True):
        loss = soft_focal_loss(x, target, **focal)
        if targets.valid is None:
            total = total + loss.mean(dim=(2, 3)).sum()
        else:
            valid = F.interpolate(targets.valid[:, None], size=x.shape[-2:], mode="bilinear", align_corners=False)
            total = total + ((loss * valid).sum(dim=(2, 3)) / valid.sum(dim=(2, 3)).clamp(min=_EPSILON)).sum()
    return total / len(logits[0])


def thing_loss(outputs: HeadOutputs, targets: Targets, embedding: nn.Module, num_kernels: int) -> torch.Tensor:
    """Weighted dice (equations 5 and 6): the kernels of the k best cells of an instance, by their scores.

    The weights have gradients, so that this loss trains the positions too, as in the release. An instance on two levels
    counts twice.
    """
    rows = []
    for centers, kernels, member in zip(outputs.centers, outputs.kernels, targets.members, strict=True):
        rows.append(_thing_kernels(centers, kernels, targets, member, num_kernels))
    vectors, weights, instances = (torch.cat(parts) for parts in zip(*rows, strict=True))
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=_EPSILON)
    # where there is none, empty sums still have gradients
    total = outputs.encoded.new_zeros(())
    images = targets.objects.images[instances]
    for index, encoded in enumerate(outputs.encoded):
        mine = (images == index).nonzero()[:, 0]
        logits = embedding(vectors[mine]) @ encoded.flatten(1)
        loss = dice_loss(logits, targets.objects.masks[instances[mine]].flatten(1))
        total = total + (weights[mine] * loss).sum()
    return total / max(len(instances), 1)


def _thing_kernels(
    centers: torch.Tensor, kernels: torch.Tensor, targets: Targets, member: torch.Tensor, num_kernels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a level's T_l instances: kernel vectors (T_l, k, K), their scores (T_l, k), and the instances (T_l,).

    A level of fewer than k cells gives as many as it has, and scores of 0 in the place of the others.
    """
    size = (centers.shape[2], centers.shape[3])
    objects = targets.objects
    images = objects.images[member]
    masks = F.interpolate(objects.masks[member][:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    scores = centers[images, objects.classes[member]].sigmoid() * (masks > _LEAST_SHARE)
    best, cells = scores.flatten(1).topk(min(num_kernels, size[0] * size[1]), dim=1)
    vectors = kernels.permute(0, 2, 3, 1)[images[:, None], cells // size[1], cells % size[1]]
    absent = num_kernels - best.shape[1]
    return F.pad(vectors, (0, 0, 0, absent)), F.pad(best, (0, absent)), member


def stuff_loss(
    outputs: HeadOutputs, targets: Targets, embedding: nn.Module, average: Literal["map", "region"]
) -> torch.Tensor:
    """Dice loss of the mask that each region's kernel cuts out, mean over levels, images and classes."""
    vectors, images, classes = [], [], []
    for kernels, regions in zip(outputs.kernels, targets.regions, strict=True):
        masks = regions > 0
        image, label = masks.flatten(2).any(dim=2).nonzero(as_tuple=True)
        vectors.append(region_kernels(kernels, masks, average=average)[image, label])
        images.append(image)
        classes.append(label)
    vector, image, label = torch.cat(vectors), torch.cat(images), torch.cat(classes)
    total = outputs.encoded.new_zeros(())
    for index, encoded in enumerate(outputs.encoded):
        mine = (image == index).nonzero()[:, 0]
        logits = embedding(vector[mine]) @ encoded.flatten(1)
        valid = None
        if targets.valid is not None:
            valid = targets.valid[index].flatten().expand(len(mine), -1)
        target = targets.semantic[index, label[mine]].flatten(1)
        total = total + dice_loss(logits[:, None], target, valid).sum()
    return total / max(len(image), 1)
