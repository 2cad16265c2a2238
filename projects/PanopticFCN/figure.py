#!/usr/bin/env python
"""Draws how Panoptic FCN comes to its result for one image.

    python projects/PanopticFCN/figure.py --config-file configs/quick/panoptic_fcn_synthetic.yaml \
        --weights output/panoptic_fcn_synthetic/model_final.pth --output figure.png

Six pictures: the image; the scores of centres over all levels, with a ring around each peak; the best regions by the
mean of the levels' scores; the masks of the fused kernels, of things and of stuff; and the panoptic result. The image
is of DATASETS.TEST, or a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model
from torch.nn import functional

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.data.class_counts import set_class_counts
from convmask.data.images import read_image
from convmask.data.loader import build_test_loader
from convmask.projects.panoptic_fcn.inference import Masks, cut_out, rescore, thing_kernels
from convmask.projects.panoptic_fcn.meta_arch import PanopticFCN
from convmask.projects.panoptic_fcn.rescale import rescale
from convmask.visualization import contact_sheet, draw_segments, save_image, segments_of
from convmask.visualization.colors import class_color, object_color

Picture = np.ndarray[Any, np.dtype[np.uint8]]
Size = tuple[int, int]

CAPTIONS = ("image", "centres", "regions", "masks of thing kernels", "masks of stuff kernels", "result")
# Brightness of the image below maps of scores.
_BELOW = 0.35


class Canvas:
    """The image at the size of the figure, and maps brought to it."""

    def __init__(self, image: Picture, padded: Size, seen: Size) -> None:
        """``image``: (H, W, 3) RGB of the figure's size; ``padded`` and ``seen``: the network's, with and without
        padding.
        """
        self.image, self.seen = image, seen
        self.size = (image.shape[0], image.shape[1])
        self.padded = padded

    def shown(self, maps: torch.Tensor) -> torch.Tensor:
        """Scales (n, h, w) maps of the padded image to (n, H, W) of the figure."""
        if len(maps) == 0:
            return maps.new_zeros(0, *self.size)
        stride = round(self.padded[0] / maps.shape[1])
        # levels are rounded up: the last cells may reach beyond the padding
        if stride * maps.shape[2] < self.seen[1] or stride * maps.shape[1] < self.seen[0]:
            return functional.interpolate(maps[None], self.size, mode="bilinear", align_corners=False)[0]
        return rescale(maps, stride, self.seen, self.size)

    def painted(self, maps: torch.Tensor, colors: Sequence[tuple[int, int, int]]) -> Picture:
        """Each of (n, H, W) probabilities in its colour, added to the darkened image."""
        light = torch.einsum("nhw,nc->hwc", maps.cpu(), torch.tensor(colors, dtype=torch.float32).view(-1, 3))
        share = maps.sum(dim=0).clamp(max=1).cpu()[..., None]
        below = torch.from_numpy(self.image.astype(np.float32)) * _BELOW
        picture = below * (1 - 0.7 * share) + light / maps.sum(dim=0).cpu().clamp(min=1)[..., None]
        return picture.clamp(0, 255).byte().numpy()


@torch.no_grad()
def draw(model: PanopticFCN, inputs: dict[str, Any], metadata: Metadata, size: int) -> Picture:
    """The figure (RGB) for one image.

    Args:
        model: in evaluation mode.
        inputs: Detectron2's dict of one image.
        metadata: names and colours.
        size: longer side of each picture, in pixels.
    """
    images = model.preprocess_image([inputs])
    outputs = model.predict(images.tensor).float().of_image(0)
    height, width = (int(x) for x in images.image_sizes[0])
    canvas = _canvas(model, inputs, (images.tensor.shape[2], images.tensor.shape[3]), (height, width), size)
    things, stuff = model.kernels_of(outputs)
    options = model.inference_options
    thing_masks, stuff_masks = rescore(cut_out(things, outputs.encoded), options), cut_out(stuff, outputs.encoded)
    stride = images.tensor.shape[2] // outputs.encoded.shape[1]
    result = model.postprocess(thing_masks, stuff_masks, stride, (height, width), canvas.size)
    first = 0 if model.target_options.with_things else 1

    classes = range(model.target_options.num_classes)
    centers = torch.stack([canvas.shown(level.sigmoid()) for level in outputs.centers]).amax(dim=0)
    rings = canvas.painted(centers, [class_color(metadata, index, True) for index in classes])
    for level, kernels in zip(outputs.centers, outputs.kernels, strict=True):
        peaks = thing_kernels([level], [cell_numbers(kernels)], options).vectors[:, 0]
        rings = circled(rings, peaks, (level.shape[1], level.shape[2]), canvas)

    regions = torch.stack([canvas.shown(level.sigmoid()) for level in outputs.regions]).mean(dim=0)
    # each pixel in the colour of its best class, the more of it the higher the score
    regions = regions * (regions == regions.amax(dim=0)) / regions.amax().clamp(min=1e-6)
    labels = range(first, first + len(regions))
    confident = _confident(thing_masks, model.combine_options["score_threshold"])
    pictures = [
        canvas.image,
        rings,
        canvas.painted(regions, [_stuff_color(metadata, label) for label in labels]),
        canvas.painted(canvas.shown(confident.probabilities), _object_colors(confident, metadata)),
        canvas.painted(
            canvas.shown(stuff_masks.probabilities),
            [_stuff_color(metadata, label) for label in (stuff_masks.classes + first).tolist()],
        ),
        draw_segments(canvas.image, segments_of(result, metadata), labels=True, scores=False),
    ]
    rows = [contact_sheet([pictures[start : start + 3]], CAPTIONS[start : start + 3]) for start in (0, 3)]
    return np.concatenate(rows)


def cell_numbers(kernels: torch.Tensor) -> torch.Tensor:
    """A kernel map whose vectors are the numbers of their cells, (1, h, w)."""
    return torch.arange(kernels.shape[1] * kernels.shape[2]).view(1, *kernels.shape[1:])


def circled(picture: Picture, cells: torch.Tensor, level: Size, canvas: Canvas) -> Picture:
    """The picture with a ring around the middle of each of the flat ``cells`` of the level; larger on coarse levels."""
    picture = np.ascontiguousarray(picture)
    pixels = [canvas.size[i] / canvas.seen[i] * canvas.padded[i] / level[i] for i in (0, 1)]
    radius = max(3, round(0.35 * pixels[0]) + 2)
    for cell in cells.tolist():
        row, column = divmod(int(cell), level[1])
        center = round((column + 0.5) * pixels[1]), round((row + 0.5) * pixels[0])
        cv2.circle(picture, center, min(radius, 16), (255, 255, 255), 1, cv2.LINE_AA)
    return picture


def _canvas(model: PanopticFCN, inputs: dict[str, Any], padded: Size, seen: Size, size: int) -> Canvas:
    image = inputs["image"].permute(1, 2, 0).numpy()
    if model.input_format == "BGR":
        image = image[..., ::-1]
    scale = size / max(seen)
    shown = max(1, round(seen[1] * scale)), max(1, round(seen[0] * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(np.ascontiguousarray(image), shown, interpolation=interpolation)
    return Canvas(resized.astype(np.uint8), padded, seen)


def _confident(masks: Masks, threshold: float) -> Masks:
    keep = masks.scores >= threshold
    return Masks(*(x[keep] for x in masks))


def _object_colors(masks: Masks, metadata: Metadata) -> list[tuple[int, int, int]]:
    """Colours by class and place, as those of the result."""
    colors = []
    one_class = len(metadata.get("thing_classes", [])) == 1
    for probability, label in zip(masks.probabilities, masks.classes.tolist(), strict=True):
        weights = probability / probability.sum().clamp(min=1e-6)
        y = float((weights.sum(dim=1) * torch.linspace(0, 1, len(weights))).sum())
        x = float((weights.sum(dim=0) * torch.linspace(0, 1, weights.shape[1])).sum())
        colors.append(object_color(class_color(metadata, label, True), (x, y), one_class))
    return colors


def _stuff_color(metadata: Metadata, label: int) -> tuple[int, int, int]:
    """Of a region; grey for "things"."""
    return (200, 200, 200) if label == 0 else class_color(metadata, label, False)


def load(args: argparse.Namespace) -> tuple[CfgNode, PanopticFCN]:
    """Config and model.

    Raises:
        ValueError: the config is of another architecture.
    """
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, *args.opts])
    if cfg.MODEL.META_ARCHITECTURE != "PanopticFCN":
        raise ValueError(f"{args.config_file}: META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, not PanopticFCN")
    set_class_counts(cfg)
    model = build_model(cfg).eval()
    Checkpointer(model, policy="strict").load(args.weights)
    return cfg, model


def main(arguments: list[str] | None = None) -> None:
    """Reads the arguments, draws, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, help="of a Panoptic FCN")
    parser.add_argument("--weights", required=True, help="any that MODEL.WEIGHTS takes")
    parser.add_argument("--output", required=True, help="the picture to write, .png or .jpg")
    parser.add_argument("--input", help="an image; by default one of DATASETS.TEST is taken")
    parser.add_argument("--index", type=int, default=0, help="which image of DATASETS.TEST")
    parser.add_argument("--size", type=int, default=384, help="longer side of each picture, in pixels")
    parser.add_argument("opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for the config")
    args = parser.parse_args(arguments)
    try:
        cfg, model = load(args)
    except ValueError as error:
        parser.error(str(error))
    if args.input:
        picture = read_image(args.input, cfg.INPUT.FORMAT)
        inputs = {"image": torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))}
    else:
        inputs = build_test_loader(cfg, cfg.DATASETS.TEST[0]).dataset[args.index]
    figure = draw(model, inputs, MetadataCatalog.get(cfg.DATASETS.TEST[0]), args.size)
    save_image(args.output, figure)
    print(f"{args.output}: {figure.shape[1]} x {figure.shape[0]} pixels")


if __name__ == "__main__":
    main()
