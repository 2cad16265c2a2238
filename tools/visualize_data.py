#!/usr/bin/env python
"""Draws what the mapper feeds a model in training: each image with its instances, and its semantic map beside them.

    python tools/visualize_data.py --dataset synthetic_panoptic_train --output data_pictures
    python tools/visualize_data.py --config-file configs/quick/... --num-images 8 INPUT.COLOR_AUG_SSD True

The pictures show the images after the augmentations of the config, so a second draw of an image differs from the first.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from rich.progress import track

import convmask.data  # noqa: F401
from convmask.data.categories import PanopticCategories
from convmask.data.config_datasets import register_datasets_of
from convmask.data.errors import DatasetError
from convmask.data.mapper import PanopticDatasetMapper
from convmask.data.user_modules import import_user_module
from convmask.engine import load_config
from convmask.visualization import contact_sheet, draw_prediction, save_image
from convmask.visualization.colors import class_color

IGNORED = (0, 0, 0)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="FILE", help="config whose INPUT and DATASETS.TRAIN are used")
    parser.add_argument("--dataset", metavar="NAME", help="registered dataset (default: the first of DATASETS.TRAIN)")
    parser.add_argument("--import", dest="module", metavar="MODULE", help="Python module or file that registers it")
    parser.add_argument("--output", metavar="DIR", default="data_pictures", help="folder for the pictures")
    parser.add_argument(
        "--num-images", metavar="N", type=int, default=16, help="how many images (default: %(default)s)"
    )
    parser.add_argument("--shuffle", action="store_true", help="random images instead of the first ones")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentations and --shuffle (default: %(default)s)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config, at the end")
    return parser.parse_args(arguments)


def build_config(arguments: argparse.Namespace) -> CfgNode:
    """The config of the command line.

    Raises:
        ValueError: there is no such config, no dataset, or the name of one is not registered.
    """
    cfg = load_config(arguments.config_file or "", arguments.opts)
    register_datasets_of(cfg)
    if arguments.dataset:
        cfg.DATASETS.TRAIN = (arguments.dataset,)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("no dataset: give --dataset, or a --config-file with DATASETS.TRAIN")
    name = cfg.DATASETS.TRAIN[0]
    if name not in DatasetCatalog.list():
        similar = difflib.get_close_matches(name, DatasetCatalog.list(), n=5, cutoff=0.4)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        raise ValueError(f"dataset {name!r} is not registered{hint}")
    if arguments.num_images < 1:
        raise ValueError(f"--num-images is {arguments.num_images}, not at least 1")
    return cfg


def semantic_colors(metadata: Metadata, layout: str) -> np.ndarray:
    """(256, 3) uint8: the RGB colour of each semantic label; that of "ignore", and of labels of no class, is black."""
    colors = np.full((256, 3), IGNORED, dtype=np.uint8)
    categories: PanopticCategories | None = metadata.get("categories", None)
    if layout == "all" and categories is not None:
        rows = [categories.by_id[category_id].color for category_id in categories.all_order]
    else:
        rows = [class_color(metadata, label, False) for label in range(len(metadata.get("stuff_classes", []) or []))]
    colors[: min(len(rows), 255)] = np.array(rows, dtype=np.uint8).reshape(-1, 3)[:255]
    return colors


def draw(sample: Mapping[str, Any], metadata: Metadata, cfg: CfgNode) -> np.ndarray:
    """One picture (H, W, 3), RGB, of what the mapper returned: image, instances, semantic map, as far as there."""
    image = sample["image"].numpy().transpose(1, 2, 0)
    image = np.ascontiguousarray(image[:, :, ::-1] if cfg.INPUT.FORMAT == "BGR" else image)
    panels, captions = [image], ["image"]
    if "instances" in sample:
        panels.append(draw_prediction(image, {"instances": _as_prediction(sample["instances"])}, metadata))
        captions.append("instances")
    if "sem_seg" in sample:
        colors = semantic_colors(metadata, cfg.INPUT.SEMANTIC_LAYOUT)
        panels.append(colors[torch.clamp(sample["sem_seg"], 0, 255).numpy()])
        captions.append("semantic map")
    return contact_sheet([panels], captions, panel_height=max(384, image.shape[0]))


def _as_prediction(targets: Instances) -> Instances:
    drawn = Instances(targets.image_size)
    drawn.pred_boxes = targets.gt_boxes
    if targets.has("gt_masks"):
        drawn.pred_masks = targets.gt_masks.tensor
    drawn.pred_classes = targets.gt_classes
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the pictures; returns the exit code."""
    options = parse_arguments(arguments)
    setup_logger(name="convmask")
    try:
        if options.module:
            import_user_module(options.module)
        cfg = build_config(options)
        name = cfg.DATASETS.TRAIN[0]
        seed_all_rng(options.seed)
        mapper = PanopticDatasetMapper(cfg, True)
        records = DatasetCatalog.get(name)
        order = np.random.permutation(len(records)) if options.shuffle else np.arange(len(records))
        output = Path(options.output)
        chosen = order[: options.num_images].tolist()
        for index in track(chosen, description=f"Drawing {name}"):
            picture = draw(mapper(records[index]), MetadataCatalog.get(name), cfg)
            save_image(output / f"{index:06d}.png", picture)
    except (DatasetError, ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(chosen)} pictures in {output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
