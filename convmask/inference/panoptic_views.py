"""Panoptic maps of several views of one image vote on one map.

For models whose own rule of merging needs more than their results hold. Rules, for V views:

1. Segments of things form groups over the views, as instances do (``convmask.inference.instance_views``, rule 1), in
   descending order of score. Stuff of one class is one group.
2. Each view has one vote for each pixel: for the group of its segment there, or for void. The group with most votes has
   the pixel; of equal ones the one that more views have, then the one of the higher mean score; void comes last.
3. A group that wins fewer pixels than half of the mean area of its segments is dropped, and its pixels are voted on
   again among the others.

The score of a thing is the sum of its scores over V. One view alone changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch

from convmask.inference.instance_views import group_by_overlap
from convmask.utils.label_runs import encode_masks

PanopticSeg = tuple[torch.Tensor, Sequence[Mapping[str, Any]]]


@dataclass
class _Group:
    """Segments of one thing or stuff class: (view, segment) of each."""

    isthing: bool
    category: int
    members: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)

    def scores(self) -> list[float]:
        return [float(segment["score"]) for _, segment in self.members if segment.get("score") is not None]


def vote_panoptic(views: Sequence[PanopticSeg], threshold: float = 0.5) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Merges the panoptic maps of several views by the rules of this module.

    Args:
        views: at least one; id maps (H, W) of one size, 0 being void, and their ``segments_info`` with ``id``,
            ``isthing`` and ``category_id``, perhaps with ``score``.
        threshold: least IoU of the segments of one thing, above 0.

    Returns:
        The map (H, W) int32, and ``segments_info`` with ``id`` from 1, ``isthing``, ``category_id``, ``area``, and
        ``score`` where the views have one.

    Raises:
        ValueError: there is no view, or one has no ``segments_info``.
    """
    if not views:
        raise ValueError("vote_panoptic: there is no view")
    if any(segments is None for _, segments in views):
        raise ValueError("vote_panoptic: a panoptic map without segments_info cannot be merged with others")
    groups = _ranked(_stuff_groups(views) + _thing_groups(views, threshold))
    void, ignored = len(groups) + 1, len(groups) + 2
    labels = _group_maps(views, groups, void)
    winners = plurality(labels)
    won = torch.bincount(winners.flatten(), minlength=ignored + 1)
    cast = torch.bincount(labels.flatten(), minlength=ignored + 1)
    members = torch.tensor([1, *(len(group.members) for group in groups), 1, 1], device=won.device)
    dropped = won < 0.5 * cast / members
    dropped[[0, void, ignored]] = False
    if dropped.any():
        winners = plurality(torch.where(dropped[labels], ignored, labels), ignored)
    winners[winners >= void] = 0
    return _result(winners, groups, len(views))


def plurality(labels: torch.Tensor, ignored: int | None = None) -> torch.Tensor:
    """The most frequent of the labels (V, ...) along the first dimension, the smallest of equally frequent ones.

    Args:
        labels: integers.
        ignored: a label that has no vote, larger than all others; the result where there is nothing else.
    """
    best = labels[0].clone()
    most = torch.full_like(best, -1)
    for candidate in labels:
        votes = (labels == candidate).sum(dim=0).to(best.dtype)
        if ignored is not None:
            votes = votes.masked_fill(candidate == ignored, 0)
        better = (votes > most) | ((votes == most) & (candidate < best))
        best = torch.where(better, candidate, best)
        most = torch.where(better, votes, most)
    return best


def _stuff_groups(views: Sequence[PanopticSeg]) -> list[_Group]:
    groups: dict[int, _Group] = {}
    for view, (_, segments) in enumerate(views):
        for segment in segments:
            if not segment["isthing"]:
                category = int(segment["category_id"])
                groups.setdefault(category, _Group(False, category)).members.append((view, segment))
    return list(groups.values())


def _thing_groups(views: Sequence[PanopticSeg], threshold: float) -> list[_Group]:
    by_class: dict[int, list[tuple[int, Mapping[str, Any], dict[str, Any]]]] = {}
    for view, (id_map, segments) in enumerate(views):
        things = [segment for segment in segments if segment["isthing"]]
        codes = encode_masks(id_map.cpu().numpy(), [int(segment["id"]) for segment in things])
        for segment, code in zip(things, codes, strict=True):
            by_class.setdefault(int(segment["category_id"]), []).append((view, segment, code))
    groups: list[_Group] = []
    for category, found in sorted(by_class.items()):
        found.sort(key=lambda item: -float(item[1].get("score") or 0.0))
        codes = [code for _, _, code in found]
        overlaps = np.asarray(mask_util.iou(codes, codes, [0] * len(codes)))
        group_of = group_by_overlap(overlaps, np.array([view for view, _, _ in found]), len(views), threshold)
        own = [_Group(True, category) for _ in range(int(group_of.max()) + 1)]
        for index, (view, segment, _) in zip(group_of.tolist(), found, strict=True):
            own[index].members.append((view, segment))
        groups += own
    return groups


def _ranked(groups: list[_Group]) -> list[_Group]:
    def rank(group: _Group) -> tuple[float, float]:
        scores = group.scores()
        return -len(group.members), -(sum(scores) / len(scores)) if scores else 0.0

    return sorted(groups, key=rank)


def _group_maps(views: Sequence[PanopticSeg], groups: Sequence[_Group], void: int) -> torch.Tensor:
    """(V, H, W) int32: the group, from 1, of each pixel in each view."""
    group_of: list[dict[int, int]] = [{} for _ in views]
    for number, group in enumerate(groups, start=1):
        for view, segment in group.members:
            group_of[view][int(segment["id"])] = number
    maps = []
    for (id_map, _), table in zip(views, group_of, strict=True):
        ids, dense = id_map.unique(return_inverse=True)
        values = torch.tensor([table.get(int(identity), void) for identity in ids.tolist()], dtype=torch.int32)
        maps.append(values.to(id_map.device)[dense])
    return torch.stack(maps)


def _result(
    winners: torch.Tensor, groups: Sequence[_Group], num_views: int
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    areas = torch.bincount(winners.flatten(), minlength=len(groups) + 1).tolist()
    ids = torch.zeros(len(groups) + 1, dtype=torch.int32)
    segments: list[dict[str, Any]] = []
    for number, group in enumerate(groups, start=1):
        if not areas[number]:
            continue
        ids[number] = len(segments) + 1
        segment = {"id": len(segments) + 1, "isthing": group.isthing, "category_id": group.category}
        scores = group.scores()
        segments.append({**segment, "area": areas[number], **({"score": sum(scores) / num_views} if scores else {})})
    return ids.to(winners.device)[winners.long()], segments
