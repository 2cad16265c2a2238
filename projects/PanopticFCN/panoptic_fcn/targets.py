"""What the heads learn: Gaussian centres of things, soft regions of stuff (arXiv 2012.00720, section 3.2).

Everything is computed for all instances of a batch at once. Shapes: N images, T instances of the whole batch, C thing
classes, S region classes, h x w cells of the encoded feature, level l of H_l x W_l cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances
from torch.nn import functional as F

from .resize import ReducedRows, add_labels, paste_rows, reduce_rows

Size = tuple[int, int]

IGNORE_LABEL = 255
CENTERS = ("mass", "box")


@dataclass(frozen=True)
class TargetOptions:
    """How targets are made; see the keys of ``MODEL.PANOPTIC_FCN.TARGETS``.

    Attributes:
        num_classes: C.
        num_regions: S.
        with_things: region classes are the labels of the semantic map. Otherwise label 0, "things", is none of them.
        center: "mass" or "box".
        min_overlap: of a box moved by the radius with the true one.
        gaussian_sigma: diameter of the Gaussian over its standard deviation.
        scales: (least, greatest) square root of the box areas of each level, in pixels, both included.
        ignored_as_negative: pixels without a label are negatives.
    """

    num_classes: int
    num_regions: int
    with_things: bool = True
    center: str = "mass"
    min_overlap: float = 0.7
    gaussian_sigma: float = 3.0
    scales: tuple[tuple[float, float], ...] = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))
    ignored_as_negative: bool = True


@dataclass
class Objects:
    """The instances of a batch that have a mask at stride 4.

    Attributes:
        masks: (T, h, w) float, shares of the cells.
        images: (T,) index of the image.
        classes: (T,) thing classes.
        boxes: (T, 4) in pixels.
        points: (T, 2) centres (x, y) in cells of the masks.
    """

    masks: torch.Tensor
    images: torch.Tensor
    classes: torch.Tensor
    boxes: torch.Tensor
    points: torch.Tensor


@dataclass
class Targets:
    """Targets of a batch; lists have one entry a level.

    Attributes:
        objects: the instances.
        members: (T_l,) indices of the instances that each level has.
        cells: (T_l, 2) row and column of their centres.
        centers: (N, C, H_l, W_l), 1 at the centre of an instance and falling around it.
        regions: (N, S, H_l, W_l), shares of at least 1/2, 0 elsewhere.
        semantic: (N, S, h, w) shares.
        valid: (N, h, w), share of the labelled pixels; None where unlabelled ones are negatives.
    """

    objects: Objects
    members: list[torch.Tensor]
    cells: list[torch.Tensor]
    centers: list[torch.Tensor]
    regions: list[torch.Tensor]
    semantic: torch.Tensor
    valid: torch.Tensor | None


@torch.no_grad()
def make_targets(
    instances: Sequence[Instances],
    sem_segs: Sequence[torch.Tensor],
    *,
    padded: Size,
    common: Size,
    levels: Sequence[Size],
    options: TargetOptions,
) -> Targets:
    """Makes the targets of a batch.

    Args:
        instances: of each image, ``gt_boxes``, ``gt_classes`` and, unless there are none, ``gt_masks`` (BitMasks).
        sem_segs: (H_i, W_i) int64 labels of each image, 255 for none.
        padded: height and width of the padded images, in pixels.
        common: (h, w) of the encoded feature.
        levels: (H_l, W_l) of each level.
        options: see :class:`TargetOptions`.

    Raises:
        ValueError: a class or label is out of range; the message names the config key.
    """
    if len(options.scales) != len(levels):
        raise ValueError(
            f"MODEL.PANOPTIC_FCN.TARGETS.SCALES has {len(options.scales)} ranges for {len(levels)} levels (IN_FEATURES)"
        )
    stride = padded[0] // common[0]
    objects = collect_objects(instances, common, stride, options)
    shares = objects.masks.new_zeros(len(sem_segs), options.num_regions + 1, *common)
    for sem_seg, canvas in zip(sem_segs, shares, strict=True):
        add_semantic_shares(sem_seg, canvas, stride, options)
    semantic = shares[:, :-1]
    sides = ((objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(dim=1)).sqrt()
    members, cells, centers = [], [], []
    for size, (least, greatest) in zip(levels, options.scales, strict=True):
        member = ((sides >= least) & (sides <= greatest)).nonzero()[:, 0]
        cell = _cells_of(objects.points[member], common, size)
        members.append(member)
        cells.append(cell)
        centers.append(draw_centers(objects, member, cell, len(sem_segs), size, padded, options))
    valid = None if options.ignored_as_negative else _labelled_shares(shares[:, -1], sem_segs, stride)
    return Targets(objects, members, cells, centers, region_targets(semantic, levels), semantic, valid)


def collect_objects(instances: Sequence[Instances], common: Size, stride: int, options: TargetOptions) -> Objects:
    """The instances of all images, those left out whose mask has no pixel at the common stride."""
    device = instances[0].gt_classes.device
    counts = [len(x) for x in instances]
    classes = torch.cat([x.gt_classes for x in instances])
    if len(classes) and int(classes.max()) >= options.num_classes:
        raise ValueError(
            f"MODEL.PANOPTIC_FCN.NUM_CLASSES is {options.num_classes}, but an instance has class {int(classes.max())}"
        )
    boxes = torch.cat([x.gt_boxes.tensor for x in instances]).float()
    masks = torch.zeros(len(classes), *common, device=device)
    pixels, mass = [], []
    for found, canvas in zip(instances, masks.split(counts), strict=True):
        # Detectron2's mappers leave the masks of an image without instances out
        bits = found.gt_masks.tensor if len(found) else torch.zeros(0, 1, 1, dtype=torch.bool, device=device)
        reduced = reduce_rows(bits, *_reduced(found.image_size, stride))
        paste_rows(reduced, canvas)
        area, center = _centers_of_mass(reduced, len(found))
        pixels.append(area)
        mass.append(center)
    images = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
    points = torch.cat(mass) if options.center == "mass" else (boxes[:, :2] + boxes[:, 2:]) / (2 * stride)
    seen = torch.cat(pixels) > 0
    if bool(seen.all()):
        return Objects(masks, images, classes, boxes, points)
    return Objects(masks[seen], images[seen], classes[seen], boxes[seen], points[seen])


def _centers_of_mass(reduced: ReducedRows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of ``count`` masks the number of cells that it touches (count,), and their mean (x, y) (count, 2)."""
    filled = reduced.shares > 0
    cells = filled.sum(dim=1)
    columns = (filled * torch.arange(filled.shape[1], dtype=torch.int32, device=filled.device)).sum(dim=1)
    sums = torch.stack([cells, columns, cells * reduced.rows], dim=1)
    area, x, y = sums.new_zeros(count, 3).index_add_(0, reduced.masks, sums).unbind(1)
    return area, torch.stack([x, y], dim=1) / area[:, None]


def add_semantic_shares(sem_seg: torch.Tensor, canvas: torch.Tensor, stride: int, options: TargetOptions) -> None:
    """Adds the share of each region class, and last that of unlabelled pixels, to (S + 1, h, w) zeros."""
    first = 0 if options.with_things else 1
    labels = torch.where(sem_seg == IGNORE_LABEL, options.num_regions + first, sem_seg)
    least, greatest = (int(x) for x in labels.aminmax())
    if greatest > options.num_regions + first or least < 0:
        raise ValueError(
            f"MODEL.PANOPTIC_FCN.STUFF.NUM_CLASSES is {options.num_regions} "
            f"({'with' if options.with_things else 'without'} things), but the semantic map has label "
            f"{least if least < 0 else greatest}"
        )
    # without things their label becomes -1, which is left out
    add_labels(labels - first if first else labels, *_reduced((sem_seg.shape[0], sem_seg.shape[1]), stride), canvas)


def _labelled_shares(unlabelled: torch.Tensor, sem_segs: Sequence[torch.Tensor], stride: int) -> torch.Tensor:
    """(N, h, w) shares of labelled pixels, of those without a label; 0 in the padding."""
    valid = torch.zeros_like(unlabelled)
    for result, shares, sem_seg in zip(valid, unlabelled, sem_segs, strict=True):
        height, width = _reduced((sem_seg.shape[0], sem_seg.shape[1]), stride)
        result[:height, :width] = 1 - shares[:height, :width]
    return valid


def region_targets(semantic: torch.Tensor, sizes: Sequence[Size]) -> list[torch.Tensor]:
    """(N, S, H_l, W_l) shares at the size of each level, of (N, S, h, w): those of at least 1/2, 0 elsewhere."""
    # an image has few of the classes
    present = semantic.amax(dim=(2, 3)) > 0
    planes = semantic[present][:, None]
    results = []
    for size in sizes:
        shares = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)[:, 0].clamp_(max=1)
        regions = semantic.new_zeros(*semantic.shape[:2], *size)
        regions[present] = shares.masked_fill_(shares < 0.5, 0)
        results.append(regions)
    return results


def draw_centers(
    objects: Objects,
    member: torch.Tensor,
    cell: torch.Tensor,
    num_images: int,
    size: Size,
    padded: Size,
    options: TargetOptions,
) -> torch.Tensor:
    """(N, C, H_l, W_l): a Gaussian of height 1 around each centre, the maximum where they overlap.

    Args:
        objects: all instances.
        member: (T_l,) those to draw.
        cell: (T_l, 2) their rows and columns.
        num_images: N.
        size: (H_l, W_l).
        padded: height and width of the images.
        options: see :class:`TargetOptions`.
    """
    height, width = size
    scale = objects.boxes.new_tensor([width / padded[1], height / padded[0]])
    radius = gaussian_radius((objects.boxes[member, 2:] - objects.boxes[member, :2]) * scale, options.min_overlap)
    # the cells of all windows, one after the other
    side = 2 * radius + 1
    counts = side * side
    owner = torch.repeat_interleave(torch.arange(len(member), device=member.device), counts)
    within = torch.arange(len(owner), device=member.device) - (counts.cumsum(0) - counts)[owner]
    dy = within // side[owner] - radius[owner]
    dx = within % side[owner] - radius[owner]
    y, x = cell[owner, 0] + dy, cell[owner, 1] + dx
    sigma = (side / options.gaussian_sigma)[owner]
    value = torch.exp(-(dx * dx + dy * dy) / (2 * sigma * sigma))
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (value >= torch.finfo(value.dtype).eps)
    instance = member[owner]
    channel = objects.images[instance] * options.num_classes + objects.classes[instance]
    index = (channel * height + y) * width + x
    centers = torch.zeros(num_images * options.num_classes * height * width, device=member.device)
    centers.scatter_reduce_(0, index[inside], value[inside], "amax")
    return centers.view(num_images, options.num_classes, height, width)


def gaussian_radius(sides: torch.Tensor, min_overlap: float) -> torch.Tensor:
    """How far a box may move: CornerNet's released formula (arXiv 1808.01244, section 3.2), in whole cells.

    Of the release's three cases the third is always the smallest. Its root is halved, not divided by twice the leading
    coefficient as it should be; the published weights were trained so.

    Args:
        sides: (T, 2) widths and heights, in cells.
        min_overlap: IoU of the moved box with the true one.

    Returns:
        (T,) int64, at least 0.
    """
    total, area = sides.sum(dim=1), sides.prod(dim=1)
    b = 2 * min_overlap * total
    root = (b * b + 16 * min_overlap * (1 - min_overlap) * area).clamp(min=0).sqrt()
    return ((root - b) / 2).clamp(min=0).long()


def _reduced(size: Size, stride: int) -> Size:
    """Cells of an image of this size; halves are rounded up."""
    return max(int(size[0] / stride + 0.5), 1), max(int(size[1] / stride + 0.5), 1)


def _cells_of(points: torch.Tensor, common: Size, size: Size) -> torch.Tensor:
    """(T, 2) rows and columns of centres (x, y) on a level."""
    scale = points.new_tensor([size[1] / common[1], size[0] / common[0]])
    limit = torch.tensor([size[1] - 1, size[0] - 1], device=points.device)
    return torch.minimum((points * scale).long().clamp(min=0), limit).flip(1)


def sem_seg_and_instances(batched_inputs: list[dict[str, Any]], device: torch.device) -> tuple[list[Any], list[Any]]:
    """``instances`` and ``sem_seg`` of each image, on ``device``.

    Raises:
        ValueError: an image has none; the message names it.
    """
    for key in ("instances", "sem_seg"):
        for inputs in batched_inputs:
            if key not in inputs:
                raise ValueError(
                    f"PanopticFCN: no {key!r} for image {inputs.get('file_name', '')!r}: check INPUT.TARGETS and the "
                    "dataset"
                )
    return [x["instances"].to(device) for x in batched_inputs], [x["sem_seg"].to(device) for x in batched_inputs]
