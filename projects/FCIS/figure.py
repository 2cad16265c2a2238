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
from typing import Any

import matplotlib
import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.data.mapper import PanopticDatasetMapper
from convmask.projects.fcis.viewer import RoiMaps, read_roi
from convmask.visualization.maps import input_picture

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle


def draw(image: np.ndarray, found: RoiMaps, name: str, path: str) -> None:
    """Writes the figure.

    Args:
        image: (H, W, 3) uint8, RGB, the network's input.
        found: what the RoI reads.
        name: the class and its probability.
        path: of the picture.
    """
    group, limit = found.maps.shape[1], found.limit
    x1, y1, x2, y2 = found.roi
    figure = pyplot.figure(figsize=(16, 5), layout="constrained")
    parts: Any = figure.subfigures(1, 4, width_ratios=[1, 1.3, 1.3, 1])
    axes = parts[0].subplots()
    axes.imshow(image)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="red", linewidth=2))
    axes.set_title(name)
    axes.axis("off")
    for part, maps, title in zip(parts[1:3], found.maps, ("outside", "inside"), strict=True):
        part.suptitle(f"{title} maps, {group} x {group}")
        for row, line in enumerate(part.subplots(group, group, gridspec_kw={"wspace": 0.02, "hspace": 0.02})):
            for column, axes in enumerate(line):
                axes.imshow(maps[row, column][found.window], cmap="RdBu_r", vmin=-limit, vmax=limit)
                axes.axis("off")
                x, y, width, height = found.cell(row, column)
                axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="black", linewidth=1))
    shown = (
        ("assembled outside", found.logits[0]),
        ("assembled inside", found.logits[1]),
        ("inside", found.probability),
    )
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
    found = read_roi(model, inputs)
    if found is None:
        parser.error(f"nothing is detected in image {args.image} of {name}")
    draw(input_picture(inputs, cfg.INPUT.FORMAT), found, f"{names[found.category]}, {found.score:.2f}", args.output)


if __name__ == "__main__":
    main()
