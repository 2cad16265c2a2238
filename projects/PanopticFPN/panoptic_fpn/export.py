"""Panoptic FPN as a program of one image: R-CNN with fixed numbers of proposals and results, and the merging.

Shapes: R proposals, K classes, N results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import nn
from torchvision.ops import roi_align

from convmask.export.masks import paste
from convmask.export.panoptic import merge
from convmask.export.selection import ABSENT, MOST_CANDIDATES, anchors_of, best, clipped, survivors, valid_first
from convmask.export.wrapper import (
    INSTANCES,
    PANOPTIC,
    SEM_SEG,
    ExportError,
    ExportWrapper,
    Outputs,
    Size,
    blank_invalid,
    described,
    register_export,
)

from .meta_arch import ConvMaskPanopticFPN

# Of masks, in Detectron2's post-processing.
_MASK_THRESHOLD = 0.5


class PanopticFPNExport(ExportWrapper):
    """Panoptic FPN; without a semantic head Mask R-CNN, without RoI heads Semantic FPN."""

    model: ConvMaskPanopticFPN

    def __init__(self, model: nn.Module) -> None:
        """Takes the model.

        Raises:
            ExportError: a part of it is of a class that is not known here.
        """
        super().__init__(model)
        self.inside = ("network",)
        heads = self.model.roi_heads
        if heads is not None:
            _check(self.model)
            self.outputs.update(INSTANCES)
            if not heads.mask_on:
                del self.outputs["masks"]
            self.inside += ("proposals", "classes and boxes", "class-wise NMS", "masks pasted into the image")
        if self.model.sem_seg_head is not None:
            self.outputs.update(described(SEM_SEG, what="logits"))
            self.inside += ("semantic map at the size of the image",)
        if self.model.combine:
            self.outputs.update(described(PANOPTIC, rows="N", row="instance"))
            self.inside += ("panoptic merging",)

    def predict(self, images: torch.Tensor, size: Size) -> Outputs:
        """See the base class."""
        model = self.model
        instance_features, semantic_features = model._branch_features(model.backbone(images))
        outputs: Outputs = {}
        if model.roi_heads is not None:
            boxes = self._proposals(instance_features, size)
            outputs.update(self._instances(instance_features, boxes, size))
        if model.sem_seg_head is not None:
            logits = model.sem_seg_head(semantic_features, None)[0]
            outputs["sem_seg"] = logits[0, :, : size[0], : size[1]]
        if model.combine:
            outputs.update(self._combine(outputs))
        return outputs

    def _proposals(self, features: Mapping[str, torch.Tensor], size: Size) -> torch.Tensor:
        """(R, 4) boxes; those that there are not are empty, at the corner of the image."""
        rpn = self.model.proposal_generator
        levels = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(levels)
        boxes, scores, level_of = [], [], []
        for level, (logit, delta) in enumerate(zip(logits, deltas, strict=True)):
            anchors = anchors_of(rpn.anchor_generator, level, levels[level])
            value, index = best(logit[0].permute(1, 2, 0).flatten(), rpn.pre_nms_topk[False])
            delta = delta[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
            box = clipped(_decode(anchors[index], delta[index], rpn.box2box_transform)[:, 0], *size)
            sides = box[:, 2:] - box[:, :2]
            scores.append(torch.where((sides > rpn.min_box_size).all(dim=1), value, ABSENT))
            boxes.append(box)
            level_of.append(torch.full_like(index, level))
        box, score = torch.cat(boxes), torch.cat(scores)
        kept = survivors(box, score, torch.cat(level_of), len(levels), rpn.nms_thresh)
        score, index = best(torch.where(kept, score, ABSENT), rpn.post_nms_topk[False])
        return torch.where((score > ABSENT)[:, None], box[index], 0.0)

    def _instances(self, features: Mapping[str, torch.Tensor], proposals: torch.Tensor, size: Size) -> Outputs:
        heads = self.model.roi_heads
        probabilities, boxes = _box_stages(heads, features, proposals, size)
        predictor = heads.box_predictor[-1] if isinstance(heads, CascadeROIHeads) else heads.box_predictor
        boxes = clipped(boxes, *size)  # (R, K or 1, 4)
        # a proposal that there is not has no area
        there = ((proposals[:, 2:] - proposals[:, :2]) > 0).all(dim=1)
        scores = probabilities[:, :-1]
        num_classes = scores.shape[1]
        scores = torch.where((scores > predictor.test_score_thresh) & there[:, None], scores, ABSENT)
        limit = min(scores.shape[0] * num_classes, MOST_CANDIDATES)
        score, pair = best(scores.flatten(), limit)
        roi, category = torch.div(pair, num_classes, rounding_mode="floor"), pair % num_classes
        box = boxes[roi, category if boxes.shape[1] > 1 else 0]
        kept = survivors(box, score, category, num_classes, predictor.test_nms_thresh)
        # Detectron2's post-processing drops empty boxes last, so that they count among the results
        score, chosen = best(torch.where(kept, score, ABSENT), predictor.test_topk_per_image)
        box, category = box[chosen], category[chosen]
        valid = (score > ABSENT) & ((box[:, 2:] - box[:, :2]) > 0).all(dim=1)
        outputs = valid_first({"boxes": box, "scores": score, "classes": category, "valid": valid})
        valid, box = outputs["valid"], outputs["boxes"]
        if not heads.mask_on:
            outputs["masks"] = valid[:, None, None]
            return blank_invalid(outputs)
        masks = _mask_probabilities(heads, features, torch.where(valid[:, None], box, 0.0), outputs["classes"])
        outputs["masks"] = paste(masks, box, *size) >= _MASK_THRESHOLD
        return blank_invalid(outputs)

    def _combine(self, outputs: Outputs) -> Outputs:
        options = self.model.combine_options
        labels = outputs["sem_seg"].argmax(dim=0)
        num_labels = outputs["sem_seg"].shape[0]
        stuff_labels = options["stuff_labels"]
        if stuff_labels is not None:
            class_of_label = labels.new_zeros(num_labels)
            for category, label in enumerate(stuff_labels, start=1):
                class_of_label[label] = category
            labels = class_of_label[labels]
        return merge(
            outputs["masks"],
            outputs["valid"] & (outputs["scores"] >= options["score_threshold"]),
            labels,
            num_stuff=num_labels - 1 if stuff_labels is None else len(stuff_labels),
            overlap_threshold=options["overlap_threshold"],
            stuff_area_limit=options["stuff_area_limit"],
        )


def _check(model: ConvMaskPanopticFPN) -> None:
    heads = model.roi_heads
    if type(model.proposal_generator) is not RPN:
        name = type(model.proposal_generator).__name__
        raise ExportError(f"Panoptic FPN's export knows the proposal generator RPN alone, not {name}")
    if type(heads) not in (StandardROIHeads, CascadeROIHeads) or heads.keypoint_on:
        name = f"{type(heads).__name__}{' with keypoints' if getattr(heads, 'keypoint_on', False) else ''}"
        raise ExportError(f"Panoptic FPN's export knows StandardROIHeads and CascadeROIHeads alone, not {name}")
    poolers = [heads.box_pooler, *([heads.mask_pooler] if heads.mask_on else [])]
    for pooler in poolers:
        if not isinstance(pooler, ROIPooler) or not isinstance(pooler.level_poolers[0], ROIAlign):
            raise ExportError("Panoptic FPN's export knows the poolers ROIAlign and ROIAlignV2 alone")
    predictors = list(heads.box_predictor) if isinstance(heads, CascadeROIHeads) else [heads.box_predictor]
    if any(getattr(predictor, "use_sigmoid_ce", False) for predictor in predictors):
        raise ExportError("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: Panoptic FPN's export knows softmax alone")
    if predictors[-1].test_topk_per_image < 0:
        raise ExportError("TEST.DETECTIONS_PER_IMAGE is negative, without a limit: an export needs a number of rows")


def _box_stages(
    heads: Any, features: Mapping[str, torch.Tensor], proposals: torch.Tensor, size: Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (R, K + 1), and boxes (R, K or 1, 4) not yet clipped, of one stage or of a cascade."""
    levels = [features[name] for name in heads.box_in_features]
    cascade = isinstance(heads, CascadeROIHeads)
    box_heads = heads.box_head if cascade else [heads.box_head]
    predictors = heads.box_predictor if cascade else [heads.box_predictor]
    total: Any = 0
    boxes = proposals[:, None]
    for head, predictor in zip(box_heads, predictors, strict=True):
        rois = clipped(boxes[:, 0], *size)
        logits, deltas = predictor(head(_pool(heads.box_pooler, levels, rois)))
        boxes = _decode(rois, deltas, predictor.box2box_transform)
        total = total + logits.softmax(dim=-1)
    return total * (1.0 / len(box_heads)), boxes


def _mask_probabilities(
    heads: Any, features: Mapping[str, torch.Tensor], boxes: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """(N, P, P) of the class of each box."""
    levels = [features[name] for name in heads.mask_in_features]
    logits = heads.mask_head.layers(_pool(heads.mask_pooler, levels, boxes))
    rows = torch.arange(len(boxes), device=boxes.device)
    return logits[rows, classes if logits.shape[1] > 1 else torch.zeros_like(classes)].sigmoid()


def _pool(pooler: ROIPooler, levels: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Each box from the level of its size. Every level pools all boxes, those of other levels shrunk to a point."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.floor(pooler.canonical_level + torch.log2(area.sqrt() / pooler.canonical_box_size + 1e-8))
    level = level.clamp(min=pooler.min_level, max=pooler.max_level).long() - pooler.min_level
    pooled: Any = None
    for index, (features, align) in enumerate(zip(levels, pooler.level_poolers, strict=True)):
        here = level == index
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), torch.where(here[:, None], boxes, 0.0)], dim=1)
        size = align.output_size
        found = roi_align(features, rois, size, align.spatial_scale, align.sampling_ratio, align.aligned)
        pooled = found if pooled is None else torch.where(here[:, None, None, None], found, pooled)
    return pooled


def _decode(boxes: torch.Tensor, deltas: torch.Tensor, transform: Any) -> torch.Tensor:
    """(R, K, 4) boxes from (R, 4) ones and (R, 4 K) deltas, as ``Box2BoxTransform``, whose code is TorchScript."""
    dx, dy, dw, dh = (deltas.unflatten(1, (-1, 4)) / deltas.new_tensor(transform.weights)).unbind(dim=2)
    dw, dh = dw.clamp(max=transform.scale_clamp), dh.clamp(max=transform.scale_clamp)
    width, height = (boxes[:, 2:] - boxes[:, :2])[:, :, None].unbind(dim=1)
    left, top = boxes[:, :2, None].unbind(dim=1)
    x, y = dx * width + (left + 0.5 * width), dy * height + (top + 0.5 * height)
    half_width, half_height = 0.5 * (dw.exp() * width), 0.5 * (dh.exp() * height)
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=2)


register_export("ConvMaskPanopticFPN", PanopticFPNExport)
