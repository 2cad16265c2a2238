"""Mask voting: overlapping RoIs agree on one mask (Li et al., arXiv 1611.07709, section 3; Dai et al., 1512.04412).

With R RoIs, each with one mask of S x S probabilities, and scores for C classes of which the first is background:

1. For each foreground class, NMS of all RoIs by their scores of it keeps at most the limit.
2. Of all classes together, those that reach the limit's score, and the least score, remain. Of equal scores at the
   limit the first count.
3. The candidates of a result are all RoIs whose IoU with it is at least the merge threshold, whatever their own class.
   Each has the weight of its score of the result's class, divided by the sum.
4. A candidate's mask is resized to its box (rounded, halves to even) and binarised. The weighted sum of these is the
   result's canvas, of the image's size.
5. The result's box is the extent of the canvas at or above the binary threshold, its mask the canvas in that box,
   resized to S x S. Its score stays.

Three procedures differ in details:

- "gpu", of the published configurations: a resized mask may read the canvas next to the box; results one pixel wide or
  high, or empty, are dropped.
- "cpu": a resized mask reads its box alone; an empty result becomes the pixel (width // 2, height // 2).
- "chainercv": ends of boxes, given and returned, are exclusive; empty results are dropped. Otherwise as "cpu".
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, nms

from convmask.ops._registration import register_operator

Procedure = Literal["gpu", "cpu", "chainercv"]
PROCEDURES: tuple[str, ...] = get_args(Procedure)
_GPU, _CPU, _CHAINERCV = range(3)
# How far below the threshold a sum of rounded weights may be whose exact value reaches it.
ROUNDING = 1e-12

_SCHEMA = (
    "mask_voting(Tensor masks, Tensor boxes, Tensor scores, int height, int width, float nms_threshold, "
    "float merge_threshold, float binary_threshold, float score_threshold, int max_detections, int procedure) "
    "-> (Tensor boxes, Tensor scores, Tensor classes, Tensor masks, Tensor count)"
)
_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def mask_voting(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    *,
    nms_threshold: float = 0.3,
    merge_threshold: float = 0.5,
    binary_threshold: float = 0.4,
    score_threshold: float = 1e-3,
    max_detections: int = 100,
    procedure: Procedure = "gpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of one image from its RoIs (rules: see the module), by class and then in descending order of score.

    The number of results M is read from the device; the operator, ``torch.ops.convmask.mask_voting``, does not wait for
    it. Overlaps, weights and masks are computed in float64. No gradient.

    Args:
        masks: (R, S, S) floating, inside probabilities.
        boxes: (R, 4) floating, x1, y1, x2, y2 in pixels of the image; both ends belong to the box, except in the
            procedure "chainercv".
        scores: (R, C) floating; class 0 is background.
        image_size: height and width of the image in pixels.
        nms_threshold: a RoI with a larger IoU with one of a higher score is dropped.
        merge_threshold: IoU from which on a RoI is a candidate.
        binary_threshold: of a candidate's mask, and of the canvas.
        score_threshold: least score of a result; above 0.
        max_detections: limit of the results.
        procedure: "gpu", "cpu" or "chainercv".

    Returns:
        Boxes (M, 4), whole numbers, scores (M,), classes (M,) int64 from 1 to C - 1, and masks (M, S, S) from 0 to 1,
        in the dtypes of the arguments.

    Raises:
        ValueError: a shape, size, device, threshold or procedure does not fit.
        TypeError: a dtype does not fit.
    """
    if procedure not in PROCEDURES:
        raise ValueError(f"procedure is {procedure!r}, not one of {', '.join(PROCEDURES)}")
    height, width = image_size
    number = PROCEDURES.index(procedure)
    _check(masks, boxes, scores, height, width, score_threshold, max_detections, number)
    thresholds = float(nms_threshold), float(merge_threshold), float(binary_threshold), float(score_threshold)
    *results, count = torch.ops.convmask.mask_voting(
        masks, boxes, scores, int(height), int(width), *thresholds, int(max_detections), number
    )
    found = int(count)
    voted_boxes, voted_scores, classes, voted_masks = (result[:found] for result in results)
    return voted_boxes, voted_scores, classes, voted_masks


def mask_voting_reference(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    height: int,
    width: int,
    nms_threshold: float,
    merge_threshold: float,
    binary_threshold: float,
    score_threshold: float,
    max_detections: int,
    procedure: int,
) -> _Results:
    """The operator in plain PyTorch, result after result.

    Args:
        masks: as all others, see ``mask_voting``; ``procedure`` is the index in ``PROCEDURES``.

    Returns:
        ``max_detections`` rows of boxes, scores, classes and masks; those from ``count`` () int64 on are 0, their class
        -1.
    """
    _check(masks, boxes, scores, height, width, score_threshold, max_detections, procedure)
    results = _empty_results(masks, boxes, scores, max_detections)
    for result in results:
        result.fill_(0)
    results[2].fill_(-1)
    exact = boxes.double()
    extended = exact if procedure == _CHAINERCV else torch.cat([exact[:, :2], exact[:, 2:] + 1], dim=1)
    overlaps = box_iou(extended, extended)
    rendered: dict[int, tuple[slice, slice, Tensor]] = {}
    row = 0
    for roi, category in _suppress(extended, scores, nms_threshold, score_threshold, max_detections):
        candidates = (overlaps[roi] >= merge_threshold).nonzero()[:, 0].tolist()
        weights = scores[candidates, category].double()
        canvas = exact.new_zeros(height, width)
        for candidate, weight in zip(candidates, weights / weights.sum(), strict=True):
            if candidate not in rendered:
                box = exact[candidate]
                rendered[candidate] = _render(masks[candidate].double(), box, canvas, binary_threshold, procedure)
            y, x, binary = rendered[candidate]
            canvas[y, x] += weight * binary
        box = _extent(canvas >= binary_threshold - ROUNDING, procedure)
        if box is None:
            continue
        end = 1 if procedure == _CHAINERCV else 0
        results[0][row] = boxes.new_tensor([box[0], box[1], box[2] + end, box[3] + end])
        results[1][row] = scores[roi, category]
        results[2][row] = category
        results[3][row] = _sample(canvas, box, masks.shape[1], outside=procedure == _GPU).to(masks.dtype)
        row += 1
    results[4].fill_(row)
    return results


def _suppress(
    boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, limit: int
) -> list[tuple[int, int]]:
    """(RoI, class) of each result, by class and then by score."""
    found: list[tuple[int, int]] = []
    for category in range(1, scores.shape[1]):
        kept = nms(boxes, scores[:, category].double(), nms_threshold)[:limit].tolist()
        found += [(roi, category) for roi in kept if scores[roi, category] >= score_threshold]
    order = sorted(range(len(found)), key=lambda i: -float(scores[found[i]]))[:limit]
    return [found[i] for i in sorted(order)]


def _render(mask: Tensor, box: Tensor, canvas: Tensor, threshold: float, procedure: int) -> tuple[slice, slice, Tensor]:
    """The part of the image that a box covers, and the binarised mask there."""
    height, width = canvas.shape
    x1, y1, x2, y2 = (int(value) for value in box.round().nan_to_num(0, 0, 0).tolist())
    if procedure != _CHAINERCV:
        x2, y2 = x2 + 1, y2 + 1
    y, x = slice(max(y1, 0), min(y2, height)), slice(max(x1, 0), min(x2, width))
    if y.start >= y.stop or x.start >= x.stop:
        return slice(0), slice(0), canvas.new_zeros(0, 0)
    whole = F.interpolate(mask[None, None], size=(y2 - y1, x2 - x1), mode="bilinear", align_corners=False)[0, 0]
    part = whole[y.start - y1 : y.stop - y1, x.start - x1 : x.stop - x1]
    return y, x, (part >= threshold).to(canvas.dtype)


def _extent(filled: Tensor, procedure: int) -> tuple[int, int, int, int] | None:
    """First and last column and row; None for a result that is dropped."""
    height, width = filled.shape
    rows, columns = (filled.any(dim=dim).nonzero()[:, 0].tolist() for dim in (1, 0))
    if not rows:
        return (width // 2, height // 2, width // 2, height // 2) if procedure == _CPU else None
    if procedure == _GPU and (rows[0] == rows[-1] or columns[0] == columns[-1]):
        return None
    return columns[0], rows[0], columns[-1], rows[-1]


def _sample(canvas: Tensor, box: tuple[int, int, int, int], size: int, *, outside: bool) -> Tensor:
    """(S, S): the canvas in a box (both ends included), bilinear between the centres of pixels.

    Args:
        canvas: (H, W).
        box: first column and row, last column and row.
        size: S.
        outside: pixels next to the box may be read; otherwise its border is repeated.
    """
    places = []
    for first, last, limit in ((box[1], box[3], canvas.shape[0]), (box[0], box[2], canvas.shape[1])):
        step = (last - first + 1) / size
        least, most = (0, limit - 1) if outside else (first, last)
        place = ((torch.arange(size, device=canvas.device).double() + 0.5) * step - 0.5 + first).clamp(least, most)
        before = place.floor().long()
        places.append((before, (before + 1).clamp(max=most), place - before))
    (top, bottom, down), (left, right, across) = places
    rows = canvas[top] * (1 - down)[:, None] + canvas[bottom] * down[:, None]
    return rows[:, left] * (1 - across) + rows[:, right] * across


def _empty_results(masks: Tensor, boxes: Tensor, scores: Tensor, rows: int) -> _Results:
    return (
        boxes.new_empty(rows, 4),
        scores.new_empty(rows),
        boxes.new_empty(rows, dtype=torch.int64),
        masks.new_empty(rows, masks.shape[1], masks.shape[2]),
        boxes.new_empty((), dtype=torch.int64),
    )


def _check(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    height: int,
    width: int,
    score_threshold: float,
    max_detections: int,
    procedure: int,
) -> None:
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2] or masks.shape[1] < 1:
        raise ValueError(f"masks must have shape (R, S, S), not {tuple(masks.shape)}")
    if boxes.dim() != 2 or boxes.shape[0] != masks.shape[0] or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape ({masks.shape[0]}, 4), not {tuple(boxes.shape)}")
    if scores.dim() != 2 or scores.shape[0] != masks.shape[0] or scores.shape[1] < 1:
        raise ValueError(f"scores must have shape ({masks.shape[0]}, C), not {tuple(scores.shape)}")
    for name, tensor in (("masks", masks), ("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, not {tensor.dtype}")
        if tensor.device != masks.device:
            raise ValueError(f"{name} is on {tensor.device}, but masks are on {masks.device}")
    if height < 1 or width < 1:
        raise ValueError(f"image_size is {height} x {width}: height and width must be at least 1")
    if not score_threshold > 0:
        raise ValueError(f"score_threshold is {score_threshold}, but must be above 0")
    if max_detections < 1:
        raise ValueError(f"max_detections is {max_detections}, but must be at least 1")
    if not 0 <= procedure < len(PROCEDURES):
        raise ValueError(f"procedure is {procedure}, not from 0 to {len(PROCEDURES) - 1}")


def _fake(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    height: int,
    width: int,
    nms_threshold: float,
    merge_threshold: float,
    binary_threshold: float,
    score_threshold: float,
    max_detections: int,
    procedure: int,
) -> _Results:
    _check(masks, boxes, scores, height, width, score_threshold, max_detections, procedure)
    return _empty_results(masks, boxes, scores, max_detections)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    ctx.mark_non_differentiable(*output)


register_operator(
    _SCHEMA,
    reference=mask_voting_reference,
    fake=_fake,
    setup_context=_setup_context,
    slowdown="about 50 times slower",
)
