#!/usr/bin/env python
"""Draws what the kernels of each round attend to for one image.

    python projects/KNet/figure.py --config-file configs/quick/knet_panoptic_synthetic.yaml \
        --weights output/knet_panoptic_synthetic/model_final.pth --output figure.png

The columns are the first kernels and the rounds, the rows the kernels with the best scores of the last round. Each cell
is the image where the kernel's mask has a probability of one half and more, dark elsewhere: the pixels that it gathers
features from in the next round. The image is of DATASETS.TEST, or a file.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.data.class_counts import set_class_counts
from convmask.data.images import read_image
from convmask.data.loader import build_test_loader
from convmask.projects.knet.viewer import class_names, rounds_table, run
from convmask.visualization import save_image


def main(arguments: list[str] | None = None) -> None:
    """Reads the arguments, draws, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, help="of an instance or panoptic KNet")
    parser.add_argument("--weights", required=True, help="any that MODEL.WEIGHTS takes")
    parser.add_argument("--output", required=True, help="the picture to write, .png or .jpg")
    parser.add_argument("--image", help="a file; by default an image of DATASETS.TEST is taken")
    parser.add_argument("--index", type=int, default=0, help="which image of DATASETS.TEST")
    parser.add_argument("--rows", type=int, default=6, help="kernels that are drawn")
    parser.add_argument("--size", type=int, default=128, help="shorter side of each picture, in pixels")
    parser.add_argument("opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for the config")
    args = parser.parse_args(arguments)
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, *args.opts])
    if cfg.MODEL.META_ARCHITECTURE != "KNet" or cfg.MODEL.KNET.TASK == "semantic":
        parser.error(f"{args.config_file} is no instance or panoptic KNet")
    set_class_counts(cfg)
    model = build_model(cfg).eval()
    Checkpointer(model, policy="strict").load(args.weights)
    if args.image:
        picture = read_image(args.image, cfg.INPUT.FORMAT)
        inputs = {"image": torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))}
    else:
        inputs = build_test_loader(cfg, cfg.DATASETS.TEST[0]).dataset[args.index]
    names = class_names(MetadataCatalog.get(cfg.DATASETS.TEST[0]))
    height, width = inputs["image"].shape[-2:]
    scale = args.size / min(height, width)
    rounds = run(model, inputs, args.rows, (round(height * scale), round(width * scale)))
    figure = rounds_table(rounds, names, args.rows)
    save_image(args.output, figure)
    print(f"{args.output}: {figure.shape[1]} x {figure.shape[0]} pixels")


if __name__ == "__main__":
    main()
