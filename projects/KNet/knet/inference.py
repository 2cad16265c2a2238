"""From the last round to instances and the panoptic map of one image, by the rules of the release.

Masks go through the sizes of the output a few at a time, so that memory is bounded by the result, whatever the number
of kernels. Shapes: P thing kernels, S stuff classes, Q = P + S, h x w cells, H x W pixels of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.structures import BitMasks, Instances
from torch.nn import functional as F

Size = tuple[int, int]


@dataclass(frozen=True)
class InferenceOptions:
    """See the keys of ``MODEL.KNET.INFERENCE`` and ``COMBINE``.

    Attributes:
        top_num: instances an image.
        mask_threshold: pixels of an instance have a higher probability.
        things_threshold: least score of a thing in the panoptic map.
        overlap_threshold: a segment that keeps a smaller share of its mask is dropped.
        values_at_once: limit of the float values of masks at full size that are in memory at once, 16 million: 64 MiB.
    """

    top_num: int = 100
    mask_threshold: float = 0.5
    things_threshold: float = 0.3
    overlap_threshold: float = 0.6
    values_at_once: int = 2**24


class Frame(NamedTuple):
    """The sizes that a mask goes through, in pixels.

    Attributes:
        padded: of the batch.
        image: of the image in it.
        output: of the result.
    """

    padded: Size
    image: Size
    output: Size


def full_size(
    mask_logits: torch.Tensor, upsampling: int, frame: Frame, values_at_once: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Probabilities at the size of the output, a few masks at a time.

    Logits (n, h, w) are enlarged ``upsampling`` times; probabilities are resized to the padded image, cut to the image,
    and resized to the output, bilinearly. What lies in the padding is never enlarged.

    Yields:
        Which masks, and their probabilities (m, H, W).
    """
    largest = max(frame.image[0] * frame.image[1], frame.output[0] * frame.output[1])
    number = max(1, values_at_once // largest)
    for first in range(0, len(mask_logits), number):
        chunk = slice(first, min(first + number, len(mask_logits)))
        x = mask_logits[None, chunk]
        if upsampling > 1:
            x = F.interpolate(x, scale_factor=upsampling, mode="bilinear", align_corners=False)
        x = F.interpolate(x.sigmoid(), size=frame.padded, mode="bilinear", align_corners=False)
        x = x[..., : frame.image[0], : frame.image[1]]
        if frame.image != frame.output:
            x = F.interpolate(x, size=frame.output, mode="bilinear", align_corners=False)
        yield chunk, x[0]


def best_pairs(scores: torch.Tensor, top_num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best kernel-class pairs of (P, K) scores: scores, classes and kernels, (n,) each, in descending order.

    One kernel may appear with several classes.
    """
    values, indices = scores.flatten().topk(min(top_num, scores.numel()))
    return values, indices % scores.shape[1], indices // scores.shape[1]


def instances_of(
    mask_logits: torch.Tensor, scores: torch.Tensor, upsampling: int, frame: Frame, options: InferenceOptions
) -> Instances:
    """The instances of one image: the best pairs as they are, without suppression, rescoring or threshold.

    Args:
        mask_logits: (P, h, w).
        scores: (P, K) probabilities of the thing classes.
        upsampling: of the logits.
        frame: see :class:`Frame`.
        options: see :class:`InferenceOptions`.

    Returns:
        Detectron2's, with ``pred_masks`` (n, H, W) bool and ``pred_boxes`` around them (zeros around an empty mask).
    """
    result = Instances(frame.output)
    result.scores, result.pred_classes, kernels = best_pairs(scores, options.top_num)
    # a mask is enlarged once, with however many classes it appears
    shown, position = kernels.unique(return_inverse=True)
    masks = torch.zeros(len(shown), *frame.output, dtype=torch.bool, device=mask_logits.device)
    for chunk, probabilities in full_size(mask_logits[shown], upsampling, frame, options.values_at_once):
        torch.gt(probabilities, options.mask_threshold, out=masks[chunk])
    boxes = BitMasks(masks).get_bounding_boxes()
    result.pred_boxes = boxes[position]
    result.pred_masks = masks[position] if len(shown) < len(position) or not _ascending(position) else masks
    return result


def _ascending(position: torch.Tensor) -> bool:
    return bool((position.diff() > 0).all())


class PixelOwners(NamedTuple):
    """Which kernel has which pixel.

    Attributes:
        owner: (H, W) int64: the kernel of the largest score times probability.
        area: (Q,) pixels in which the probability is one half or more.
    """

    owner: torch.Tensor
    area: torch.Tensor


def pixel_owners(
    mask_logits: torch.Tensor, scores: torch.Tensor, upsampling: int, frame: Frame, values_at_once: int
) -> PixelOwners:
    """Shares out the pixels among (Q, h, w) masks with (Q,) scores; of equal kernels the first has the pixel."""
    best = mask_logits.new_full(frame.output, -1.0)
    owner = torch.zeros(frame.output, dtype=torch.int64, device=mask_logits.device)
    area = owner.new_zeros(len(mask_logits))
    for chunk, probabilities in full_size(mask_logits, upsampling, frame, values_at_once):
        area[chunk] = (probabilities >= 0.5).flatten(1).sum(dim=1)
        value, index = (probabilities * scores[chunk, None, None]).max(dim=0)
        better = value > best
        owner[better] = index[better] + chunk.start
        torch.maximum(best, value, out=best)
    return PixelOwners(owner, area)


def merge_scores(class_scores: torch.Tensor, num_thing_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and class (Q,) of each kernel, from (Q, K) class probabilities.

    A thing kernel has its best thing class, stuff kernel j has class ``num_thing_classes + j``.
    """
    num_stuff = class_scores.shape[1] - num_thing_classes
    num_things = len(class_scores) - num_stuff
    scores, labels = class_scores[:num_things, :num_thing_classes].max(dim=1)
    stuff = class_scores[num_things:, num_thing_classes:].diagonal()
    return torch.cat([scores, stuff]), torch.cat(
        [labels, torch.arange(num_stuff, device=labels.device) + num_thing_classes]
    )


def panoptic_of(
    mask_logits: torch.Tensor,
    class_scores: torch.Tensor,
    num_thing_classes: int,
    upsampling: int,
    frame: Frame,
    options: InferenceOptions,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The panoptic map of one image.

    Pixels go to the kernel of the largest score times probability. Kernels become segments in descending order of
    score, unless they are things of a score below the threshold, or keep less than ``overlap_threshold`` of their mask:
    pixels they own over pixels where their probability is one half or more, a ratio that may exceed 1. Pixels of what
    is dropped stay 0.

    Args:
        mask_logits: (Q, h, w), thing kernels first.
        class_scores: (Q, K) probabilities, thing classes first.
        num_thing_classes: of K.
        upsampling: of the logits.
        frame: see :class:`Frame`.
        options: see :class:`InferenceOptions`.

    Returns:
        The map of ids (H, W) int32 and Detectron2's ``segments_info``; categories of stuff are 1 to S.
    """
    scores, labels = merge_scores(class_scores, num_thing_classes)
    owner, area = pixel_owners(mask_logits, scores, upsampling, frame, options.values_at_once)
    owned = torch.bincount(owner.flatten(), minlength=len(scores))
    # everything that decides comes to the host at once
    decisive = torch.stack([scores.double(), labels.double(), owned.double(), area.double()], dim=1).cpu()
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    segments: list[dict[str, Any]] = []
    ids = [0] * len(scores)
    for kernel in order:
        score, label, mine, whole = decisive[kernel].tolist()
        is_thing = label < num_thing_classes
        if (is_thing and score < options.things_threshold) or not mine or not whole:
            continue
        if mine / whole < options.overlap_threshold:
            continue
        ids[kernel] = len(segments) + 1
        category = int(label) if is_thing else int(label) - num_thing_classes + 1
        segment = {"id": len(segments) + 1, "isthing": is_thing, "category_id": category, "area": int(mine)}
        segments.append({**segment, "score": score})
    return torch.tensor(ids, dtype=torch.int32, device=owner.device)[owner], segments
