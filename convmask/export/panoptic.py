"""Panoptic merging with fixed sizes; the rules are those of :mod:`convmask.ops.panoptic_merge`.

Shapes: N instances, S stuff categories, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from convmask.utils.exporting import exporting

State = list[torch.Tensor]


def merge(
    masks: torch.Tensor,
    eligible: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_stuff: int,
    overlap_threshold: float,
    stuff_area_limit: int,
) -> dict[str, torch.Tensor]:
    """Paints instances in their order, then stuff where nothing is painted.

    Args:
        masks: (N, H, W) bool, in descending order of score.
        eligible: (N,) bool: instances that are valid and whose score is high enough.
        labels: (H, W) int64 stuff categories 1 to S, 0 where no stuff is painted.
        num_stuff: S.
        overlap_threshold: an instance of which a larger share is already painted is dropped.
        stuff_area_limit: stuff categories that cover fewer free pixels are dropped.

    Returns:
        The outputs ``PANOPTIC``.
    """
    painted = labels * 0

    def paint(state: State, mask: torch.Tensor, may: torch.Tensor) -> tuple[State, torch.Tensor]:
        painted, count = state
        free = mask & (painted == 0)
        area, left = mask.sum(), free.sum()
        covered = (area - left).double() / area.clamp(min=1)
        kept = may & (area > 0) & (covered <= overlap_threshold)
        number = count + kept.long()
        return [torch.where(free & kept, number, painted), number], torch.where(kept, number, 0)

    (painted, things), thing_ids = _one_after_the_other(paint, [painted, painted.sum()], masks, eligible)
    free = (painted == 0) & (labels > 0)
    areas = torch.zeros(num_stuff + 1, dtype=torch.int64, device=labels.device)
    areas = areas.scatter_add(0, labels.flatten(), free.flatten().long())
    # stuff of no pixel is no segment, whatever the limit
    kept = areas >= max(stuff_area_limit, 1)
    stuff_ids = torch.where(kept, things + kept.long().cumsum(0), 0)
    panoptic_seg = torch.where(free, stuff_ids[labels], painted)
    return {"panoptic_seg": panoptic_seg.int(), "thing_ids": thing_ids, "stuff_ids": stuff_ids}


def _one_after_the_other(
    step: Callable[[State, torch.Tensor, torch.Tensor], tuple[State, torch.Tensor]],
    state: State,
    masks: torch.Tensor,
    eligible: torch.Tensor,
) -> tuple[State, torch.Tensor]:
    """State and results (N,) of steps over the instances: a loop of the program, not a copy of the step for each."""
    if exporting():
        # takes long to import, and is of recent versions
        from torch._higher_order_ops.scan import scan

        def scanned(state: State, item: State) -> tuple[State, torch.Tensor]:
            state, result = step(state, *item)
            # a carried tensor may be no alias of another
            return [x.clone() for x in state], result.clone()

        return scan(scanned, state, [masks, eligible])
    results = []
    for mask, may in zip(masks, eligible, strict=True):
        state, result = step(state, mask, may)
        results.append(result)
    return state, torch.stack(results)
