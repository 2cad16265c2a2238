"""Panoptic merging: instance masks and a map of semantic labels become one map of segment ids.

The rules (Kirillov et al., "Panoptic Feature Pyramid Networks", section 3.1; Detectron2's
``combine_semantic_and_instance_outputs``), with N instances on H x W pixels:

1. Instances in descending order of score, equal scores in their own order, up to the first score below the threshold.
   One whose mask is empty, or covered by those before it to more than ``overlap_threshold`` of its area, is left out.
   The others paint the pixels that are still free with the next id: 1, 2, ...
2. Semantic labels in ascending order, the things labels left out. One with fewer than ``stuff_area_limit`` free pixels
   is left out. The others paint their free pixels with the next id.
3. What is left is 0, void.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convmask.ops._registration import register_operator

# Semantic labels are 16-bit integers, so that a kernel counts them in a table and never sorts the pixels.
FIRST_LABEL, LABELS = -32768, 65536

_SCHEMA = (
    "panoptic_merge(Tensor masks, Tensor scores, Tensor classes, Tensor sem_seg, float overlap_threshold, "
    "int stuff_area_limit, float score_threshold, float mask_threshold, int[] things_labels) "
    "-> (Tensor panoptic_seg, Tensor segments, Tensor counts)"
)


def panoptic_merge(
    masks: Tensor,
    scores: Tensor,
    classes: Tensor,
    sem_seg: Tensor,
    *,
    overlap_threshold: float = 0.5,
    stuff_area_limit: int = 4096,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    things_label: int | Sequence[int] = 0,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Merges instance masks and semantic labels into a panoptic segmentation (rules: see the module).

    All tensors are on one device. One transfer from the device to the host takes place, for ``segments_info``; the
    operator below it, ``torch.ops.convmask.panoptic_merge``, has none. Not differentiable. The result does not depend
    on the number of threads.

    Args:
        masks: (N, H, W) bool, or float16, bfloat16, float32 or float64 probabilities.
        scores: (N,) floating, in any order.
        classes: (N,) int64, contiguous thing ids, from 0.
        sem_seg: (H, W), any integer type: the label of each pixel, from -32768 to 32767.
        overlap_threshold: an instance is left out if more than this share of its mask is painted already.
        stuff_area_limit: a label with fewer free pixels than this is left out. In pixels.
        score_threshold: merging of instances stops at the first score below.
        mask_threshold: probabilities from here on count as mask. Not used for bool masks.
        things_label: the semantic label or labels that are never painted: 0 where things share one label; the labels of
            all things, and perhaps 255 for ignored pixels, where each class has its own.

    Returns:
        The map of ids, (H, W) int32, and Detectron2's ``segments_info``: a dict for each id from 1, in order. Things:
        ``id, isthing=True, score, category_id`` (the class), ``instance_id`` (index into the arguments). Stuff:
        ``id, isthing=False, category_id`` (the label), ``area`` (painted pixels).

    Raises:
        ValueError: a shape or device does not fit, or a label is out of range; names the argument.
        TypeError: a dtype does not fit; names the argument.
    """
    things_labels = [things_label] if isinstance(things_label, int) else [int(label) for label in things_label]
    if sem_seg.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        sem_seg = sem_seg.long()
    _check(masks, scores, classes, sem_seg)
    panoptic_seg, segments, counts = torch.ops.convmask.panoptic_merge(
        *(masks, scores, classes, sem_seg, float(overlap_threshold), int(stuff_area_limit)),
        *(float(score_threshold), float(mask_threshold), things_labels),
    )
    exact_scores = scores.detach().double().view(torch.int64)  # bit patterns: all is one tensor, and one transfer
    table = torch.cat([counts, exact_scores, segments.flatten()]).cpu()
    things, stuff, out_of_range = table[:3].tolist()
    if out_of_range:
        raise ValueError(f"sem_seg has labels outside {FIRST_LABEL} to {FIRST_LABEL + LABELS - 1}")
    scores_start, segments_start = 3, 3 + len(scores)
    rows = table[segments_start : segments_start + 3 * (things + stuff)].view(-1, 3).tolist()
    return panoptic_seg, _segments_info(rows, things, table[scores_start:segments_start].view(torch.float64).tolist())


def _segments_info(rows: list[list[int]], things: int, scores: list[float]) -> list[dict[str, Any]]:
    segments_info: list[dict[str, Any]] = []
    for segment_id, (category, instance, area) in enumerate(rows, start=1):
        if segment_id <= things:
            entry = {"isthing": True, "score": scores[instance], "category_id": category, "instance_id": instance}
        else:
            entry = {"isthing": False, "category_id": category, "area": area}
        segments_info.append({"id": segment_id, **entry})
    return segments_info


def panoptic_merge_reference(
    masks: Tensor,
    scores: Tensor,
    classes: Tensor,
    sem_seg: Tensor,
    overlap_threshold: float,
    stuff_area_limit: int,
    score_threshold: float,
    mask_threshold: float,
    things_labels: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain PyTorch; the kernel where no compiled one is loaded. Synchronises with the device.

    Args:
        masks: as all arguments, see ``panoptic_merge``; ``sem_seg`` is int64 and ``things_labels`` a list.

    Returns:
        - ``panoptic_seg``: (H, W) int32.
        - ``segments``: (capacity, 3) int64, row ``id - 1`` is (class or label, index of the instance or -1, painted
          pixels), and zeros from the last segment on. Capacity: N, and one for each ``stuff_area_limit`` pixels, but at
          most 65536.
        - ``counts``: (3,) int64, number of things, number of stuff segments, and 1 if a label that the stuff rule
          looked at is out of range, else 0.

    Raises:
        ValueError, TypeError: see ``panoptic_merge``.
    """
    _check(masks, scores, classes, sem_seg)
    binary = masks if masks.dtype == torch.bool else masks >= mask_threshold
    panoptic_seg, rows = _paint_things(binary, scores.double(), classes, overlap_threshold, score_threshold)
    things = len(rows)
    # A label without any free pixel counts only where a segment of no pixels is allowed.
    labels = (sem_seg[panoptic_seg == 0] if stuff_area_limit > 0 else sem_seg.flatten()).unique()
    in_range = (labels >= FIRST_LABEL) & (labels < FIRST_LABEL + LABELS)
    for label in labels[in_range].tolist():
        if label in things_labels:
            continue
        mask = (sem_seg == label) & (panoptic_seg == 0)
        area = int(mask.sum())
        if area < stuff_area_limit:
            continue
        rows.append([label, -1, area])
        panoptic_seg[mask] = len(rows)

    segments = sem_seg.new_zeros(_segment_capacity(len(masks), sem_seg.numel(), stuff_area_limit), 3)
    segments[: len(rows)] = sem_seg.new_tensor(rows).view(-1, 3)
    counts = sem_seg.new_tensor([things, len(rows) - things, int(not in_range.all())])
    return panoptic_seg, segments, counts


def _paint_things(
    masks: Tensor, scores: Tensor, classes: Tensor, overlap_threshold: float, score_threshold: float
) -> tuple[Tensor, list[list[int]]]:
    panoptic_seg = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    exact_scores, categories = scores.tolist(), classes.tolist()
    rows: list[list[int]] = []
    for instance in torch.argsort(-scores, stable=True).tolist():
        if exact_scores[instance] < score_threshold:
            break
        mask = masks[instance]
        area = int(mask.sum())
        if area == 0:
            continue
        free = mask & (panoptic_seg == 0)
        painted = int(free.sum())
        if (area - painted) / area > overlap_threshold:
            continue
        rows.append([categories[instance], instance, painted])
        panoptic_seg[free] = len(rows)
    return panoptic_seg, rows


def _fake(
    masks: Tensor,
    scores: Tensor,
    classes: Tensor,
    sem_seg: Tensor,
    overlap_threshold: float,
    stuff_area_limit: int,
    score_threshold: float,
    mask_threshold: float,
    things_labels: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    _check(masks, scores, classes, sem_seg)
    capacity = _segment_capacity(masks.shape[0], sem_seg.numel(), stuff_area_limit)
    return sem_seg.new_empty(sem_seg.shape, dtype=torch.int32), sem_seg.new_empty(capacity, 3), sem_seg.new_empty(3)


def _segment_capacity(instances: int, pixels: int, stuff_area_limit: int) -> int:
    # sym_min keeps sizes symbolic while a graph is traced.
    return instances + torch.sym_min(pixels // max(stuff_area_limit, 1), LABELS)


def _check(masks: Tensor, scores: Tensor, classes: Tensor, sem_seg: Tensor) -> None:
    if masks.dim() != 3:
        raise ValueError(f"masks must have shape (N, H, W), not {tuple(masks.shape)}")
    if masks.dtype != torch.bool and not masks.is_floating_point():
        raise TypeError(f"masks must be bool or floating, not {masks.dtype}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating, not {scores.dtype}")
    for name, tensor, shape in (
        ("scores", scores, masks.shape[:1]),
        ("classes", classes, masks.shape[:1]),
        ("sem_seg", sem_seg, masks.shape[1:]),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit the masks, not {tuple(tensor.shape)}")
        if tensor.device != masks.device:
            raise ValueError(f"{name} is on {tensor.device}, but masks are on {masks.device}")
        if name != "scores" and tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, not {tensor.dtype}")


register_operator(_SCHEMA, reference=panoptic_merge_reference, fake=_fake, slowdown="about 10 to 25 times slower")
