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
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model

from convmask.checkpoint import Checkpointer
from convmask.config import get_cfg
from convmask.data.class_counts import set_class_counts
from convmask.data.images import read_image
from convmask.data.loader import build_test_loader
from convmask.projects.panoptic_fcn.meta_arch import PanopticFCN
from convmask.projects.panoptic_fcn.viewer import run, stage_pictures
from convmask.visualization import contact_sheet, draw_segments, save_image, segments_of
from convmask.visualization.maps import input_picture

Picture = np.ndarray[Any, np.dtype[np.uint8]]

CAPTIONS = ("image", "centres", "regions", "masks of thing kernels", "masks of stuff kernels", "result")


@torch.no_grad()
def draw(model: PanopticFCN, inputs: dict[str, Any], metadata: Metadata, size: int) -> Picture:
    """The figure (RGB) for one image.

    Args:
        model: in evaluation mode.
        inputs: Detectron2's dict of one image.
        metadata: names and colours.
        size: longer side of each picture, in pixels.
    """
    stages = run(model, inputs, size)
    image = input_picture(inputs, model.input_format, stages.size)
    stride = stages.padded[0] // stages.outputs.encoded.shape[1]
    result = model.postprocess(stages.things, stages.stuff, stride, stages.image, stages.size)
    pictures = [
        image,
        *stage_pictures(model, inputs, metadata, stages).values(),
        draw_segments(image, segments_of(result, metadata), labels=True, scores=False),
    ]
    rows = [contact_sheet([pictures[start : start + 3]], CAPTIONS[start : start + 3]) for start in (0, 3)]
    return np.concatenate(rows)


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
