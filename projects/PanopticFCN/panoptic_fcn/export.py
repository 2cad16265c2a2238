"""Panoptic FCN as a program of one image: kernels in fixed numbers, of which some are not valid.

Shapes: level l of H_l x W_l cells, S region classes, K channels of the kernel map, n thing kernels, h x w cells of the
encoded feature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from convmask.export.panoptic import merge
from convmask.export.selection import ABSENT, best, boxes_around
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
from convmask.ops.fuse_kernels import SMALLEST_NORM

from .heads import HeadOutputs
from .inference import _FIRST_LARGE, _LARGE_WINDOW, _SMALL_WINDOW, Kernels
from .meta_arch import PanopticFCN


class Stuff(NamedTuple):
    """Stuff kernels of all classes.

    Attributes:
        vectors: (S, E).
        present: (S,) bool.
    """

    vectors: torch.Tensor
    present: torch.Tensor


class PanopticFCNExport(ExportWrapper):
    """Panoptic FCN."""

    model: PanopticFCN

    def __init__(self, model: nn.Module) -> None:
        """Takes the model.

        Raises:
            ExportError: it needs annotations.
        """
        super().__init__(model)
        if self.model.true_positions or self.model.true_classes:
            raise ExportError("MODEL.PANOPTIC_FCN.INFERENCE.TRUE_POSITIONS or TRUE_CLASSES is on: it needs annotations")
        self.outputs = {**INSTANCES, **described(SEM_SEG, what="probabilities")}
        self.inside = (
            "network",
            "centres and regions",
            "kernel fusion",
            "masks, rescored, at the size of the image, and boxes",
            "semantic map",
        )
        if self.model.combine:
            self.outputs.update(described(PANOPTIC, rows="N", row="instance"))
            self.inside += ("panoptic merging",)

    def predict(self, images: torch.Tensor, size: Size) -> Outputs:
        """See the base class."""
        model = self.model
        outputs = model.predict(images).float().of_image(0)
        things, stuff = self._things(outputs), self._stuff(outputs)
        found = self._instances(things, outputs.encoded)
        stride = model.semantic_fpn.common_stride
        probabilities = _full_size(found["probabilities"], stride, size)
        masks = probabilities > model.inference_options.mask_threshold
        found = blank_invalid({**found, "masks": masks, "boxes": boxes_around(masks)})
        regions = (stuff.vectors @ outputs.encoded.flatten(1)).sigmoid()
        sem_seg = _full_size(regions.unflatten(1, outputs.encoded.shape[1:]), stride, size)
        sem_seg = torch.where(stuff.present[:, None, None], sem_seg, 0.0)
        if not model.target_options.with_things:
            # label 0, "things", has no region
            sem_seg = torch.cat([torch.zeros_like(sem_seg[:1]), sem_seg])
        found["sem_seg"] = sem_seg
        if model.combine:
            found.update(self._combine(found))
        return found

    def _things(self, outputs: HeadOutputs) -> Kernels:
        """Fused kernels, (n, E), by descending score; ``ABSENT`` where there is none. See ``kernels_of``."""
        options = self.model.inference_options
        parts = []
        for level, (logits, kernels) in enumerate(zip(outputs.centers, outputs.kernels, strict=True)):
            window = _LARGE_WINDOW if level >= _FIRST_LARGE else _SMALL_WINDOW
            scores = logits.sigmoid()
            average = F.avg_pool2d(scores[None], window, stride=1, padding=window // 2)[0]
            scores = (scores + average) / 2
            highest = F.max_pool2d(scores[None], 3, stride=1, padding=1)[0]
            peak = (scores == highest) & (scores > options.thing_threshold)
            cells = logits.shape[1] * logits.shape[2]
            score, pair = best(torch.where(peak, scores, ABSENT).flatten(), options.top_num // 2)
            classes = torch.div(pair, cells, rounding_mode="floor")
            parts.append((kernels.flatten(1)[:, pair - classes * cells].T, score, classes))
        vectors, scores, classes = (torch.cat(part) for part in zip(*parts, strict=True))
        scores, order = best(scores, scores.shape[0])
        things = Kernels(self.model.thing_embedding(vectors[order]), scores, classes[order])
        return things if options.similar_threshold > 1 else self._fuse(things)

    def _fuse(self, things: Kernels) -> Kernels:
        """See :mod:`convmask.ops.fuse_kernels`; a kernel that is not kept becomes absent."""
        options = self.model.inference_options
        vectors, present = things.vectors, things.scores > ABSENT
        unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
        covers = (unit @ unit.T >= options.similar_threshold) & present[:, None] & present
        if options.class_specific:
            covers = covers & (things.classes[:, None] == things.classes)
        rank = torch.arange(len(vectors), device=vectors.device)
        covers = (covers & (rank[:, None] < rank)) | (rank[:, None] == rank)
        first = torch.where(covers, rank[:, None], len(vectors)).amin(dim=0)
        members = (first == rank[:, None]).to(vectors.dtype)
        means = members @ vectors / members.sum(dim=1, keepdim=True).clamp(min=1)
        return Kernels(means, torch.where(first == rank, things.scores, ABSENT), things.classes)

    def _stuff(self, outputs: HeadOutputs) -> Stuff:
        """See ``stuff_kernels`` and ``fuse_stuff``."""
        options = self.model.inference_options
        total: Any = 0
        count: Any = 0
        for logits, kernels in zip(outputs.regions, outputs.kernels, strict=True):
            value, label = logits.sigmoid().flatten(1).max(dim=0)
            number = logits.shape[0]
            region = (label == torch.arange(number, device=label.device)[:, None]).to(value.dtype)
            cells = region.sum(dim=1)
            present = (region @ value) / cells.clamp(min=1) > options.stuff_threshold
            size = logits.shape[1] * logits.shape[2]
            divisor = cells.clamp(min=1) if options.kernel_average == "region" else torch.full_like(cells, size)
            average = (region @ kernels.flatten(1).T) / divisor[:, None]
            weight = present.to(value.dtype)[:, None]
            embedded = self.model.stuff_embedding(average) * weight
            total, count = total + embedded, count + weight
        return Stuff(total / count.clamp(min=1), count[:, 0] > 0)

    def _instances(self, things: Kernels, encoded: torch.Tensor) -> Outputs:
        """``probabilities`` at the common stride, ``scores``, ``classes`` and ``valid``. See ``rescore``."""
        options = self.model.inference_options
        probabilities = (things.vectors @ encoded.flatten(1)).sigmoid()
        present = things.scores > ABSENT
        inside = (probabilities > options.mask_threshold) & present[:, None]
        total = torch.where(inside, probabilities, 0.0).sum(dim=1)
        scores = torch.where(present, things.scores, 0.0) * total / (inside.sum(dim=1) + 1e-6)
        if options.matrix_nms:
            scores = scores * _matrix_nms_decay(inside, scores, things.classes)
        scores = torch.where(present & (scores >= options.mask_score_threshold), scores, ABSENT)
        score, rows = best(scores, min(options.top_num, len(things.scores)))
        chosen = probabilities[rows].unflatten(1, encoded.shape[1:])
        return {"probabilities": chosen, "scores": score, "classes": things.classes[rows], "valid": score > ABSENT}

    def _combine(self, found: Outputs) -> Outputs:
        options, labels = self.model.combine_options, found["sem_seg"].argmax(dim=0)
        categories = self.model.region_labels
        if categories is not None:
            labels = torch.tensor(categories, device=labels.device)[labels]
        return merge(
            found["masks"],
            found["valid"] & (found["scores"] >= options["score_threshold"]),
            labels,
            num_stuff=max(categories) if categories is not None else found["sem_seg"].shape[0] - 1,
            overlap_threshold=options["overlap_threshold"],
            stuff_area_limit=options["stuff_area_limit"],
        )


def _matrix_nms_decay(masks: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """See ``inference.matrix_nms_decay``; (n, cells) masks, which are not sorted."""
    flat, rank = masks.float(), torch.arange(masks.shape[0], device=masks.device)
    shared, area = flat @ flat.T, flat.sum(dim=1)
    iou = shared / (area[:, None] + area - shared).clamp(min=1)
    # [i, j]: i is better than j; of equal scores the first is
    better = (scores[:, None] > scores) | ((scores[:, None] == scores) & (rank[:, None] < rank))
    iou = torch.where(better & (classes[:, None] == classes), iou, 0.0)
    compensation = iou.amax(dim=0)
    decay = torch.exp(-2.0 * (iou.square() - compensation.square()[:, None]))
    return torch.where(better, decay, 1.0).amin(dim=0).clamp(max=1.0)


def _full_size(maps: torch.Tensor, stride: int, size: Size) -> torch.Tensor:
    """(n, H, W) at the size of the image, from (n, h, w) at the common stride."""
    up = F.interpolate(maps[None], scale_factor=stride, mode="bilinear", align_corners=False)
    return up[0, :, : size[0], : size[1]]


register_export("PanopticFCN", PanopticFCNExport)
