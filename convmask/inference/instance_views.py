"""Instances of several views of one image become one list of instances.

Rules, for V views that the model has seen, all results being in pixels of the same output:

1. Detections of all views, in descending order of score (equal ones in order of the views). One joins that group of its
   class whose first detection it overlaps most, if the IoU reaches the threshold and the group has none of its view
   yet. Otherwise it begins a group. So what one view gives twice stays two, and one view alone changes nothing.
2. Overlap is the IoU of the masks; of the boxes, where there are no masks, or one of the two is empty.
3. A group of the members M with scores s_m, masks M_m and boxes b_m becomes one instance with

       score  = sum of s_m / V            a view that has not found it counts as 0
       mask   = pixels p with  sum of s_m M_m(p)  >=  1/2 sum of s_m
       box    = sum of s_m b_m / sum of s_m

4. Those of the highest score remain, up to the limit.

A detection with neither a pixel nor an area of its box overlaps nothing: such ones are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_iou

# Sums of the same scores in another order may differ by this much.
_ROUNDING = 1e-9


@dataclass
class _Detections:
    """N detections of all views in descending order of score. Masks are kept inside their boxes only."""

    views: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    codes: list[dict[str, Any]] | None = None
    corners: np.ndarray | None = None
    crops: list[np.ndarray] | None = None


def merge_instances(views: Sequence[Instances], threshold: float = 0.5, limit: int | None = None) -> Instances:
    """Merges the detections of several views by the rules of this module.

    Args:
        views: at least one; all at the same output size, with ``scores`` (N,), ``pred_classes`` (N,), ``pred_boxes``
            and, in all or in none, ``pred_masks`` (N, H, W) bool.
        threshold: least IoU of detections of one object, above 0.
        limit: of the result; None for none.

    Returns:
        ``pred_boxes``, ``scores``, ``pred_classes`` and, if the views have them, ``pred_masks``, in descending order of
        score, on the device of the first view.

    Raises:
        ValueError: there is no view, or their sizes differ.
    """
    if not views:
        raise ValueError("merge_instances: there is no view")
    sizes = {tuple(view.image_size) for view in views}
    if len(sizes) > 1:
        raise ValueError(f"merge_instances: the views have the sizes {sorted(sizes)}, but must have one")
    found = _collect(views)
    groups = _groups(found, len(views), threshold)
    scores = np.array([found.scores[group].sum() / len(views) for group in groups])
    order = np.argsort(-scores, kind="stable")[:limit]
    return _instances(found, [groups[index] for index in order], scores[order], views[0])


def _collect(views: Sequence[Instances]) -> _Detections:
    parts = [_of_view(index, view) for index, view in enumerate(views)]
    found = _Detections(
        np.concatenate([part.views for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.classes for part in parts]),
        np.concatenate([part.boxes for part in parts]),
    )
    extent = (found.boxes[:, 2:] - found.boxes[:, :2]).clip(min=0).prod(axis=1)
    codes: list[Any] = []
    crops: list[Any] = []
    corners = np.zeros((len(extent), 2), dtype=np.int64)
    if parts[0].codes is not None:
        codes = [code for part in parts for code in part.codes or ()]
        crops = [crop for part in parts for crop in part.crops or ()]
        corners = np.concatenate([part.corners for part in parts if part.corners is not None])
        extent += [crop.size for crop in crops]
    kept = np.flatnonzero(extent > 0)
    kept = kept[np.argsort(-found.scores[kept], kind="stable")]
    result = _Detections(found.views[kept], found.scores[kept], found.classes[kept], found.boxes[kept])
    if parts[0].codes is not None:
        result.codes, result.crops = [codes[index] for index in kept], [crops[index] for index in kept]
        result.corners = corners[kept]
    return result


def _of_view(index: int, view: Instances) -> _Detections:
    result = _Detections(
        np.full(len(view), index),
        view.scores.double().cpu().numpy(),
        view.pred_classes.cpu().numpy(),
        view.pred_boxes.tensor.double().cpu().numpy(),
    )
    if view.has("pred_masks"):
        masks = view.pred_masks.to("cpu", torch.uint8).numpy()
        result.codes = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        windows = np.asarray(mask_util.toBbox(result.codes) if result.codes else np.zeros((0, 4))).astype(np.int64)
        result.corners = windows[:, :2]
        result.crops = [
            mask[y : y + height, x : x + width].copy()
            for mask, (x, y, width, height) in zip(masks, windows.tolist(), strict=True)
        ]
    return result


def _groups(found: _Detections, num_views: int, threshold: float) -> list[np.ndarray]:
    """Indices of the members of each group, the first of them its first detection."""
    groups: list[np.ndarray] = []
    for category in np.unique(found.classes):
        own = np.flatnonzero(found.classes == category)
        group_of = group_by_overlap(_overlaps(found, own), found.views[own], num_views, threshold)
        order = np.argsort(group_of, kind="stable")
        groups += np.split(own[order], np.flatnonzero(np.diff(group_of[order])) + 1)
    return sorted(groups, key=lambda members: int(members[0]))


def _overlaps(found: _Detections, own: np.ndarray) -> np.ndarray:
    """(n, n) IoU of some of the detections."""
    boxes = torch.from_numpy(found.boxes[own])
    if found.codes is None or found.crops is None:
        return box_iou(boxes, boxes).nan_to_num().numpy()
    codes = [found.codes[index] for index in own]
    overlaps = np.asarray(mask_util.iou(codes, codes, [0] * len(codes)))
    empty = np.array([found.crops[index].size == 0 for index in own])
    if empty.any():
        of_boxes = box_iou(boxes, boxes).nan_to_num().numpy()
        overlaps = np.where(empty[:, None] | empty, of_boxes, overlaps)
    return overlaps


def group_by_overlap(overlaps: np.ndarray, views: np.ndarray, num_views: int, threshold: float) -> np.ndarray:
    """The group of each of N things that are ranked, best first: rule 1 of this module.

    Args:
        overlaps: (N, N) IoU.
        views: (N,) from 0 to ``num_views`` - 1.
        num_views: of which a group has at most one thing each.
        threshold: least IoU with the first one of the group.

    Returns:
        (N,) int64, groups counted from 0 in order of their first members.
    """
    count = len(views)
    groups, leaders = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    taken = np.zeros((count, num_views), dtype=bool)
    number = 0
    for index, view in enumerate(views.tolist()):
        candidates = np.where(taken[:number, view], -1.0, overlaps[index, leaders[:number]])
        best = int(candidates.argmax()) if number else 0
        if number == 0 or candidates[best] < threshold:
            best, number = number, number + 1
            leaders[best] = index
        groups[index] = best
        taken[best, view] = True
    return groups


def _instances(found: _Detections, groups: list[np.ndarray], scores: np.ndarray, like: Instances) -> Instances:
    height, width = like.image_size
    result = Instances((height, width))
    device = like.scores.device
    boxes = [np.average(found.boxes[group], axis=0, weights=_weights(found, group)) for group in groups]
    result.pred_boxes = Boxes(torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32, device=device))
    result.scores = torch.from_numpy(scores).to(device, like.scores.dtype)
    classes = found.classes[[group[0] for group in groups]] if groups else np.zeros(0, np.int64)
    result.pred_classes = torch.from_numpy(classes).to(device, torch.int64)
    if found.crops is not None:
        masks = np.zeros((len(groups), height, width), dtype=bool)
        for mask, group in zip(masks, groups, strict=True):
            _paint_majority(mask, found, group)
        result.pred_masks = torch.from_numpy(masks).to(device)
    return result


def _weights(found: _Detections, group: np.ndarray) -> np.ndarray:
    """Scores, where any is above 0."""
    weights = found.scores[group]
    return weights if weights.sum() > 0 else np.ones(len(group))


def _paint_majority(mask: np.ndarray, found: _Detections, group: np.ndarray) -> None:
    """Sets the pixels of ``mask`` (H, W) that members of half of the weight have."""
    assert found.crops is not None and found.corners is not None
    members = [(found.crops[index], *found.corners[index].tolist()) for index in group]
    if len(members) == 1:
        crop, x, y = members[0]
        mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        return
    members_weights = _weights(found, group)
    left, top = (min(member[axis] for member in members) for axis in (1, 2))
    right = max(x + crop.shape[1] for crop, x, _ in members)
    bottom = max(y + crop.shape[0] for crop, _, y in members)
    votes = np.zeros((bottom - top, right - left))
    for (crop, x, y), weight in zip(members, members_weights, strict=True):
        votes[y - top : y - top + crop.shape[0], x - left : x - left + crop.shape[1]] += weight * crop
    mask[top:bottom, left:right] = votes >= (0.5 - _ROUNDING) * members_weights.sum()
