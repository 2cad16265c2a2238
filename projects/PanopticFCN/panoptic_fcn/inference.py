"""From what the heads predict to instances, semantic map and panoptic map of one image (arXiv 2012.00720, section 3.3).

Shapes: level l of H_l x W_l cells, C thing classes, S region classes, K channels of the kernel map, h x w cells of the
encoded feature, n thing and m stuff kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from convmask.ops.fuse_kernels import fuse_kernels
from convmask.ops.region_kernels import region_kernels

from .rescale import Size, strips

# Side of the window in which centre scores are smoothed: larger on the levels of large objects.
_SMALL_WINDOW, _LARGE_WINDOW, _FIRST_LARGE = 3, 5, 3
# Probabilities that are worked on at a time.
_CHUNK = 2**18
# Rows of the output that are worked on at a time.
_ROWS = 32


@dataclass(frozen=True)
class InferenceOptions:
    """See the keys of ``MODEL.PANOPTIC_FCN.INFERENCE`` and ``STUFF``.

    Attributes:
        thing_threshold: least score of a centre.
        stuff_threshold: least mean score of a region.
        top_num: instances an image; half of it is the limit of a level.
        similar_threshold: cosine from which kernels are fused.
        class_specific: only kernels of one class are fused.
        mask_threshold: pixels of a mask have a higher probability.
        mask_score_threshold: least score of an instance after it is multiplied by the mean probability of its mask.
        matrix_nms: Matrix NMS of the masks.
        kernel_average: of stuff, "map" or "region".
    """

    thing_threshold: float = 0.05
    stuff_threshold: float = 0.05
    top_num: int = 100
    similar_threshold: float = 0.9
    class_specific: bool = True
    mask_threshold: float = 0.4
    mask_score_threshold: float = 0.05
    matrix_nms: bool = False
    kernel_average: Literal["map", "region"] = "map"


class Kernels(NamedTuple):
    """Vectors of the kernel map with what they stand for.

    Attributes:
        vectors: (n, K).
        scores: (n,).
        classes: (n,) thing or region classes.
    """

    vectors: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor


class Masks(NamedTuple):
    """Masks at the common stride.

    Attributes:
        probabilities: (n, h, w).
        scores: (n,).
        classes: (n,).
    """

    probabilities: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor


def center_peaks(
    logits: torch.Tensor, window: int, *, threshold: float, limit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Local maxima of the smoothed centre scores of a level.

    Scores are the mean of the sigmoid and of its average in the window. A cell is a peak where none of its eight
    neighbours is higher; of equal neighbours all are peaks.

    Args:
        logits: (C, H_l, W_l).
        window: side of the window, odd. Cells outside the map count as 0.
        threshold: peaks have a higher score.
        limit: most peaks, those with the highest scores. Equal ones are in the order of ``torch.topk`` within their
            class, then over classes: plateaus do occur, and the release breaks their ties so.

    Returns:
        Scores, classes and flat cells, each (n,), in descending order of score.
    """
    limit = min(limit, logits.shape[1] * logits.shape[2])
    scores = logits.sigmoid()
    average = F.avg_pool2d(scores[None], window, stride=1, padding=window // 2)[0]
    scores = (scores + average) / 2
    peaks = (scores * (scores == _highest_around(scores))).flatten(1)
    best, cells = peaks.topk(limit, dim=1)
    values, order = best.flatten().topk(limit)
    order, values = order[values > threshold], values[values > threshold]
    return values, order // limit, cells.flatten()[order]


def _highest_around(scores: torch.Tensor) -> torch.Tensor:
    """Maximum of (C, H, W) scores over 3x3 cells: several times faster than max pooling on the CPU."""
    for dim in (1, 2):
        length = scores.shape[dim] - 1
        before, after = scores.narrow(dim, 0, length), scores.narrow(dim, 1, length)
        highest = scores.clone()
        for target, neighbour in ((highest.narrow(dim, 1, length), before), (highest.narrow(dim, 0, length), after)):
            torch.maximum(target, neighbour, out=target)
        scores = highest
    return scores


def thing_kernels(
    centers: Sequence[torch.Tensor], kernels: Sequence[torch.Tensor], options: InferenceOptions
) -> Kernels:
    """Kernels at the peaks of all levels, in descending order of score.

    Args:
        centers: (C, H_l, W_l) logits of each level.
        kernels: (K, H_l, W_l) of each level.
        options: see :class:`InferenceOptions`.
    """
    found = []
    for level, (logits, kernel_map) in enumerate(zip(centers, kernels, strict=True)):
        window = _LARGE_WINDOW if level >= _FIRST_LARGE else _SMALL_WINDOW
        scores, classes, cells = center_peaks(
            logits, window, threshold=options.thing_threshold, limit=options.top_num // 2
        )
        found.append((kernel_map.flatten(1)[:, cells].T, scores, classes))
    things = Kernels(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    order = things.scores.argsort(descending=True)
    return Kernels(*(x[order] for x in things))


def stuff_kernels(
    regions: Sequence[torch.Tensor], kernels: Sequence[torch.Tensor], options: InferenceOptions
) -> Kernels:
    """Kernels of the regions of all levels: each cell belongs to its best class.

    Args:
        regions: (S, H_l, W_l) logits of each level.
        kernels: (K, H_l, W_l) of each level.
        options: see :class:`InferenceOptions`.
    """
    found = []
    for logits, kernel_map in zip(regions, kernels, strict=True):
        best, label = logits.sigmoid().flatten(1).max(dim=0)
        sums = best.new_zeros(len(logits)).index_add(0, label, best)
        scores = sums / torch.bincount(label, minlength=len(logits)).clamp(min=1)
        classes = (scores > options.stuff_threshold).nonzero()[:, 0]
        masks = (label == classes[:, None]).view(1, len(classes), *logits.shape[1:])
        vectors = region_kernels(kernel_map[None], masks, average=options.kernel_average)[0]
        found.append((vectors, scores[classes], classes))
    return Kernels(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def fuse_things(things: Kernels, options: InferenceOptions) -> Kernels:
    """Similar kernels become their mean, with the score and class of the best: see :func:`fuse_kernels`.

    ``vectors`` are embedded: the similarity is that of the kernels that are applied to the feature.
    """
    if options.similar_threshold > 1:
        return things
    vectors, kept = fuse_kernels(*things, threshold=options.similar_threshold, class_specific=options.class_specific)
    return Kernels(vectors, things.scores[kept], things.classes[kept])


def fuse_stuff(stuff: Kernels) -> Kernels:
    """The mean, over the levels, of the kernels and scores of each class; classes ascend."""
    classes, group = stuff.classes.unique(return_inverse=True)
    counts = torch.bincount(group, minlength=len(classes)).clamp(min=1)
    vectors = stuff.vectors.new_zeros(len(classes), stuff.vectors.shape[1]).index_add(0, group, stuff.vectors)
    scores = stuff.scores.new_zeros(len(classes)).index_add(0, group, stuff.scores)
    return Kernels(vectors / counts[:, None], scores / counts, classes)


def cut_out(kernels: Kernels, encoded: torch.Tensor) -> Masks:
    """Mask probabilities: each (n, E) kernel as a 1x1 convolution of the encoded feature (E, h, w)."""
    logits = kernels.vectors @ encoded.flatten(1)
    return Masks(logits.sigmoid_().unflatten(1, encoded.shape[1:]), kernels.scores, kernels.classes)


def rescore(masks: Masks, options: InferenceOptions) -> Masks:
    """Multiplies scores by the mean probability inside the mask; drops low ones and all but the best ``top_num``."""
    area, total = _area_and_sum(masks.probabilities, options.mask_threshold)
    scores = masks.scores * total / (area + 1e-6)
    if options.matrix_nms:
        scores = scores * matrix_nms_decay(masks.probabilities > options.mask_threshold, scores, masks.classes)
    scores, order = scores.sort(descending=True, stable=True)
    order = order[scores >= options.mask_score_threshold][: options.top_num]
    return Masks(masks.probabilities[order], scores[: len(order)], masks.classes[order])


def _area_and_sum(probabilities: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How many probabilities of each mask are higher than the threshold, and their sum, (n,) each.

    In chunks that fit the cache, and in floats, which torch adds up ten times as fast as it counts truth values.
    """
    flat = probabilities.flatten(1)
    areas, totals = [], []
    for chunk in flat.split(max(1, _CHUNK // max(1, flat.shape[1]))):
        inside = F.threshold(chunk, threshold, 0.0)
        totals.append(inside.sum(dim=1))
        areas.append(inside.sign_().sum(dim=1))
    return torch.cat(areas), torch.cat(totals)


def semantic_map(
    stuff: Masks, num_labels: int, stride: int, image: Size, output: Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and best labels at the size of the output.

    Args:
        stuff: masks at the common stride; their classes are labels, ascending.
        num_labels: there are.
        stride: the common stride.
        image: height and width that the network saw, without padding.
        output: height and width of the result.

    Returns:
        (num_labels, H, W), exactly 0 for labels without a mask; and (H, W) int64, the first of equally probable labels,
        0 where no label has a probability.
    """
    device = stuff.probabilities.device
    sem_seg = torch.empty(num_labels, *output, device=device)
    best_labels = torch.zeros(output, dtype=torch.int64, device=device)
    labels = stuff.classes.tolist()
    for label in set(range(num_labels)) - set(labels):
        sem_seg[label].zero_()
    if not labels:
        return sem_seg, best_labels
    # strips are for the cache: a GPU takes all at once
    rows = _ROWS if device.type == "cpu" else output[0]
    for start, strip in strips(stuff.probabilities, stride, image, output, rows):
        here = slice(start, start + strip.shape[1])
        best = torch.zeros_like(strip[0])
        for probability, label in zip(strip, labels, strict=True):
            sem_seg[label, here] = probability
            best_labels[here].masked_fill_(probability > best, label)
            torch.maximum(best, probability, out=best)
    return sem_seg, best_labels


def matrix_nms_decay(
    masks: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, sigma: float = 2.0
) -> torch.Tensor:
    """Factors of the scores by Matrix NMS with a Gaussian kernel (SOLOv2, arXiv 2003.10152, section 3.3).

    Args:
        masks: (n, h, w) bool.
        scores: (n,).
        classes: (n,): masks of one class suppress each other.
        sigma: of the Gaussian.

    Returns:
        (n,), at most 1.
    """
    order = scores.sort(descending=True, stable=True).indices
    flat, classes = masks[order].flatten(1).float(), classes[order]
    shared = flat @ flat.T
    area = flat.sum(dim=1)
    iou = shared / (area[:, None] + area - shared).clamp(min=1)
    # [i, j]: overlap of j with a better i of its class
    iou = torch.where(classes[:, None] == classes, iou, 0.0).triu(1)
    compensation = iou.amax(dim=0) if len(iou) else area
    decay = torch.exp(-sigma * (iou.square() - compensation.square()[:, None]))
    decay = decay.masked_fill(torch.ones_like(iou, dtype=torch.bool).tril(), 1.0)
    factors = decay.amin(dim=0) if len(decay) else area
    return torch.empty_like(factors).scatter(0, order, factors.clamp(max=1.0))
