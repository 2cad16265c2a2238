"""What the viewer and ``figure.py`` show of FCIS: the position-sensitive maps of one RoI, and what they assemble to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata

from convmask.demo.methods import Threshold
from convmask.visualization.maps import heat, input_picture, outlined, scaled, shown_size, signed, tiles

from .boxes import from_detectron
from .inference import detect, drop_small
from .meta_arch import FCIS

_LONGEST = 480
# Longer side of a tile of the k x k maps, in pixels.
_TILE = 64


def thresholds(cfg: CfgNode) -> list[Threshold]:
    """Those of voting and masks."""
    options = "roi_heads.inference_options"
    found = [
        Threshold("Mask probability", "MODEL.FCIS.BINARY_THRESH", f"{options}.binary_threshold"),
        Threshold("NMS: IoU of results", "MODEL.ROI_HEADS.NMS_THRESH_TEST", f"{options}.nms_threshold"),
    ]
    if cfg.MODEL.FCIS.VOTING.ENABLED:
        found.append(Threshold("IoU of RoIs that vote", "MODEL.FCIS.VOTING.MERGE_THRESH", f"{options}.merge_threshold"))
    return found


class RoiMaps(NamedTuple):
    """What one RoI reads.

    Attributes:
        roi: x1, y1, x2, y2 in pixels of the network's input.
        maps: (2, k, k, h, w), outside and inside maps of its class, of the level that it reads from.
        stride: of that level.
        logits: (2, P, P), assembled.
        category: of its class, from 0.
        score: of that class.
    """

    roi: np.ndarray
    maps: np.ndarray
    stride: int
    logits: np.ndarray
    category: int
    score: float

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the maps around the RoI."""
        x1, y1, x2, y2 = (float(value) for value in self.roi)
        margin = 0.25 * max(x2 - x1, y2 - y1)
        height, width = self.maps.shape[-2:]
        return (
            slice(max(int((y1 - margin) / self.stride), 0), min(int((y2 + margin) / self.stride) + 2, height)),
            slice(max(int((x1 - margin) / self.stride), 0), min(int((x2 + margin) / self.stride) + 2, width)),
        )

    def cell(self, row: int, column: int) -> tuple[float, float, float, float]:
        """x, y, width and height of the grid cell that is read, in cells of the maps cut to :attr:`window`.

        The middle of the first cell is 0.
        """
        x1, y1, x2, y2 = (float(value) for value in self.roi)
        group = self.maps.shape[1]
        width, height = (x2 - x1 + 1) / group / self.stride, (y2 - y1 + 1) / group / self.stride
        rows, columns = self.window
        x = x1 / self.stride + column * width - columns.start - 0.5
        return x, y1 / self.stride + row * height - rows.start - 0.5, width, height

    @property
    def limit(self) -> float:
        """Of the colours of logits; the largest values are saturated."""
        return float(np.quantile(np.abs(self.logits), 0.9))

    @property
    def probability(self) -> np.ndarray:
        """(P, P) of inside."""
        return 1 / (1 + np.exp(self.logits[0] - self.logits[1]))


@torch.no_grad()
def read_roi(model: FCIS, inputs: Mapping[str, Any], chosen: int = 0) -> RoiMaps | None:
    """Runs the model and reads the maps at a detection, the best first; None where nothing is detected."""
    heads = model.roi_heads
    images = model.preprocess_image([dict(inputs)])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    maps = [heads.head(features[name]) for name in heads.in_features]
    size = int(images.image_sizes[0][0]), int(images.image_sizes[0][1])
    rois = drop_small(heads.predict(maps, proposals)[0], heads.inference_options.min_size, heads.convention)
    found = detect(rois, size, heads.inference_options, heads.convention)
    if not len(found):
        return None
    index = int(found.scores.argsort(descending=True)[min(chosen, len(found) - 1)])
    box = from_detectron(found.pred_boxes.tensor[index : index + 1], heads.convention)
    category = int(found.pred_classes[index])
    outputs = heads.read(maps, [box], found.pred_classes[index : index + 1] + 1)
    level = 0 if len(maps) == 1 else int(heads._levels(box)[0])
    shown = maps[level].masks if maps[level].masks is not None else maps[level].scores
    return RoiMaps(
        box[0].float().cpu().numpy(),
        shown[0, :, :, :, category + 1].permute(2, 0, 1, 3, 4).float().cpu().numpy(),
        heads.strides[level],
        outputs.masks[0].float().cpu().numpy(),
        category,
        float(found.scores[index]),
    )


def inner_pictures(model: FCIS, inputs: Mapping[str, Any], metadata: Metadata, chosen: int) -> dict[str, np.ndarray]:
    """The RoI of a detection, its k x k outside and inside maps with the cell that is read framed, and the mask."""
    found = read_roi(model, inputs, chosen)
    if found is None:
        return {}
    height, width = inputs["image"].shape[-2:]
    size = shown_size(height, width, _LONGEST)
    names = metadata.get("thing_classes", None) or []
    name = names[found.category] if found.category < len(names) else f"class {found.category}"
    image = input_picture(inputs, model.input_format, size)
    pictures = {f"RoI: {name}, {found.score:.2f}": outlined(image, found.roi * (size[1] / width))}
    for title, maps in zip(("outside", "inside"), found.maps, strict=True):
        pictures[f"{title} maps, one for each part of the RoI"] = _grid(found, maps)
    rows = found.roi[3] - found.roi[1] + 1, found.roi[2] - found.roi[0] + 1
    shape = shown_size(max(1, round(float(rows[0]))), max(1, round(float(rows[1]))), 240)
    assembled = [signed(logits, found.limit) for logits in found.logits]
    parts = [scaled(part, shape, smooth=False) for part in (*assembled, heat(found.probability))]
    pictures["assembled: outside, inside; probability of inside"] = tiles([parts], gap=6)
    return pictures


def _grid(found: RoiMaps, maps: np.ndarray) -> np.ndarray:
    """(k, k, h, w) maps around the RoI, in each the cell that is read framed."""
    group = len(maps)
    height, width = maps[0, 0][found.window].shape
    size = shown_size(height, width, _TILE)
    table = []
    for row in range(group):
        line = []
        for column in range(group):
            tile = scaled(signed(maps[row, column][found.window], found.limit), size, smooth=False)
            x, y, w, h = found.cell(row, column)
            scale = size[1] / width, size[0] / height
            first = round((x + 0.5) * scale[0]), round((y + 0.5) * scale[1])
            last = round((x + w + 0.5) * scale[0]) - 1, round((y + h + 0.5) * scale[1]) - 1
            line.append(cv2.rectangle(tile, first, last, (0, 0, 0), 1))
        table.append(line)
    return tiles(table)
