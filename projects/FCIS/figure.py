#!/usr/bin/env python
"""Draws the inside and outside maps of one RoI beside the mask that is assembled from them.

    python train_net.py --config-file configs/quick/fcis_synthetic.yaml
    python projects/FCIS/figure.py --config-file configs/quick/fcis_synthetic.yaml \
        --weights output/fcis_synthetic/model_final.pth --output docs/images/fcis_maps.png

Left the image and the RoI with the highest score. Then, for the class of that RoI, the k x k position-sensitive maps,
each cut to the surroundings of the RoI; in each the grid cell that is read from it is framed. Right what the frames add
up to: the assembled outside and inside maps, and the probability of "inside" of the two.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.data.mapper import PanopticDatasetMapper

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle


class Drawing(NamedTuple):
    """What is drawn.

    Attributes:
        image: (H, W, 3) uint8, RGB, the network's input.
        roi: x1, y1, x2, y2 in its pixels.
        maps: (2, k, k, h, w), outside and inside maps of the class.
        logits: (2, P, P), assembled.
        name: the class and its probability.
    """

    image: np.ndarray
    roi: np.ndarray
    maps: np.ndarray
    logits: np.ndarray
    name: str


@torch.no_grad()
def predict(model: nn.Module, cfg: CfgNode, inputs: dict[str, Any], names: list[str]) -> Drawing:
    """Runs the model and takes the RoI with the highest score of a class."""
    heads = model.roi_heads
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    maps = heads.head(features[heads.in_features[0]])
    boxes = heads.predict([maps], proposals)[0].boxes
    outputs = heads.read([maps], [boxes], None)
    probabilities = outputs.scores.softmax(dim=1)
    best = int(probabilities[:, 1:].max(dim=1).values.argmax())
    category = int(outputs.classes[best])
    image = inputs["image"].permute(1, 2, 0).numpy()
    return Drawing(
        image if cfg.INPUT.FORMAT == "RGB" else image[..., ::-1],
        boxes[best].numpy(),
        (maps.masks if maps.masks is not None else maps.scores)[0, :, :, :, category].permute(2, 0, 1, 3, 4).numpy(),
        outputs.masks[best].numpy(),
        f"{names[category - 1]}, {probabilities[best, category]:.2f}",
    )


def draw(drawing: Drawing, stride: int, path: str) -> None:
    """Writes the figure.

    Args:
        drawing: see there.
        stride: pixels a cell of the maps.
        path: of the picture.
    """
    group = drawing.maps.shape[1]
    x1, y1, x2, y2 = drawing.roi
    margin = 0.25 * max(x2 - x1, y2 - y1)
    height, width = drawing.maps.shape[-2:]
    window = (
        slice(max(int((y1 - margin) / stride), 0), min(int((y2 + margin) / stride) + 2, height)),
        slice(max(int((x1 - margin) / stride), 0), min(int((x2 + margin) / stride) + 2, width)),
    )
    limit = float(np.quantile(np.abs(drawing.logits), 0.9))  # the largest values are saturated
    figure = pyplot.figure(figsize=(16, 5), layout="constrained")
    parts: Any = figure.subfigures(1, 4, width_ratios=[1, 1.3, 1.3, 1])
    axes = parts[0].subplots()
    axes.imshow(drawing.image)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="red", linewidth=2))
    axes.set_title(drawing.name)
    axes.axis("off")
    for part, maps, title in zip(parts[1:3], drawing.maps, ("outside", "inside"), strict=True):
        part.suptitle(f"{title} maps, {group} x {group}")
        for row, line in enumerate(part.subplots(group, group, gridspec_kw={"wspace": 0.02, "hspace": 0.02})):
            for column, axes in enumerate(line):
                axes.imshow(maps[row, column][window], cmap="RdBu_r", vmin=-limit, vmax=limit)
                axes.axis("off")
                step = (x2 - x1 + 1) / group / stride, (y2 - y1 + 1) / group / stride
                corner = (
                    x1 / stride + column * step[0] - window[1].start - 0.5,
                    y1 / stride + row * step[1] - window[0].start - 0.5,
                )
                axes.add_patch(Rectangle(corner, *step, fill=False, edgecolor="black", linewidth=1))
    inside = np.exp(drawing.logits) / np.exp(drawing.logits).sum(axis=0)
    shown = (("assembled outside", drawing.logits[0]), ("assembled inside", drawing.logits[1]), ("inside", inside[1]))
    for axes, (title, values) in zip(parts[3].subplots(3, 1), shown, strict=True):
        probability = title == "inside"
        axes.imshow(
            values,
            cmap="gray" if probability else "RdBu_r",
            vmin=0 if probability else -limit,
            vmax=1 if probability else limit,
        )
        axes.set_title("mask: probability of inside" if probability else title, fontsize=9)
        axes.axis("off")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", default="fcis_maps.png")
    parser.add_argument("--image", type=int, default=0, help="index in the first dataset of DATASETS.TEST")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="further keys and values")
    args = parser.parse_args()
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    from convmask.data.class_counts import categories_of, set_class_counts

    set_class_counts(cfg)
    name = cfg.DATASETS.TEST[0]
    model = build_model(cfg).eval()
    Checkpointer(model, policy="strict").load(args.weights)
    inputs = PanopticDatasetMapper(cfg, False)(DatasetCatalog.get(name)[args.image])
    names = [category.name for category in categories_of(name).things]
    draw(predict(model, cfg, inputs, names), model.roi_heads.strides[0], args.output)


if __name__ == "__main__":
    main()
