"""The mask loss and the smooth loss (arXiv 1912.01954, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from detectron2.structures import Instances
from torch.nn import functional as F

from convmask.losses.lovasz import lovasz_hinge
from convmask.ops.embedding_masks import ValuesInBoxes, embedding_masks_in_boxes

from .heads import EmbeddingOutputs, enlarge
from .targets import Positives, mask_targets, training_cells

# Probabilities in the mask loss stay below 1 by this: ln(1 - p) has no gradient at 1.
_CEILING = 1e-6


@dataclass(frozen=True)
class MaskLossOptions:
    """See the keys of ``MODEL.EMBED_MASK.TRAINING``, ``PIXELS`` and ``MARGIN``.

    Attributes:
        proposals: "mean" or "best".
        positive_iou: see ``TRAINING.POSITIVE_IOU``.
        box_padding: see ``TRAINING.BOX_PADDING``.
        mask_loss: "lovasz" or "bce".
        mask_weight: of the mask loss.
        mask_normalizer: "all" or "found".
        probability_floor: see ``TRAINING.PROBABILITY_FLOOR``.
        smooth_weight: of the smooth loss; 0 for none.
        scale_factor: by which the pixel embedding is enlarged.
        fixed_margin: takes the place of the predicted one; None: does not.
    """

    proposals: Literal["mean", "best"] = "mean"
    positive_iou: float = 0.5
    box_padding: float = 0.1
    mask_loss: Literal["lovasz", "bce"] = "lovasz"
    mask_weight: float = 0.5
    mask_normalizer: Literal["all", "found"] = "all"
    probability_floor: float = 0.0
    smooth_weight: float = 0.1
    scale_factor: int = 2
    fixed_margin: float | None = None


class ObjectProposals(NamedTuple):
    """The proposals of the objects of an image, G' of which have some.

    Attributes:
        objects: (G',) int64, ascending.
        embeddings: (G', D), means over the positives.
        margins: (G', M), means over the positives.
        deviations: () sum over all positives of the squared distances of embeddings and margins to these means.
    """

    objects: torch.Tensor
    embeddings: torch.Tensor
    margins: torch.Tensor
    deviations: torch.Tensor


def embedding_losses(
    outputs: EmbeddingOutputs,
    positives: Sequence[Positives],
    instances: Sequence[Instances],
    boxes: Sequence[torch.Tensor],
    *,
    stride: int,
    options: MaskLossOptions,
) -> dict[str, torch.Tensor]:
    """``loss_mask`` and, where it has a weight, ``loss_smooth``: means over the images.

    Args:
        outputs: of a batch, in single precision.
        positives: of each image.
        instances: of each image, with ``gt_masks`` (BitMasks) unless it has no objects.
        boxes: of each image, (G, 4) true corners.
        stride: of the masks.
        options: see :class:`MaskLossOptions`.
    """
    proposals, margins = outputs.flat_proposals(), outputs.flat_margins()
    pixels = enlarge(outputs.pixels, options.scale_factor)
    mask, smooth = pixels.new_zeros(()), pixels.new_zeros(())
    for index, found in enumerate(positives):
        chosen = object_proposals(proposals[index], margins[index], found)
        count = len(boxes[index]) if options.mask_normalizer == "all" else len(chosen.objects)
        losses = mask_losses(pixels[index], chosen, instances[index], boxes[index], stride, options)
        # where there is no object, empty sums still have gradients
        mask = mask + losses.sum() / max(count, 1)
        smooth = smooth + chosen.deviations / max(len(boxes[index]), 1)
    result = {"loss_mask": options.mask_weight / len(pixels) * mask}
    if options.smooth_weight > 0:
        result["loss_smooth"] = options.smooth_weight / len(pixels) * smooth
    return result


def object_proposals(proposals: torch.Tensor, margins: torch.Tensor, positives: Positives) -> ObjectProposals:
    """Means over the positives of each object, from (L, D) and (L, M) of all locations.

    Gradients flow through the means.
    """
    objects, group, counts = positives.objects.unique(return_inverse=True, return_counts=True)
    vectors = torch.cat([proposals[positives.locations], margins[positives.locations]], dim=1)
    sums = vectors.new_zeros(len(objects), vectors.shape[1]).index_add(0, group, vectors)
    means = sums / counts[:, None]
    deviations = (vectors - means[group]).square().sum()
    dims = proposals.shape[1]
    return ObjectProposals(objects, means[:, :dims], means[:, dims:], deviations)


def mask_losses(
    pixels: torch.Tensor,
    chosen: ObjectProposals,
    instances: Instances,
    boxes: torch.Tensor,
    stride: int,
    options: MaskLossOptions,
) -> torch.Tensor:
    """(G',) loss of each object, from (D, h, w) pixels of an image."""
    size = (pixels.shape[1], pixels.shape[2])
    cells = training_cells(boxes[chosen.objects], size, stride, options.box_padding)
    margins = margins_in_use(chosen.margins, options.fixed_margin)
    inside = embedding_masks_in_boxes(pixels, chosen.embeddings, margins, cells)
    losses = pixels.new_zeros(0)
    if len(chosen.objects):
        targets = mask_targets(instances.gt_masks.tensor[chosen.objects], size, stride)
        logits = log_odds(-inside.values, options.probability_floor)
        losses = _loss_of_each(logits, inside, targets, options.mask_loss)
    # without objects the gradients of pixels and proposals are zeros, as in other images
    return losses + 0 * inside.values.sum() + 0 * chosen.margins.sum()


def _loss_of_each(logits: torch.Tensor, inside: ValuesInBoxes, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """(G',) from (P,) logits in boxes and (G', h, w) targets. Boxes are padded to the length of the largest."""
    x1, y1, x2, _ = inside.boxes.unbind(1)
    lengths = inside.offsets.diff()
    within = torch.arange(max(int(lengths.max()), 1), device=logits.device).expand(len(lengths), -1)
    valid = within < lengths[:, None]
    width = (x2 - x1)[:, None].clamp(min=1)
    objects = torch.arange(len(lengths), device=logits.device)[:, None].expand_as(within)[valid]
    rows, columns = (y1[:, None] + within // width)[valid], (x1[:, None] + within % width)[valid]
    wanted = torch.zeros_like(valid).masked_scatter(valid, targets[objects, rows, columns])
    padded = logits.new_zeros(valid.shape).masked_scatter(valid, logits)
    if kind == "lovasz":
        return lovasz_hinge(padded, wanted, valid)
    bce = F.binary_cross_entropy_with_logits(padded, wanted.to(padded.dtype), reduction="none")
    return (bce * valid).sum(dim=1) / lengths.clamp(min=1)


def margins_in_use(margins: torch.Tensor, fixed: float | None) -> torch.Tensor:
    """(K,) or (K, D) margins for the operator, from (K, 1) or (K, D) predicted ones."""
    if fixed is not None:
        margins = torch.full_like(margins, fixed)
    return margins[:, 0] if margins.shape[1] == 1 else margins


def log_odds(exponents: torch.Tensor, floor: float) -> torch.Tensor:
    """``ln(p / (1 - p))`` of the probability ``p = exp(-s)``, exact at either end, from the exponents s.

    Args:
        exponents: any shape, at least 0.
        floor: from 0 to below 1/2. p is kept between this and 1 minus this, and in any case below 1 by 1e-6.
    """
    s = exponents.clamp(min=-math.log1p(-max(floor, _CEILING)))
    if floor > 0:
        s = s.clamp(max=-math.log(floor))
    return -s - torch.log(-torch.expm1(-s))
