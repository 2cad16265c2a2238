"""K-Net as a program of one image: all of it, since its results need neither NMS nor loops."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from convmask.export.selection import best, boxes_around
from convmask.export.wrapper import (
    INSTANCES,
    PANOPTIC,
    SEM_SEG,
    ExportWrapper,
    Outputs,
    Size,
    described,
    register_export,
)

from .inference import best_pairs, merge_scores
from .meta_arch import KNet


class KNetExport(ExportWrapper):
    """Instance, panoptic or semantic K-Net; every instance is valid, as the method drops none."""

    model: KNet

    def __init__(self, model: nn.Module) -> None:
        """Takes the model."""
        super().__init__(model)
        head = self.model.kernel_head
        if head is None:
            self.outputs = described(SEM_SEG, what="logits")
            self.inside = ("network", "semantic map at the size of the image")
            return
        self.inside = ("network with all rounds", "best kernel-class pairs", "masks at the size of the image and boxes")
        if not head.num_stuff_classes or self.model.instances_of_panoptic:
            self.outputs.update(INSTANCES)
        if head.num_stuff_classes:
            self.outputs.update(described(PANOPTIC, rows="P", row="thing kernel"))
            self.outputs["thing_scores"] = "(P,) float32: of each thing kernel"
            self.outputs["thing_classes"] = "(P,) int64: of each thing kernel"
            self.inside = (*self.inside, "panoptic merging")

    @property
    def divisibility(self) -> int:
        """See the base class."""
        return super().divisibility if self.model.kernel_head is None else max(super().divisibility, 32)

    def predict(self, images: torch.Tensor, size: Size) -> Outputs:
        """See the base class."""
        model = self.model
        if model.sem_seg_head is not None:
            logits = model.sem_seg_head.layers(model.backbone(images))
            padded = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
            return {"sem_seg": padded[0, :, : size[0], : size[1]]}
        last = model.predict(images)[1][-1]
        assert model.kernel_head is not None and last.class_logits is not None
        things, stuff = model.kernel_head.num_thing_classes, model.kernel_head.num_stuff_classes
        scores = last.class_logits[0].sigmoid()
        upsampling = model.kernel_head.localization_fpn.common_stride // model.mask_stride
        probabilities = _full_size(last.mask_logits, upsampling, images.shape[-2:], size)
        kernels = len(scores) - stuff
        outputs: Outputs = {}
        if "boxes" in self.outputs:
            outputs.update(self._instances(probabilities[:kernels], scores[:kernels, :things]))
        if stuff:
            outputs.update(self._panoptic(probabilities, scores))
        return outputs

    def _instances(self, probabilities: torch.Tensor, scores: torch.Tensor) -> Outputs:
        options = self.model.inference_options
        values, classes, kernels = best_pairs(scores, options.top_num)
        masks = (probabilities > options.mask_threshold)[kernels]
        valid = torch.ones_like(classes, dtype=torch.bool)
        return {"boxes": boxes_around(masks), "scores": values, "classes": classes, "masks": masks, "valid": valid}

    def _panoptic(self, probabilities: torch.Tensor, class_scores: torch.Tensor) -> Outputs:
        """See ``panoptic_of``: kernels in the order of their scores, without a loop."""
        assert self.model.kernel_head is not None
        options, stuff = self.model.inference_options, self.model.kernel_head.num_stuff_classes
        scores, labels = merge_scores(class_scores, self.model.kernel_head.num_thing_classes)
        number = len(scores)
        owner = (probabilities * scores[:, None, None]).argmax(dim=0)
        area = (probabilities >= 0.5).flatten(1).sum(dim=1)
        owned = torch.zeros_like(area).scatter_add(0, owner.flatten(), torch.ones_like(owner).flatten())
        is_stuff = torch.arange(number, device=scores.device) >= number - stuff
        kept = (is_stuff | (scores >= options.things_threshold)) & (owned > 0) & (area > 0)
        kept = kept & (owned.double() / area.clamp(min=1) >= options.overlap_threshold)
        _, order = best(scores, number)
        rank = torch.zeros_like(order).scatter(0, order, kept[order].long().cumsum(0))
        ids = torch.where(kept, rank, 0)
        return {
            "panoptic_seg": ids[owner].int(),
            "thing_ids": ids[: number - stuff],
            "stuff_ids": torch.cat([ids.new_zeros(1), ids[number - stuff :]]),
            "thing_scores": scores[: number - stuff],
            "thing_classes": labels[: number - stuff],
        }


def _full_size(mask_logits: torch.Tensor, upsampling: int, padded: Size, image: Size) -> torch.Tensor:
    """Probabilities (n, H, W) at the size of the image, see ``inference.full_size``; all at once."""
    x = mask_logits
    if upsampling > 1:
        x = F.interpolate(x, scale_factor=upsampling, mode="bilinear", align_corners=False)
    x = F.interpolate(x.sigmoid(), size=padded, mode="bilinear", align_corners=False)
    return x[0, :, : image[0], : image[1]]


register_export("KNet", KNetExport)
