"""EmbedMask and its FCOS as a program of one image; the distances of all pixels to the results' embeddings."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from convmask.export.selection import ABSENT, best, clipped, survivors
from convmask.export.wrapper import INSTANCES, ExportWrapper, Outputs, Size, blank_invalid, register_export

from .fcos import ConvMaskFCOS
from .fcos_head import FCOSOutputs
from .fcos_targets import decode
from .heads import enlarge
from .inference import mask_cells
from .losses import margins_in_use
from .meta_arch import EmbedMask


class FCOSExport(ExportWrapper):
    """FCOS: boxes alone."""

    model: ConvMaskFCOS

    def __init__(self, model: nn.Module) -> None:
        """Takes the model."""
        super().__init__(model)
        self.outputs = {name: text for name, text in INSTANCES.items() if name != "masks"}
        self.inside = ("network", "boxes", "best candidates of each level", "class-wise NMS")

    def predict(self, images: torch.Tensor, size: Size) -> Outputs:
        """See the base class."""
        features = self.model.backbone(images)
        found = self.detect(self.model.fcos_head([features[name] for name in self.model.in_features]).float(), size)
        return blank_invalid({**found, "masks": found["valid"][:, None, None]})

    def detect(self, outputs: FCOSOutputs, size: Size) -> Outputs:
        """``boxes``, ``scores``, ``classes`` and ``valid``; ``corners`` as the method counts them, and ``locations``.

        See ``fcos_inference.detect``.
        """
        options = self.model.fcos_inference_options
        parts, first = [], 0
        for logits, centerness in zip(outputs.logits, outputs.centerness, strict=True):
            probabilities = logits[0].sigmoid()
            scores = torch.where(
                probabilities > options.score_threshold, probabilities * centerness[0].sigmoid(), ABSENT
            )
            cells = logits.shape[2] * logits.shape[3]
            score, pair = best(scores.flatten(), options.pre_nms_topk)
            classes = torch.div(pair, cells, rounding_mode="floor")
            parts.append((score, classes, pair - classes * cells + first))
            first += cells
        scores, classes, chosen = (torch.cat(part) for part in zip(*parts, strict=True))
        points = self.model.locations(outputs).points
        extent = int(options.inclusive)
        corners = decode(points[chosen], outputs.pixel_distances()[0, chosen])
        corners = clipped(corners, size[0] - extent, size[1] - extent)
        boxes = torch.cat([corners[:, :2], corners[:, 2:] + extent], dim=1)
        num_classes = outputs.logits[0].shape[1]
        kept = survivors(boxes, scores, classes, num_classes, options.nms_threshold)
        score, rows = best(torch.where(kept, scores, ABSENT), options.detections)
        found = {"boxes": boxes, "classes": classes, "corners": corners, "locations": chosen}
        return {**{name: x[rows] for name, x in found.items()}, "scores": score, "valid": score > ABSENT}


class EmbedMaskExport(FCOSExport):
    """EmbedMask."""

    model: EmbedMask

    def __init__(self, model: nn.Module) -> None:
        """Takes the model."""
        super().__init__(model)
        self.outputs = dict(INSTANCES)
        self.inside = (*self.inside, "masks at the size of the image")

    def predict(self, images: torch.Tensor, size: Size) -> Outputs:
        """See the base class."""
        model, options = self.model, self.model.mask_options
        outputs, embeddings = model.predict(images)
        found = self.detect(outputs, size)
        chosen = found["locations"]
        margins = margins_in_use(embeddings.flat_margins()[0, chosen], options.fixed_margin)
        pixels = enlarge(embeddings.pixels, model.scale_factor)[0]
        values = _log_probabilities(pixels, embeddings.flat_proposals()[0, chosen], margins)
        inside = _inside(mask_cells(found["corners"], model.mask_stride, options.cells), values)
        values = torch.where(inside, values.exp() if options.values == "probability" else values, options.fill)
        scaled = F.interpolate(values[None], scale_factor=model.mask_stride, mode="bilinear", align_corners=False)[0]
        masks = scaled[:, : size[0], : size[1]] > options.least
        return blank_invalid({**found, "masks": masks})


def _log_probabilities(pixels: torch.Tensor, proposals: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """(n, h, w) by (D, h, w) pixels, (n, D) proposals and (n,) or (n, D) margins; one dimension after the other.

    A matrix product of the expanded square would lose small distances to cancellation.
    """
    each = margins if margins.dim() == 2 else margins[:, None].expand_as(proposals)
    total = torch.zeros_like(pixels[:1])
    for dim in range(pixels.shape[0]):
        total = total - each[:, dim, None, None] * (pixels[dim] - proposals[:, dim, None, None]).square()
    return total


def _inside(cells: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """(n, h, w) bool: the cells (n, 4) of each map."""
    x, y = (torch.arange(length, device=maps.device) for length in (maps.shape[2], maps.shape[1]))
    columns = (x >= cells[:, :1]) & (x < cells[:, 2:3])
    rows = (y >= cells[:, 1:2]) & (y < cells[:, 3:])
    return rows[:, :, None] & columns[:, None]


register_export("ConvMaskFCOS", FCOSExport)
register_export("EmbedMask", EmbedMaskExport)
