"""Which RoIs are trained on, and what they learn.

Shapes: K candidate RoIs of one image, M of them trained on, G objects, masks of P x P bins. Boxes are by the
convention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .boxes import encode, pairwise_iou
from .convention import MXNET, Convention

IGNORED = -1


@dataclass(frozen=True)
class SamplingOptions:
    """See the keys of ``MODEL.ROI_HEADS`` and ``MODEL.FCIS.SAMPLING``.

    Attributes:
        number: RoIs of an image; -1: all, objects first.
        positive_fraction: at most this share of them are positive.
        positive_iou: least IoU of positives.
        background_low: least IoU of background.
        fill_from_all: see ``FILL_FROM_ALL``.
        ignore_filled: see ``IGNORE_FILLED``.
        mask_threshold: see ``MASK_TARGET_THRESH``.
        mask_size: P.
        deviations: standard deviations of the deltas.
    """

    number: int = 128
    positive_fraction: float = 0.25
    positive_iou: float = 0.5
    background_low: float = 0.0
    fill_from_all: bool = False
    ignore_filled: bool = False
    mask_threshold: float = 0.4
    mask_size: int = 21
    deviations: tuple[float, float, float, float] = (0.2, 0.2, 0.5, 0.5)


@dataclass
class RoiTargets:
    """RoIs of one image to train on.

    Attributes:
        rois: (M, 4).
        labels: (M,) int64 classes, 0 for background, -1 for ignored.
        deltas: (M, 4) in units of the standard deviations, of positives; 0 elsewhere.
        masks: (M, P, P) int64, 1 inside, 0 outside, -1 for RoIs that are not positive.
    """

    rois: torch.Tensor
    labels: torch.Tensor
    deltas: torch.Tensor
    masks: torch.Tensor


def sample_rois(
    overlaps: torch.Tensor, classes: torch.Tensor, options: SamplingOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chooses RoIs. Where there are too few to fill up with, they are repeated; without any there are fewer.

    Args:
        overlaps: (K, G) IoU.
        classes: (G,) int64 from 1 on.
        options: see :class:`SamplingOptions`.

    Returns:
        (M,) int64 indices of the RoIs, positives first; (M,) labels; and (M,) objects, of the largest IoU.
    """
    number = len(overlaps)
    if overlaps.shape[1]:
        best, matched = overlaps.max(dim=1)
    else:
        best, matched = overlaps.new_zeros(number), torch.zeros(number, dtype=torch.int64, device=overlaps.device)
    positive = (best >= options.positive_iou).nonzero()[:, 0]
    background = ((best < options.positive_iou) & (best >= options.background_low)).nonzero()[:, 0]
    filled = positive[:0]
    if options.number >= 0:
        positive = _draw(positive, round(options.positive_fraction * options.number))
        background = _draw(background, options.number - len(positive))
        missing = options.number - len(positive) - len(background)
        if missing:
            everything = torch.arange(number, device=overlaps.device)
            pool = everything if options.fill_from_all else everything[~torch.isin(everything, positive)]
            filled = _draw_repeatedly(pool, missing)
    chosen = torch.cat([positive, background, filled])
    labels = torch.zeros_like(chosen)
    if len(positive):
        labels[: len(positive)] = classes[matched[positive]]
    if options.ignore_filled:
        labels[len(positive) + len(background) :] = IGNORED
    return chosen, labels, matched[chosen]


def roi_targets(
    rois: torch.Tensor,
    labels: torch.Tensor,
    objects: torch.Tensor,
    boxes: torch.Tensor,
    masks: torch.Tensor,
    options: SamplingOptions,
    convention: Convention = MXNET,
) -> RoiTargets:
    """What chosen RoIs learn.

    Args:
        rois: (M, 4).
        labels: (M,) int64.
        objects: (M,) int64 index of each RoI's object; of no meaning unless the label is above 0.
        boxes: (G, 4) of the objects.
        masks: (G, H, W) bool, or shares from 0 to 1.
        options: see :class:`SamplingOptions`.
        convention: of the boxes.
    """
    positive = (labels > 0).nonzero()[:, 0]
    deltas = rois.new_zeros(len(rois), 4)
    size = options.mask_size
    inside = torch.full((len(rois), size, size), IGNORED, dtype=torch.int64, device=rois.device)
    if len(positive):
        matched = objects[positive]
        deviations = rois.new_tensor(options.deviations)
        deltas[positive] = encode(rois[positive], boxes[matched], convention) / deviations
        shares = crop_masks(rois[positive], boxes[matched], masks, matched, size, convention)
        inside[positive] = (shares >= options.mask_threshold).long()
    return RoiTargets(rois, labels, deltas, inside)


def crop_masks(
    rois: torch.Tensor,
    boxes: torch.Tensor,
    masks: torch.Tensor,
    objects: torch.Tensor,
    size: int,
    convention: Convention = MXNET,
) -> torch.Tensor:
    """The part of each object's mask in a RoI and the object's box, resized (bilinear) to P x P.

    Args:
        rois: (M, 4), rounded here, halves to even.
        boxes: (M, 4) of the RoIs' objects, likewise. The convention of offset 0 does not cut at them.
        masks: (G, H, W) bool, or shares from 0 to 1.
        objects: (M,) int64 indices into ``masks``.
        size: P.
        convention: of the boxes.

    Returns:
        (M, P, P) float, shares from 0 to 1.
    """
    roi, box = rois.round(), boxes.round()
    if not convention.offset:
        box = torch.cat([torch.zeros_like(box[:, :2]), box.new_tensor(masks.shape[:0:-1]).expand(len(box), 2)], dim=1)
    before, after, share, valid = zip(
        *(_places(roi[:, axis::2], box[:, axis::2], size, masks.shape[2 - axis], convention) for axis in (0, 1)),
        strict=True,
    )

    def row(y: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Mixed along x at the rows y (M, P): (M, P, P)."""
        values = []
        for x, seen in ((before[0], valid[0][0]), (after[0], valid[0][1])):
            value = masks[objects[:, None, None], y[:, :, None], x[:, None, :]].to(rois.dtype)
            values.append(value * (visible[:, :, None] & seen[:, None, :]))
        return torch.lerp(values[0], values[1], share[0][:, None, :])

    return torch.lerp(row(before[1], valid[1][0]), row(after[1], valid[1][1]), share[1][:, :, None])


def _places(
    roi: torch.Tensor, box: torch.Tensor, size: int, limit: int, convention: Convention
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Of one axis: the pixels before and after each of the P places, the share of the way, and which pixels count.

    Args:
        roi: (M, 2) first and last pixel, whole numbers.
        box: (M, 2) likewise.
        size: P.
        limit: pixels of the image.
        convention: of both.
    """
    length = (roi[:, 1] - roi[:, 0] + convention.offset).clamp(min=1)
    place = (torch.arange(size, device=roi.device) + 0.5) * (length / size)[:, None] - 0.5
    place = torch.minimum(place.clamp(min=0), length[:, None] - 1)
    before = place.floor()
    after = torch.minimum(before + 1, length[:, None] - 1)
    share = place - before
    pixels, valid = [], []
    for pixel in (before, after):
        pixel = pixel + roi[:, :1]
        last = box[:, 1:] - 1 + convention.offset
        valid.append((pixel >= box[:, :1]) & (pixel <= last) & (pixel >= 0) & (pixel < limit))
        pixels.append(pixel.clamp(0, limit - 1).long())
    return pixels[0], pixels[1], share, (valid[0], valid[1])


def choose_and_make_targets(
    proposals: torch.Tensor,
    boxes: torch.Tensor,
    classes: torch.Tensor,
    masks: torch.Tensor,
    options: SamplingOptions,
    convention: Convention = MXNET,
) -> RoiTargets:
    """Both steps for one image; the objects' boxes are among the candidates if ``proposals`` hold them.

    Args:
        proposals: (K, 4).
        boxes: (G, 4).
        classes: (G,) int64 from 1 on.
        masks: (G, H, W).
        options: see :class:`SamplingOptions`.
        convention: of the boxes.
    """
    overlaps = pairwise_iou(proposals, boxes, convention)
    chosen, labels, objects = sample_rois(overlaps, classes, options)
    return roi_targets(proposals[chosen], labels, objects, boxes, masks, options, convention)


def _draw(indices: torch.Tensor, number: int) -> torch.Tensor:
    """At most ``number`` of them, at random; all in order if there are no more."""
    if len(indices) <= number:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[: max(number, 0)]]


def _draw_repeatedly(indices: torch.Tensor, number: int) -> torch.Tensor:
    """``number`` of them, at random, each as often as any other, up to one; none if there are none."""
    if len(indices) == 0:
        return indices
    rounds = [indices] * (number // len(indices))
    return torch.cat([*rounds, _draw(indices, number % len(indices))])
