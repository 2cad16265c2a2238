"""FCIS as a program of one image: proposals, assembly, both rounds, voting and pasting, without loops over RoIs.

Shapes: R RoIs, C classes with background, k x k grid cells, masks of P x P bins, M results, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.ops import box_iou

from convmask.export.masks import interpolate_at, paste, paste_whole
from convmask.export.selection import ABSENT, MOST_CANDIDATES, anchors_of, best, clipped, survivors, valid_first
from convmask.export.wrapper import (
    INSTANCES,
    ExportError,
    ExportWrapper,
    Outputs,
    Size,
    blank_invalid,
    register_export,
)
from convmask.ops.ps_roi_pool import bins

from .boxes import decode, from_detectron, sides, to_detectron
from .convention import Convention
from .heads import Maps
from .meta_arch import FCIS
from .rpn import FCISRPN, _by_anchor

# RoIs whose masks are drawn into the image at a time.
_DRAWN_AT_ONCE = 100
# How far below the threshold a sum of rounded weights, in single precision, may be whose exact value reaches it.
_ROUNDING = 1e-6


class Rois(NamedTuple):
    """What all rounds predict.

    Attributes:
        boxes: (R, 4), by the convention.
        probabilities: (R, C).
        masks: (R, P, P) inside probabilities.
        present: (R,) bool.
    """

    boxes: torch.Tensor
    probabilities: torch.Tensor
    masks: torch.Tensor
    present: torch.Tensor


class FCISExport(ExportWrapper):
    """FCIS. Results are by descending score; the method itself gives them by class."""

    model: FCIS

    def __init__(self, model: nn.Module) -> None:
        """Takes the model.

        Raises:
            ExportError: it augments at test time, or has proposals of another kind or at random.
        """
        super().__init__(model)
        if self.model.augmentation is not None:
            raise ExportError("TEST.AUG.ENABLED: the export of FCIS has no augmentation; switch it off")
        if not isinstance(self.model.proposal_generator, FCISRPN):
            name = type(self.model.proposal_generator).__name__
            raise ExportError(f"MODEL.PROPOSAL_GENERATOR.NAME: the export of FCIS knows FCISRPN alone, not {name}")
        if self.model.proposal_generator.pad_proposals:
            raise ExportError("MODEL.FCIS.PAD_PROPOSALS draws proposals at random: switch it off for an export")
        self.outputs = dict(INSTANCES)
        voted = "mask voting" if self.model.roi_heads.inference_options.voting else "class-wise NMS"
        self.inside = ("network", "proposals", "position-sensitive assembly, all rounds", voted, "masks pasted")

    def predict(self, images: torch.Tensor, size: Size) -> Outputs:
        """See the base class."""
        heads = self.model.roi_heads
        features = self.model.backbone(images)
        boxes, present = self._proposals(features, size)
        maps = [heads.head(features[name]) for name in heads.in_features]
        rois = self._rounds(maps, boxes, present, size)
        options = heads.inference_options
        large = (sides(rois.boxes, heads.convention) >= options.min_size).all(dim=1)
        rois = rois._replace(present=rois.present & large, boxes=_clip(rois.boxes, size, heads.convention))
        score, roi, category = self._select(rois)
        found = {"scores": score, "classes": category - 1, "valid": score > ABSENT}
        boxes, masks = rois.boxes[roi], rois.masks[roi]
        if options.voting:
            boxes, masks, drawn = self._vote(rois, roi, category, size)
            found["valid"] = found["valid"] & drawn
        found["boxes"] = to_detectron(boxes, heads.convention)
        found["masks"] = self._paste(masks, found["boxes"], size)
        return blank_invalid(valid_first(found))

    def _proposals(self, features: dict[str, torch.Tensor], size: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, 4) boxes and (R,) whether they are there. See ``rpn.propose_boxes``."""
        rpn = self.model.proposal_generator
        convention: Convention = rpn.convention
        levels = [features[name] for name in rpn.in_features]
        boxes, ranks, of_level = [], [], []
        for level, (scores, deltas) in enumerate(zip(*rpn.rpn_head(levels), strict=True)):
            anchors = anchors_of(rpn.anchor_generator, level, levels[level])
            score, delta = _by_anchor(scores, 2)[0], _by_anchor(deltas, 4)[0]
            rank = score[:, 1] if convention.rank_by_foreground else score[:, 1] - score[:, 0]
            box = _clip(decode(anchors, delta, convention), size, convention)
            usable = (sides(box, convention) >= rpn.min_box_size).all(dim=1)
            stride, cells = rpn.anchor_generator.strides[level], (levels[level].shape[2], levels[level].shape[3])
            number = rpn.anchor_generator.num_anchors[level]
            usable = usable & _usable_cells(cells, stride, number, size, convention, box.device)
            value, index = best(torch.where(usable, rank, ABSENT), rpn.pre_nms_topk[False])
            boxes.append(box[index])
            ranks.append(value)
            of_level.append(torch.full_like(index, level))
        box, rank = torch.cat(boxes), torch.cat(ranks)
        kept = survivors(to_detectron(box, convention), rank, torch.cat(of_level), len(levels), rpn.nms_thresh)
        value, index = best(torch.where(kept, rank, ABSENT), rpn.post_nms_topk[False])
        return box[index], value > ABSENT

    def _rounds(self, maps: Sequence[Maps], boxes: torch.Tensor, present: torch.Tensor, size: Size) -> Rois:
        """See ``FCISROIHeads.predict``."""
        heads = self.model.roi_heads
        rounds = []
        tables = [_tables(level) for level in maps]
        for _ in range(heads.inference_options.rounds):
            scores, masks, deltas = self._read(tables, boxes)
            rounds.append(Rois(boxes, scores.softmax(dim=1), masks.softmax(dim=1)[:, 1], present))
            deltas = deltas * deltas.new_tensor(heads.sampling_options.deviations)
            boxes = _clip(decode(boxes, deltas, heads.convention), size, heads.convention)
        return Rois(*(torch.cat(part) for part in zip(*rounds, strict=True)))

    def _read(
        self, tables: Sequence[dict[str, torch.Tensor]], boxes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class logits (R, C), mask logits (R, 2, P, P) and deltas (R, 4), each RoI from the level of its size."""
        heads = self.model.roi_heads
        if len(tables) == 1:
            return self._read_level(tables[0], boxes, heads.strides[0])
        levels = heads._levels(boxes)
        result: Any = None
        for index, (level, stride) in enumerate(zip(tables, heads.strides, strict=True)):
            found = self._read_level(level, boxes, stride)
            here = levels == index
            result = (
                found
                if result is None
                else tuple(
                    torch.where(here.view(-1, *([1] * (new.dim() - 1))), new, old)
                    for new, old in zip(found, result, strict=True)
                )
            )
        return result

    def _read_level(
        self, tables: dict[str, torch.Tensor], boxes: torch.Tensor, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``PositionSensitiveHead.read``."""
        heads = self.model.roi_heads
        first = heads.convention.first_mask_class
        pooled = {name: self._pool(table, boxes, stride) for name, table in tables.items()}
        of_classes = pooled["scores"].unflatten(3, (2, -1))  # (R, P, P, 2, C)
        scores = of_classes.amax(dim=3).mean(dim=(1, 2))
        classes = first + scores[:, first:].argmax(dim=1)
        source = pooled["masks"].unflatten(3, (2, -1)) if "masks" in pooled else of_classes
        index = classes.view(-1, 1, 1, 1, 1).expand(-1, source.shape[1], source.shape[2], 2, 1)
        masks = source.gather(4, index)[..., 0].permute(0, 3, 1, 2)
        return scores, masks, pooled["boxes"].mean(dim=(1, 2))

    def _pool(self, table: torch.Tensor, boxes: torch.Tensor, stride: int) -> torch.Tensor:
        """(R, P, P, D) means of bins, from sums over corners: (k, k, H + 1, W + 1, D) float64.

        In double precision the differences of sums are as exact as sums of the few cells of a bin in single precision.
        """
        heads = self.model.roi_heads
        group, size = heads.head.group_size, heads.head.mask_size
        height, width = table.shape[2] - 1, table.shape[3] - 1
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
        rows, columns, areas = bins(rois, height, width, size, 1 / stride, heads.convention.rounded)
        cell = torch.arange(size, device=boxes.device) * group // size
        cells = (cell[:, None] * group + cell) * (height + 1)
        flat = table.flatten(0, 3)
        # a bin that lies beyond the map begins after its end
        ends = [torch.stack([x[..., 0], torch.maximum(x[..., 0], x[..., 1])], dim=-1) for x in (rows, columns)]
        total: Any = 0
        for y, x, sign in ((1, 1, 1), (0, 1, -1), (1, 0, -1), (0, 0, 1)):
            place = (cells + ends[0][:, :, None, y]) * (width + 1) + ends[1][:, None, :, x]
            total = total + sign * flat[place]
        return (total / areas.clamp(min=1)[..., None]).float()

    def _select(self, rois: Rois) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score, RoI and class (from 1) of M results: NMS of all RoIs in each class."""
        heads = self.model.roi_heads
        options = heads.inference_options
        scores = rois.probabilities[:, 1:]
        threshold = max(options.score_threshold, 1e-12)
        enough = scores >= threshold if options.voting else scores > options.score_threshold
        scores = torch.where(enough & rois.present[:, None], scores, ABSENT)
        number = scores.shape[1]
        score, pair = best(scores.flatten(), min(scores.shape[0] * number, MOST_CANDIDATES))
        roi, category = torch.div(pair, number, rounding_mode="floor"), pair % number
        boxes = to_detectron(rois.boxes[roi], heads.convention)
        kept = survivors(boxes, score, category, number, options.nms_threshold)
        score, chosen = best(torch.where(kept, score, ABSENT), options.max_detections)
        return score, roi[chosen], category[chosen] + 1

    def _vote(
        self, rois: Rois, roi: torch.Tensor, category: torch.Tensor, size: Size
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes (M, 4), masks (M, P, P) and whether there is a mask, see :mod:`convmask.ops.mask_voting`."""
        heads = self.model.roi_heads
        options, convention = heads.inference_options, heads.convention
        procedure = options.procedure if convention.offset else "chainercv"
        extended = to_detectron(rois.boxes, convention).double()
        candidates = (box_iou(extended[roi], extended) >= options.merge_threshold) & rois.present
        weights = torch.where(candidates, rois.probabilities.T[category], 0.0).double()
        weights = (weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)).float()
        pixels = rois.boxes.round()
        pixels = torch.cat([pixels[:, :2], pixels[:, 2:] + convention.offset], dim=1)
        canvas: Any = 0
        for first in range(0, rois.boxes.shape[0], _DRAWN_AT_ONCE):
            part = slice(first, first + _DRAWN_AT_ONCE)
            drawn = paste_whole(rois.masks[part], pixels[part], *size, options.binary_threshold)
            canvas = canvas + weights[:, part] @ drawn.flatten(1).float()
        canvas = canvas.unflatten(1, size)
        rows, columns, some = _extent(canvas >= options.binary_threshold - _ROUNDING)
        if procedure == "cpu":
            rows, columns = (
                torch.where(some[:, None], x, length // 2) for x, length in zip((rows, columns), size, strict=True)
            )
            some = torch.ones_like(some)
        elif procedure == "gpu":
            some = some & (rows[:, 0] < rows[:, 1]) & (columns[:, 0] < columns[:, 1])
        places = [
            _places(ends, length, heads.head.mask_size, outside=procedure == "gpu")
            for ends, length in zip((rows, columns), size, strict=True)
        ]
        end = 0 if convention.offset else 1
        boxes = torch.stack([columns[:, 0], rows[:, 0], columns[:, 1] + end, rows[:, 1] + end], dim=1)
        return boxes.float(), interpolate_at(canvas, *places), some

    def _paste(self, masks: torch.Tensor, boxes: torch.Tensor, size: Size) -> torch.Tensor:
        """(M, H, W) bool, see ``inference.paste``."""
        heads = self.model.roi_heads
        options, convention = heads.inference_options, heads.convention
        if options.paste == "detectron2":
            return paste(masks, boxes, *size) >= options.binary_threshold
        pixels = _clip(from_detectron(boxes, convention), size, convention).round()
        pixels = torch.cat([pixels[:, :2], pixels[:, 2:] + convention.offset], dim=1)
        return paste_whole(masks, pixels, *size, options.binary_threshold)


def _clip(boxes: torch.Tensor, size: Size, convention: Convention) -> torch.Tensor:
    """As ``boxes.clip``, which makes a tensor of the size."""
    return clipped(boxes, size[0] - convention.offset, size[1] - convention.offset)


def _tables(maps: Maps) -> dict[str, torch.Tensor]:
    """Of each kind of maps the sums over all cells above and to the left, (k, k, H + 1, W + 1, D) float64."""
    grid = maps.scores.shape[1]
    kinds = {
        "scores": maps.scores[0].flatten(2, 3),
        "boxes": maps.boxes[0].unflatten(0, (-1, grid, grid)).movedim(0, 2),
    }
    if maps.masks is not None:
        kinds["masks"] = maps.masks[0].flatten(2, 3)
    # (k, k, D, H, W)
    sums = {name: x.double().cumsum(dim=3).cumsum(dim=4) for name, x in kinds.items()}
    return {name: nn.functional.pad(x, (1, 0, 1, 0)).permute(0, 1, 3, 4, 2) for name, x in sums.items()}


def _usable_cells(
    cells: Size, stride: int, anchors: int, size: Size, convention: Convention, device: torch.device
) -> torch.Tensor:
    """(H W A,) bool, see ``rpn._usable_cells``."""
    height, width = size
    if convention.floor_cells:
        limits = height // stride, width // stride
    else:
        limits = (height + stride - 1) // stride, (width + stride - 1) // stride
    rows, columns = (torch.arange(number, device=device) < limit for number, limit in zip(cells, limits, strict=True))
    return (rows[:, None] & columns)[:, :, None].expand(-1, -1, anchors).flatten()


def _extent(filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First and last row (M, 2), first and last column (M, 2), and whether there is any, of (M, H, W) bool."""
    ends = []
    for dim in (2, 1):
        some = filled.any(dim=dim)
        index = torch.arange(some.shape[1], device=filled.device)
        first = torch.where(some, index, some.shape[1]).amin(dim=1)
        last = torch.where(some, index, 0).amax(dim=1)
        ends.append(torch.stack([torch.minimum(first, last), last], dim=1))
    return ends[0], ends[1], some.any(dim=1)


def _places(ends: torch.Tensor, length: int, size: int, *, outside: bool) -> torch.Tensor:
    """(M, S): where a mask of S cells samples the canvas along a side; see ``mask_voting``."""
    first, last = ends[:, :1].float(), ends[:, 1:].float()
    step = (last - first + 1) / size
    places = (torch.arange(size, device=ends.device).float() + 0.5) * step - 0.5 + first
    if outside:
        return places.clamp(min=0, max=length - 1)
    return torch.minimum(torch.maximum(places, first), last)


register_export("FCIS", FCISExport)
