"""What the viewer and ``figure.py`` show of Panoptic FCN: centres, regions, kernels, and the masks they cut out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata

from convmask.demo.methods import Threshold
from convmask.visualization.colors import Color, class_color, object_color
from convmask.visualization.maps import (
    enlarged,
    input_picture,
    painted,
    principal_colors,
    scaled,
    shown_size,
    signed,
    tiles,
)

from .heads import HeadOutputs
from .inference import Kernels, Masks, cut_out, rescore, thing_kernels
from .meta_arch import PanopticFCN

Size = tuple[int, int]

# Longer side of a picture, in pixels.
_LONGEST = 480
# Kernels whose weights are shown.
_ROWS = 24


def thresholds(cfg: CfgNode) -> list[Threshold]:
    """Those of the post-processing."""
    inference, combine = "MODEL.PANOPTIC_FCN.INFERENCE", "MODEL.PANOPTIC_FCN.COMBINE"
    found = [
        Threshold("Least score of a centre", f"{inference}.THING_THRESH", "inference_options.thing_threshold"),
        Threshold("Least score of a region", f"{inference}.STUFF_THRESH", "inference_options.stuff_threshold"),
        Threshold(
            "Cosine from which kernels are fused",
            f"{inference}.SIMILAR_THRESH",
            "inference_options.similar_threshold",
            high=1.05,
        ),
        Threshold("Mask probability", f"{inference}.MASK_THRESH", "inference_options.mask_threshold"),
    ]
    if cfg.MODEL.PANOPTIC_FCN.COMBINE.ENABLED:
        found += [
            Threshold(
                "Panoptic map: least score of an object",
                f"{combine}.INSTANCES_CONFIDENCE_THRESH",
                "combine_options.score_threshold",
            ),
            Threshold(
                "Panoptic map: greatest overlap",
                f"{combine}.OVERLAP_THRESH",
                "combine_options.overlap_threshold",
            ),
        ]
    return found


class Stages(NamedTuple):
    """What the model comes to on its way, for one image.

    Attributes:
        outputs: of the heads, without a batch dimension.
        kernels: fused, of things.
        stuff_kernels: fused, of stuff.
        things: masks of things, rescored.
        stuff: masks of stuff.
        padded: (height, width) that the network saw.
        image: the part of it that is the image.
        size: of the pictures.
    """

    outputs: HeadOutputs
    kernels: Kernels
    stuff_kernels: Kernels
    things: Masks
    stuff: Masks
    padded: Size
    image: Size
    size: Size

    def shown(self, maps: torch.Tensor) -> torch.Tensor:
        """Scales (n, h, w) maps of the padded image to (n, H, W) of the pictures."""
        return enlarged(maps, self.padded, self.image, self.size)


@torch.no_grad()
def run(model: PanopticFCN, inputs: Mapping[str, Any], longest: int) -> Stages:
    """Runs the model on one image; pictures will have a longer side of ``longest`` pixels."""
    images = model.preprocess_image([dict(inputs)])
    outputs = model.predict(images.tensor).float().of_image(0)
    height, width = (int(x) for x in images.image_sizes[0])
    kernels, stuff_kernels = model.kernels_of(outputs)
    things = rescore(cut_out(kernels, outputs.encoded), model.inference_options)
    stuff = cut_out(stuff_kernels, outputs.encoded)
    padded = images.tensor.shape[2], images.tensor.shape[3]
    size = shown_size(height, width, longest)
    return Stages(outputs, kernels, stuff_kernels, things, stuff, padded, (height, width), size)


def stage_pictures(
    model: PanopticFCN, inputs: Mapping[str, Any], metadata: Metadata, stages: Stages
) -> dict[str, np.ndarray]:
    """Centres with a ring around each peak, regions, and the masks of the kernels of things and of stuff."""
    image = input_picture(inputs, model.input_format, stages.size)
    first = 0 if model.target_options.with_things else 1
    classes = range(model.target_options.num_classes)
    centers = torch.stack([stages.shown(level.sigmoid()) for level in stages.outputs.centers]).amax(dim=0)
    rings = painted(image, centers, [class_color(metadata, index, True) for index in classes])
    for level, cells in enumerate(peaks(model, stages)):
        rings = circled(rings, cells, stages.outputs.centers[level].shape[-2:], stages)
    regions = torch.stack([stages.shown(level.sigmoid()) for level in stages.outputs.regions]).mean(dim=0)
    # each pixel in the colour of its best class, the more of it the higher the score
    regions = regions * (regions == regions.amax(dim=0)) / regions.amax().clamp(min=1e-6)
    labels = range(first, first + len(regions))
    confident = _confident(stages.things, model.combine_options["score_threshold"])
    return {
        "centres": rings,
        "regions": painted(image, regions, [_stuff_color(metadata, label) for label in labels]),
        "masks of thing kernels": painted(
            image, stages.shown(confident.probabilities), _object_colors(confident, metadata)
        ),
        "masks of stuff kernels": painted(
            image,
            stages.shown(stages.stuff.probabilities),
            [_stuff_color(metadata, label) for label in (stages.stuff.classes + first).tolist()],
        ),
    }


def inner_pictures(
    model: PanopticFCN, inputs: Mapping[str, Any], metadata: Metadata, chosen: int
) -> dict[str, np.ndarray]:
    """The stages, the kernel map of each level, and the weights of the fused kernels."""
    stages = run(model, inputs, _LONGEST)
    pictures = stage_pictures(model, inputs, metadata, stages)
    strides = [round(stages.padded[0] / level.shape[1]) for level in stages.outputs.kernels]
    for level, (kernels, cells) in enumerate(zip(stages.outputs.kernels, peaks(model, stages), strict=True)):
        caption = f"kernel map, stride {strides[level]}: {len(cells)} peaks"
        pictures[caption] = circled(_kernel_map(kernels, stages), cells, kernels.shape[-2:], stages)
    weights = torch.cat([stages.kernels.vectors[:_ROWS], stages.stuff_kernels.vectors])
    if len(weights):
        things, stuff = min(_ROWS, len(stages.kernels.vectors)), len(stages.stuff_kernels.vectors)
        pictures[f"weights of fused kernels, one a row: {things} of things, {stuff} of stuff"] = _weights(weights)
    return pictures


def _kernel_map(kernels: torch.Tensor, stages: Stages) -> np.ndarray:
    """The first three principal components of (K, h, w) kernels as colours; cells stay squares."""
    colors = (255 * principal_colors(kernels)).round().byte().numpy()
    whole = scaled(colors, stages.padded, smooth=False)[: stages.image[0], : stages.image[1]]
    return scaled(whole, stages.size, smooth=False)


def _weights(vectors: torch.Tensor) -> np.ndarray:
    """(n, K) weights, a cell each: blue below 0, red above."""
    limit = float(vectors.abs().flatten().quantile(0.98))
    cell = max(2, _LONGEST // vectors.shape[1])
    rows = [[np.repeat(np.repeat(signed(row[None], limit), 10, axis=0), cell, axis=1)] for row in vectors]
    return tiles(rows, gap=1)


def peaks(model: PanopticFCN, stages: Stages) -> list[torch.Tensor]:
    """Flat cells, of each level, that are peaks of the centre scores."""
    found = []
    for logits in stages.outputs.centers:
        # a kernel map whose vectors are the numbers of their cells
        numbers = torch.arange(logits[0].numel(), device=logits.device).view(1, *logits.shape[1:])
        found.append(thing_kernels([logits], [numbers], model.inference_options).vectors[:, 0].cpu())
    return found


def circled(picture: np.ndarray, cells: torch.Tensor, level: Size, stages: Stages) -> np.ndarray:
    """The picture with a ring around the middle of each of the flat ``cells`` of the level; larger on coarse levels."""
    picture = np.ascontiguousarray(picture)
    pixels = [stages.size[i] / stages.image[i] * stages.padded[i] / level[i] for i in (0, 1)]
    radius = max(3, round(0.35 * pixels[0]) + 2)
    for cell in cells.tolist():
        row, column = divmod(int(cell), level[1])
        center = round((column + 0.5) * pixels[1]), round((row + 0.5) * pixels[0])
        cv2.circle(picture, center, min(radius, 16), (255, 255, 255), 1, cv2.LINE_AA)
    return picture


def _confident(masks: Masks, threshold: float) -> Masks:
    keep = masks.scores >= threshold
    return Masks(*(x[keep] for x in masks))


def _object_colors(masks: Masks, metadata: Metadata) -> list[Color]:
    """Colours by class and place, as those of the result."""
    colors = []
    one_class = len(metadata.get("thing_classes", None) or []) == 1
    for probability, label in zip(masks.probabilities.cpu(), masks.classes.tolist(), strict=True):
        weights = probability / probability.sum().clamp(min=1e-6)
        y = float((weights.sum(dim=1) * torch.linspace(0, 1, len(weights))).sum())
        x = float((weights.sum(dim=0) * torch.linspace(0, 1, weights.shape[1])).sum())
        colors.append(object_color(class_color(metadata, label, True), (x, y), one_class))
    return colors


def _stuff_color(metadata: Metadata, label: int) -> Color:
    """Of a region; grey for "things"."""
    return (200, 200, 200) if label == 0 else class_color(metadata, label, False)
